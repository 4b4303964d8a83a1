"""Opens the roads that this process can take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from messages.errors import ConfigError
from transport.plasma import PlasmaTransport, Vaults
from transport.protocol import Transport
from transport.secret import ClusterSecret
from transport.shm import ShmTransport
from transport.tcp import SocketTransport
from transport.ucx import UcxTransport

logger = logging.getLogger(__name__)

#: All there are, the preferred ones first.
ROADS = ("shm", "ucx", "socket", "plasma")


def open_roads(
    names: Sequence[str], secret: ClusterSecret, host: str, port_range: tuple[int, int], vaults: Vaults | None
) -> list[Transport]:
    """The named roads, in the order named, but for those that cannot work in this process: the log says why.

    Args:
        names: of ROADS.
        secret: of the cluster.
        host: this node's address, the only one that is listened on.
        port_range: first and last port that may be listened on.
        vaults: Ray's object store; None outside of Ray.
    """
    openers: dict[str, Callable[[], Transport]] = {
        "shm": ShmTransport,
        "ucx": lambda: UcxTransport(host, port_range=port_range),
        "socket": lambda: SocketTransport(secret, host, port_range=port_range),
    }
    if vaults is not None:
        openers["plasma"] = lambda: PlasmaTransport(vaults)
    opened: list[Transport] = []
    for name in names:
        try:
            if name in openers:
                opened.append(openers[name]())
        except ConfigError as error:
            logger.info("road %s cannot be taken: %s", name, error.message)
    return opened
