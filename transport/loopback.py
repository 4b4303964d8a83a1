"""The fake road: one process, and faults on command. Ships so that failure handling is tested against it anywhere.

network = LoopbackNetwork()
prefill, decode = LoopbackTransport(network), LoopbackTransport(network)
decode.faults.append(Stall())        # the next pull of `decode` makes no end
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from messages.handoff import RegionInfo
from transport.memory import Memory
from transport.protocol import Copy, RegionError, TransferError
from transport.shm import check_ranges


@dataclass(frozen=True, slots=True)
class Fail:
    """The pull fails after the first `num_copies` copies."""

    num_copies: int = 0


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
    """The pull times out, and its bytes land `delay_s` after it returned: what a road does that cannot abort."""

    delay_s: float = 0.05


Fault: TypeAlias = Fail | Stall | Reorder | Corrupt | WriteLate


class LoopbackNetwork:
    """The regions that the transports of one pretended network can reach."""

    def __init__(self) -> None:
        self.regions: dict[bytes, Memory] = {}  #: nonce -> registered memory


class LoopbackTransport:
    """See `transport.protocol.Transport`. `faults`: one is taken from its left by each pull that passes the checks."""

    road = "loopback"
    is_one_sided = True

    def __init__(self, network: LoopbackNetwork, *, can_abort_safely: bool = True) -> None:
        self.can_abort_safely = can_abort_safely
        self.faults: deque[Fault] = deque()
        self.num_pulls = 0  #: those that passed the checks
        self._network = network
        self._registered: set[bytes] = set()
        self._is_closed = False

    def register(self, memory: Memory) -> RegionInfo:
        """Make `memory` readable on the network. Idempotent."""
        if self._is_closed:
            raise RegionError("the transport is closed")
        self._network.regions[memory.nonce] = memory
        self._registered.add(memory.nonce)
        return RegionInfo(road=self.road, handle=memory.nonce, num_bytes=memory.num_bytes, nonce=memory.nonce)

    async def pull(self, source: RegionInfo, copies: Sequence[Copy], target: Memory, timeout_s: float) -> None:
        """Carry out all copies, in order, but for the fault that is due.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: a fault said so, or no end within `timeout_s` seconds.
        """
        memory = self._find(source)
        check_ranges(copies, memory.num_bytes, target.num_bytes)
        self.num_pulls += 1
        fault = self.faults.popleft() if self.faults else None
        await asyncio.sleep(0)  # a real road lets others run, too
        match fault:
            case None:
                _carry_out(memory, copies, target)
            case Fail(num_copies):
                _carry_out(memory, copies[:num_copies], target)
                raise TransferError("loopback: failed on command")
            case Stall(delay_s):
                await asyncio.sleep(min(delay_s, timeout_s))
                if delay_s >= timeout_s:
                    raise TransferError(f"loopback: no end within {timeout_s:g} s")
                _carry_out(memory, copies, target)
            case Reorder(seed):
                _carry_out(memory, random.Random(seed).sample(copies, len(copies)), target)
            case Corrupt(offset):
                _carry_out(memory, copies, target)
                _flip_byte(copies, target, offset)
            case WriteLate(delay_s):
                try:
                    await asyncio.sleep(timeout_s)
                finally:  # also when cancelled: then above all
                    asyncio.get_running_loop().call_later(delay_s, _carry_out, memory, list(copies), target)
                raise TransferError(f"loopback: no end within {timeout_s:g} s")
            case _:
                assert_never(fault)

    def forget(self, source: RegionInfo) -> None:
        """Nothing is kept open."""

    def close(self) -> None:
        """Take what was registered off the network."""
        self._is_closed = True
        for nonce in self._registered:
            self._network.regions.pop(nonce, None)
        self._registered.clear()

    def _find(self, source: RegionInfo) -> Memory:
        if self._is_closed:
            raise RegionError("the transport is closed")
        memory = self._network.regions.get(source.handle)
        if source.road != self.road or memory is None:
            raise RegionError(f"loopback: no such region on this network (road {source.road!r})")
        if memory.nonce != source.nonce or memory.num_bytes != source.num_bytes:
            raise RegionError("loopback: another region than the one described")
        return memory


def _carry_out(source: Memory, copies: Sequence[Copy], target: Memory) -> None:
    for copy in copies:
        target.view[copy.target_offset : copy.target_offset + copy.num_bytes] = source.view[
            copy.source_offset : copy.source_offset + copy.num_bytes
        ]


def _flip_byte(copies: Sequence[Copy], target: Memory, offset: int) -> None:
    for copy in copies:
        if offset < copy.num_bytes:
            target.view[copy.target_offset + offset] ^= 0xFF
            return
        offset -= copy.num_bytes
