"""Pairs of transports of every road, and links between them without a channel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from transport.loopback import LoopbackNetwork, LoopbackTransport
from transport.plasma.road import PlasmaTransport
from transport.plasma.vault import LocalVaults
from transport.protocol import Link, Transport
from transport.secret import ClusterSecret
from transport.shm import ShmTransport
from transport.socket.road import SocketTransport
from transport.ucx.road import UcxTransport


def linked(puller: Transport, owner: Transport) -> Link:
    """The puller's link to the owner; what each sends arrives at the other in a later turn of the loop."""
    loop = asyncio.get_running_loop()

    def deliver(receiver: Transport, far: Link, body: bytes) -> None:
        if not far.is_lost:
            receiver.on_message(far, body)

    def send_to_owner(road: str, body: bytes) -> bool:
        loop.call_soon(deliver, owner, owners, body)
        return True

    def send_to_puller(road: str, body: bytes) -> bool:
        loop.call_soon(deliver, puller, pullers, body)
        return True

    pullers, owners = Link(send_to_owner), Link(send_to_puller)
    return pullers


def _loopback() -> tuple[Transport, Transport]:
    network = LoopbackNetwork()
    return LoopbackTransport(network), LoopbackTransport(network)


def _socket() -> tuple[Transport, Transport]:
    secret = ClusterSecret.generate()
    return SocketTransport(secret, "127.0.0.1"), SocketTransport(secret, "127.0.0.1")


def _ucx() -> tuple[Transport, Transport]:
    pytest.importorskip("ucxx", reason="ucxx is not installed: no UCX road")
    return UcxTransport("127.0.0.1"), UcxTransport("127.0.0.1")


def _plasma() -> tuple[Transport, Transport]:
    vaults = LocalVaults()
    return PlasmaTransport(vaults), PlasmaTransport(vaults)


#: road -> an owner and a puller
ROADS: dict[str, Callable[[], tuple[Transport, Transport]]] = {
    "shm": lambda: (ShmTransport(), ShmTransport()),
    "ucx": _ucx,
    "socket": _socket,
    "plasma": _plasma,
    "loopback": _loopback,
}


async def ended(*transports: Transport) -> None:
    """Close each and wait for its thread: a process has one UCX road, so none is to end while another begins."""
    for transport in transports:
        transport.close()
        if isinstance(transport, UcxTransport):
            await asyncio.to_thread(transport._mover._thread.join, 10)


def wait_until(holds: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Until it does; blocks the thread."""
    ends_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_s
        time.sleep(0.005)
