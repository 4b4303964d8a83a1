"""The fake road: one process, and faults on command. Ships so that failure handling is tested against it anywhere.

network = LoopbackNetwork()
prefill, decode = LoopbackTransport(network), LoopbackTransport(network)
decode.faults.append(Stall())        # the next pull of `decode` makes no end
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from messages.handoff import RegionInfo
from transport.memory import Memory, as_host_memory
from transport.protocol import Arrived, Copy, Link, RegionError, RegionMemory, TransferError, check_ranges

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fail:
    """The pull fails after the first `num_copies` copies."""

    num_copies: int = 0


@dataclass(frozen=True, slots=True)
class Tear:
    """The pull writes part of each copy, with a byte that is another, tells none, and fails."""


@dataclass(frozen=True, slots=True)
class Stall:
    """The pull waits this long before it begins; by default for longer than anyone waits."""

    delay_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Reorder:
    """The copies are carried out in another order, `seed` says which: breaks what relies on the order."""

    seed: int = 0


@dataclass(frozen=True, slots=True)
class Corrupt:
    """After the pull byte number `offset` of what was pulled is another, and the pull reports success."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class WriteLate:
    """The pull stalls, and its bytes land `delay_s` after it returned: what a road does that cannot abort."""

    delay_s: float = 0.05


Fault: TypeAlias = Fail | Tear | Stall | Reorder | Corrupt | WriteLate


class LoopbackNetwork:
    """The regions that the transports of one pretended network can reach."""

    def __init__(self) -> None:
        self.regions: dict[bytes, Memory] = {}  #: nonce -> registered memory


class LoopbackTransport:
    """The fake `transport.protocol.Transport`. Each pull that passes the checks takes one fault from `faults`' left."""

    is_one_sided = True
    is_direct = True

    def __init__(self, network: LoopbackNetwork, *, road: str = "loopback") -> None:
        self.road = road
        self.faults: deque[Fault] = deque()
        self.num_pulls = 0  #: those that passed the checks
        self._network = network
        self._registered: set[bytes] = set()
        self._open_pulls: dict[asyncio.Event, Link] = {}  # event: to be given up
        self._is_closed = False

    def can_fill(self, memory: RegionMemory) -> bool:
        """Tell whether it is host memory."""
        return isinstance(memory, Memory)

    def register(self, memory: RegionMemory) -> RegionInfo:
        """Make `memory` readable on the network; the answer describes it to peers. Idempotent.

        Raises:
            RegionError: it is not host memory, or the transport is closed.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        self._network.regions[memory.nonce] = as_host_memory(memory, self.road)
        self._registered.add(memory.nonce)
        return RegionInfo(road=self.road, handle=memory.nonce, num_bytes=memory.num_bytes, nonce=memory.nonce)

    async def pull(
        self,
        link: Link,
        source: RegionInfo,
        copies: Sequence[Copy],
        target: RegionMemory,
        stall_s: float,
        on_arrived: Arrived | None = None,
    ) -> None:
        """Carry out all copies, in order, but for the fault that is due.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: a fault said so, nothing arrived for `stall_s` seconds, or the link was lost.
        """
        memory = self._find(source)
        host_target = as_host_memory(target, self.road)
        check_ranges(copies, memory.num_bytes, target.num_bytes)
        self.num_pulls += 1
        fault = self.faults.popleft() if self.faults else None
        await asyncio.sleep(0)  # a real road lets others run, too
        order = list(range(len(copies)))
        match fault:
            case None:
                pass
            case Fail(num_copies):
                _carry_out(memory, copies, order[:num_copies], host_target, on_arrived)
                raise TransferError(f"{self.road}: failed on command")
            case Tear():
                for copy in copies:
                    part = copy._replace(num_bytes=(copy.num_bytes + 1) // 2)
                    _carry_out(memory, [part], [0], host_target)
                    _flip_byte([part], host_target, 0)
                raise TransferError(f"{self.road}: failed in the middle, on command")
            case Stall(delay_s):
                await self._wait(link, min(delay_s, stall_s))
                if delay_s >= stall_s:
                    raise TransferError(f"{self.road}: nothing arrived for {stall_s:g} s")
            case Reorder(seed):
                random.Random(seed).shuffle(order)
            case Corrupt(offset):
                _carry_out(memory, copies, order, host_target)
                _flip_byte(copies, host_target, offset)
                if on_arrived is not None:
                    for position in order:
                        on_arrived(position)
                return
            case WriteLate(delay_s):
                write = functools.partial(_carry_out, memory, copies, order, host_target)
                await self._stall_and_write_late(link, stall_s, delay_s, write)
            case _:
                assert_never(fault)
        _carry_out(memory, copies, order, host_target, on_arrived)

    def on_message(self, link: Link, body: bytes) -> None:
        """Drop the message with a warning: this road is one-sided, and its ends say nothing over the link."""
        logger.warning("%s: a message of %d bytes that nobody wanted", self.road, len(body))

    def on_link_lost(self, link: Link) -> None:
        """End the pulls from that peer with TransferError."""
        for given_up, owner in self._open_pulls.items():
            if owner is link:
                given_up.set()

    def carriers(self, link: Link) -> str:
        """Return "memcpy": both ends are in one process."""
        return "memcpy"

    def close(self) -> None:
        """Take what was registered off the network."""
        self._is_closed = True
        for given_up in self._open_pulls:
            given_up.set()
        for nonce in self._registered:
            self._network.regions.pop(nonce, None)
        self._registered.clear()

    async def _stall_and_write_late(
        self, link: Link, stall_s: float, delay_s: float, write: Callable[[], None]
    ) -> None:
        error = TransferError(f"{self.road}: nothing arrived for {stall_s:g} s")
        try:
            await self._wait(link, stall_s)
        except TransferError as lost:
            error = lost
        finally:  # also when it was cancelled: then above all
            asyncio.get_running_loop().call_later(delay_s, write)
        error.quarantine_s = 2 * delay_s
        raise error

    async def _wait(self, link: Link, seconds: float) -> None:
        """Sleep, unless the link is lost or this transport closed meanwhile: TransferError."""
        given_up = asyncio.Event()
        self._open_pulls[given_up] = link
        try:
            async with asyncio.timeout(seconds):
                await given_up.wait()
        except TimeoutError:
            return
        finally:
            del self._open_pulls[given_up]
        raise TransferError(f"{self.road}: the peer is lost, or closed")

    def _find(self, source: RegionInfo) -> Memory:
        if self._is_closed:
            raise RegionError("the transport is closed")
        memory = self._network.regions.get(source.handle)
        if source.road != self.road or memory is None:
            raise RegionError(f"{self.road}: no such region on this network (road {source.road!r})")
        if memory.nonce != source.nonce or memory.num_bytes != source.num_bytes:
            raise RegionError(f"{self.road}: another region than the one described")
        return memory


def _carry_out(
    source: Memory,
    copies: Sequence[Copy],
    positions: Sequence[int],
    target: Memory,
    on_arrived: Arrived | None = None,
) -> None:
    for position in positions:
        copy = copies[position]
        target.view[copy.target_offset : copy.target_offset + copy.num_bytes] = source.view[
            copy.source_offset : copy.source_offset + copy.num_bytes
        ]
        if on_arrived is not None:
            on_arrived(position)


def _flip_byte(copies: Sequence[Copy], target: Memory, offset: int) -> None:
    for copy in copies:
        if offset < copy.num_bytes:
            target.view[copy.target_offset + offset] ^= 0xFF
            return
        offset -= copy.num_bytes
