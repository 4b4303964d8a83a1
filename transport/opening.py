"""Opens the roads that this process can take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from messages.errors import ConfigError
from transport.plasma.road import PlasmaTransport, Vaults
from transport.protocol import Transport
from transport.secret import ClusterSecret
from transport.shm import ShmTransport
from transport.socket.road import SocketTransport
from transport.ucx.road import UcxTransport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoadOptions:
    """Which roads may be used, and where they listen."""

    names: tuple[str, ...]  #: of shm, ucx, socket, plasma; the preferred ones first
    port_range: tuple[int, int] = (20000, 20999)  #: both ends included
    ucx_transports: str | None = None  #: as UCX_TLS; None: tcp, and what moves GPU memory where there is a GPU
    ucx_devices: tuple[str, ...] = ()  #: network devices beside the host's interface, e.g. mlx5_0:1


def open_roads(
    options: RoadOptions,
    secret: ClusterSecret,
    host: str,
    vaults: Vaults | None,
    prepare_thread: Callable[[], None],
) -> list[Transport]:
    """Open the named roads, in the order named, but for those that cannot work in this process: the log says why.

    Args:
        options: which, and how.
        secret: of the cluster.
        host: this node's address, the only one that is listened on.
        vaults: Ray's object store; None outside of Ray.
        prepare_thread: called first in threads that touch registered memory (an accelerator's context).

    Raises:
        ConfigError: there is no road of that name.
    """
    openers: dict[str, Callable[[], Transport]] = {
        "shm": ShmTransport,
        "ucx": lambda: UcxTransport(
            host,
            port_range=options.port_range,
            transports=options.ucx_transports,
            devices=options.ucx_devices,
            prepare_thread=prepare_thread,
        ),
        "socket": lambda: SocketTransport(secret, host, port_range=options.port_range),
        "plasma": lambda: _plasma(vaults),
    }
    unknown = [name for name in options.names if name not in openers]
    if unknown:
        raise ConfigError(f"road {unknown[0]!r}: wanted one of {', '.join(openers)}")
    opened: list[Transport] = []
    for name in options.names:
        try:
            opened.append(openers[name]())
        except ConfigError as error:
            logger.info("road %s cannot be taken: %s", name, error.message)
    return opened


def _plasma(vaults: Vaults | None) -> PlasmaTransport:
    if vaults is None:
        raise ConfigError("there is no Ray here")
    return PlasmaTransport(vaults)
