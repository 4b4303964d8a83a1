"""One pull of the ucx road: its messages, the receives posted for them, and what has landed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from messages.handoff import RegionInfo
from transport.protocol import Arrived, Copy, Link, RegionMemory, TransferError
from transport.ucx.library import SocketAddress
from transport.ucx.wire import NUM_TAGS, Message, Range
from transport.ucx.worker import Connection, Transfer, Worker


class Pull:
    """One pull of the ucx road. Made on the event loop, then touched by the road's thread alone."""

    def __init__(
        self,
        link: Link,
        source: RegionInfo,
        address: SocketAddress,
        messages: Sequence[Message],
        target: RegionMemory,
        stall_s: float,
        arrivals: Arrivals,
        tell: Callable[[TransferError | None], None],
    ) -> None:
        """Make a pull; `tell` is called once, with the outcome, from the road's thread."""
        self.link = link
        self.source = source
        self.address = address  #: of its owner's listener
        self.messages = messages
        self.target = target
        self.stall_s = stall_s
        self.arrivals = arrivals
        self.tell = tell
        self.loop = asyncio.get_running_loop()
        self.begun_s = time.monotonic()
        self.connection: Connection | None = None  #: that its messages come over; None: waiting
        self.first_tag = 0
        self.pending: list[Receive] = []
        self.failure: TransferError | None = None  #: then it is settling
        self.settle_by_s = math.inf
        self.has_ended = False

    def post(self, worker: Worker, connection: Connection, first_tag: int) -> None:
        """Post a receive for each message of the pull."""
        self.connection = connection
        self.first_tag = first_tag
        self.begun_s = time.monotonic()
        for index, message in enumerate(self.messages):
            _, offset, num_bytes = message.copies[0]
            is_gathered = len(message.copies) > 1
            buffer = bytearray(message.num_bytes) if is_gathered else self.target.slice(offset, num_bytes)
            transfer = worker.receive(buffer, message.num_bytes, (first_tag + index) % NUM_TAGS)
            self.pending.append(Receive(message, buffer, transfer))

    def take_over(self, num_looked_at: int) -> list[Receive]:
        """Take those of the first `num_looked_at` receives that are over; they are pending no more."""
        over: list[Receive] = []
        still: list[Receive] = []
        for receive in self.pending[:num_looked_at]:
            (over if receive.transfer.is_over else still).append(receive)
        if over:
            self.pending[:num_looked_at] = still
        return over

    def land(self, receive: Receive) -> None:
        """Bring the bytes of a landed message to their places, if they were gathered, and report them."""
        copies = receive.message.copies
        if len(copies) > 1:
            scatter(cast(bytearray, receive.buffer), copies, self.target)
        self.arrivals.count(receive.message)


@dataclass(frozen=True, slots=True)
class Receive:
    """A message of a pull that is expected: the receive that was posted for it."""

    message: Message
    buffer: object
    transfer: Transfer


class Arrivals:
    """Counts messages as they land, and reports each copy that has landed whole."""

    def __init__(self, num_copies: int, messages: Sequence[Message], on_arrived: Arrived | None) -> None:
        """Report the copies that have no bytes at once."""
        self._on_arrived = on_arrived
        self._num_missing = [0] * num_copies  # messages
        for message in messages:
            for position in message.positions:
                self._num_missing[position] += 1
        for position in range(num_copies):
            self._report(position)

    def count(self, message: Message) -> None:
        """Count a message that has landed."""
        for position in message.positions:
            self._num_missing[position] -= 1
            self._report(position)

    def _report(self, position: int) -> None:
        if not self._num_missing[position] and self._on_arrived is not None:
            self._on_arrived(position)


def gather(memory: RegionMemory, ranges: Sequence[Range]) -> bytearray:
    """Copy ranges of host memory into one buffer, one behind the other."""
    return bytearray().join(cast(memoryview, memory.slice(*each)) for each in ranges)


def scatter(buffer: bytearray, copies: Sequence[Copy], target: RegionMemory) -> None:
    """Put what `gather` gave, of the sources of `copies`, into their targets."""
    begin = 0
    view = memoryview(buffer)
    for _, offset, num_bytes in copies:
        cast(memoryview, target.slice(offset, num_bytes))[:] = view[begin : begin + num_bytes]
        begin += num_bytes
