"""Pairs of transports of every road, and links between them without a channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from transport.loopback import LoopbackNetwork, LoopbackTransport
from transport.protocol import Link, Transport
from transport.shm import ShmTransport


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


#: road -> an owner and a puller
ROADS: dict[str, Callable[[], tuple[Transport, Transport]]] = {
    "shm": lambda: (ShmTransport(), ShmTransport()),
    "loopback": _loopback,
}
