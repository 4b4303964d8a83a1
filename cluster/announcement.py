"""How the command line finds what serves on this machine: by abstract unix sockets, which end with their process.

Each `kvray serve` listens on one whose name says whose it is, and tells whoever is of the same user where it serves.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
from pathlib import Path
from typing import Final

import msgspec

_PREFIX: Final = "kvray-serves-"
_TIMEOUT_S: Final = 2.0
_MAX_BYTES: Final = 1 << 16
_CREDENTIALS: Final = struct.Struct("3i")  #: of the peer of a unix socket: pid, uid, gid


class ServerFound(msgspec.Struct, frozen=True, kw_only=True):
    """One `kvray serve` of this machine and user."""

    url: str
    pid: int  #: of its command line
    api_key_file: str | None = None  #: with an operator's key, which the same user can read while it lives


class Announcement:
    """Tells processes of the same user where this one serves, from now until it is closed."""

    def __init__(self, server: ServerFound) -> None:
        self._line = msgspec.json.encode(server)
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(f"\0{_PREFIX}{os.getuid()}-{secrets.token_hex(8)}")
        self._door.listen()
        threading.Thread(target=self._tell, name="announcement", daemon=True).start()

    def close(self) -> None:
        """Tell nobody any more."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone does not
        self._door.close()

    def _tell(self) -> None:
        while True:
            try:
                peer, _ = self._door.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                if _user_of(peer) == os.getuid():
                    peer.settimeout(_TIMEOUT_S)
                    peer.sendall(self._line)


def servers_here() -> list[ServerFound]:
    """Return what this user serves on this machine, in its network namespace, by the order of their starts."""
    prefix = f"@{_PREFIX}{os.getuid()}-"
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/unix").read_text().splitlines()
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
        if _user_of(asking) != os.getuid():  # whoever is first has a name
            return None
        while len(said) < _MAX_BYTES and (data := asking.recv(_MAX_BYTES)):
            said += data
        return msgspec.json.decode(said, type=ServerFound)
    return None


def _user_of(peer: socket.socket) -> int:
    _pid, user, _group = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)
