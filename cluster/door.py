"""A door for processes of the same user on this machine: an abstract unix socket, which ends with its process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 2.0
_REST_S: Final = 1.0  #: after a failure
_CREDENTIALS: Final = struct.Struct("3i")  #: of the peer of a unix socket: pid, uid, gid


class Door:
    """Answers each process of the same user that comes, one after the other, on a thread, until it is closed."""

    def __init__(self, name: str, answer: Callable[[socket.socket], None]) -> None:
        """Listen at `name`, in the abstract namespace: no file to clean up. `answer` may raise OSError."""
        self._answer = answer
        self._is_closed = False
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(f"\0{name}")
        self._door.listen()
        threading.Thread(target=self._serve, name="door", daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone does not
        self._door.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._door.accept()
            except OSError as error:
                if self._is_closed:
                    return
                logger.warning("nobody can be answered: %s", error)  # too many open files, say
                time.sleep(_REST_S)
                continue
            with peer, contextlib.suppress(OSError):
                pid, user = process_at(peer)
                if user != os.getuid():
                    logger.warning("process %d of user %d knocked, and is not answered", pid, user)
                    continue
                peer.settimeout(_TIMEOUT_S)
                self._answer(peer)


def process_at(peer: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end of a unix socket: of a server, who began to listen."""
    pid, user, _group = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(pid), int(user)
