"""A listening socket that outlives the processes that accept from it.

The command line binds the port and keeps it; each ingress of its own Ray gets a descriptor of the same socket. No proxy
stands between a client and an ingress, and while a lost one is replaced, new connections wait instead of being refused.
"""

from __future__ import annotations

import contextlib
import secrets
import socket

from cluster.door import Door
from messages.errors import ConfigError

_ASK_TIMEOUT_S = 10.0
_BACKLOG = 2048  #: connections that may wait for an ingress


def bound_socket(host: str, port: int) -> socket.socket:
    """Bind a TCP socket that has the port and does not listen yet: connections are refused.

    Raises:
        ConfigError: the port cannot be had.
    """
    # Not with SO_REUSEADDR if it can be helped: with it, two processes may have one port until one of them listens.
    # What needs it is a port whose last connections the kernel still remembers.
    for reuses in (False, True):
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuses)
        try:
            bound.bind((host, port))
        except OSError as error:
            bound.close()
            failure = error
        else:
            return bound
    raise ConfigError(f"http: cannot listen on {host} port {port}: {failure.strerror or failure}")


class SharedListener:
    """Keeps a bound socket, and gives it to processes of the same user that know its name."""

    def __init__(self, host: str, port: int) -> None:
        """Bind the port, and give its socket out from now on.

        Raises:
            ConfigError: the port cannot be had.
        """
        self._bound = bound_socket(host, port)
        #: What `take_listener` needs, on this machine.
        self.name = f"kvray-{secrets.token_hex(16)}"
        self._door = Door(self.name, self._give)

    def refuse(self) -> None:
        """Refuse connections, those that wait included, until the socket is taken and listens again."""
        with contextlib.suppress(OSError):  # it does not listen
            self._bound.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the port back; who has the socket keeps it."""
        self._door.close()
        self._bound.close()

    def _give(self, peer: socket.socket) -> None:
        socket.send_fds(peer, [b"1"], [self._bound.fileno()])


def take_listener(name: str) -> socket.socket:
    """Take the socket that a `SharedListener` of this machine keeps; it listens from now on.

    Raises:
        ConfigError: nobody gives it, or somebody else listens there by now.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(_ASK_TIMEOUT_S)
            asking.connect(f"\0{name}")
            _, descriptors, _, _ = socket.recv_fds(asking, 1, 1)
    except OSError as error:
        raise ConfigError(f"http: the command line does not give its socket: {error.strerror or error}") from None
    if not descriptors:
        raise ConfigError("http: the command line refused to give its socket")
    taken = socket.socket(fileno=descriptors[0])
    try:
        taken.listen(_BACKLOG)
    except OSError as error:
        with taken:
            host, port, *_ = taken.getsockname()
        raise ConfigError(f"http: cannot listen on {host} port {port}: {error.strerror or error}") from None
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections inherit it; see bound_socket
    return taken
