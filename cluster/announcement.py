"""How the command line finds what serves on this machine: by abstract unix sockets, which end with their process.

Each `kvray serve` listens on one whose name says whose it is, and tells whoever is of the same user where it serves.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from pathlib import Path
from typing import Final

import msgspec

from cluster.door import Door, process_at

_PREFIX: Final = "kvray-serves-"
_TIMEOUT_S: Final = 2.0
_MAX_BYTES: Final = 1 << 16


class ServerFound(msgspec.Struct, frozen=True, kw_only=True):
    """One `kvray serve` of this machine and user."""

    url: str
    pid: int  #: of its command line
    api_key_file: str | None = None  #: with an operator's key, which the same user can read while it lives


class Announcement:
    """Tells processes of the same user where this one serves, from now until it is closed."""

    def __init__(self, server: ServerFound) -> None:
        self._line = msgspec.json.encode(server)
        self._door = Door(f"{_PREFIX}{os.getuid()}-{secrets.token_hex(8)}", self._tell)

    def close(self) -> None:
        """Tell nobody any more."""
        self._door.close()

    def _tell(self, peer: socket.socket) -> None:
        peer.sendall(self._line)


def servers_here() -> list[ServerFound]:
    """Return what this user serves on this machine, in its network namespace, by the order of their starts."""
    prefix = f"@{_PREFIX}{os.getuid()}-"
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()  # names are any bytes
        names = dict.fromkeys(word for line in lines if (word := line.rpartition(" ")[2]).startswith(prefix))
        found = [_asked(f"\0{name[1:]}") for name in names]
        return sorted((server for server in found if server is not None), key=lambda server: server.pid)
    return []


def _asked(name: str) -> ServerFound | None:
    """Ask who listens there; None: nobody any more, or somebody else's."""
    said = b""
    with contextlib.suppress(OSError, msgspec.MsgspecError), socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_TIMEOUT_S)
        asking.connect(name)
        if process_at(asking)[1] != os.getuid():  # whoever is first has a name
            return None
        while len(said) < _MAX_BYTES and (data := asking.recv(_MAX_BYTES)):
            said += data
        return msgspec.json.decode(said, type=ServerFound)
    return None
