"""Pulls published blocks into the own pool and verifies them: read path step 6.

A block counts only if its bytes, as they lie here, have the checksum that was published. Everything else is bad: it is
computed instead, and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from engine.memory.checksums import BlockChecksums
from kvcache.locations import Locations, unpack_locations
from kvcache.region import GENERATION_BYTES, RegionLayout
from messages.handoff import RegionsDescribed
from transport.memory import Memory
from transport.protocol import Copies, Copy, Link, RegionError, RegionMemory, TransferError
from transport.roads import Pulled, Roads

logger = logging.getLogger(__name__)

#: Why a block was not used: its owner reused it; it came damaged; it did not come; what was described is not there.
Rejection: TypeAlias = Literal["generation", "checksum", "transfer", "refused"]
REJECTIONS: tuple[Rejection, ...] = get_args(Rejection)


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """`bad`: indexes of blocks that must not be used. For `quarantine_s` late bytes may land in their targets."""

    bad: frozenset[int] = frozenset()
    quarantine_s: float = 0.0
    #: how the bytes came, where they all came; no part of what must be done about it
    pulled: Pulled | None = field(default=None, compare=False)
    damaged: frozenset[int] = field(default=frozenset(), compare=False)  #: of the bad ones, those with another checksum

    @classmethod
    def nothing(cls, blocks: bytes) -> Self:
        """Return the outcome of a pull of these blocks, packed, of which none came."""
        return cls(_indexes(unpack_locations(blocks)))


class BlockPuller:
    """Moves blocks from peers' pools into the own one."""

    def __init__(self, layout: RegionLayout, memory: RegionMemory, checksums: BlockChecksums, roads: Roads) -> None:
        """Pull into `memory`, the region that `layout` describes; `checksums` are of its blocks."""
        self.block_bytes = layout.block_bytes
        self.memory = memory
        self.checksums = checksums
        self._layout = layout
        self._roads = roads
        self.num_failed = 0  #: pulls that did not end well
        self.num_rejected: Counter[Rejection] = Counter()

    def understand(self, described: RegionsDescribed) -> RegionLayout:
        """Return the layout of the pool that the peer described, if its blocks can be pulled into ours.

        Raises:
            RegionError: the blocks are of another size.
        """
        layout = RegionLayout(described.num_blocks, self._layout.block_bytes, described.has_generations)
        for region in described.regions:
            if described.num_blocks < 1 or region.num_bytes != layout.num_bytes:
                raise RegionError(
                    f"road {region.road}: a region of {region.num_bytes} bytes for {described.num_blocks} blocks, "
                    f"wanted {layout.num_bytes} bytes: blocks of {layout.block_bytes}"
                )
        return layout

    async def pull(
        self, link: Link, peer: RegionLayout, blocks: bytes, targets: Sequence[int], on_progress: Callable[[], None]
    ) -> PullOutcome:
        """Bring blocks, packed, into those of the own pool with the ids `targets`, one for each, and verify them.

        What came damaged is asked for once more. `on_progress` is called for each block that came, from any thread.
        """
        rows, into = unpack_locations(blocks), np.array(targets, np.int64)
        strangers = rows["block_id"][rows["block_id"] >= peer.num_blocks]
        if len(strangers):
            logger.warning("a handoff names block %d of a pool of %d", strangers[0], peer.num_blocks)
            return self._reject(rows, "refused")
        outcome, is_damaged = await self._pull_once(link, peer, rows, into, on_progress)
        if is_damaged.any():
            rows, into = rows[is_damaged], into[is_damaged]
            is_reused = await self._is_reused(link, peer, rows)
            reused = _indexes(rows[is_reused])
            self.num_rejected["generation"] += len(reused)
            self.num_rejected["checksum"] += len(rows) - len(reused)
            if len(reused) < len(rows) and outcome.pulled is not None:
                self._roads.distrust(link, outcome.pulled.road)
            rows, into = rows[~is_reused], into[~is_reused]
            again, is_damaged = await self._pull_once(link, peer, rows, into, on_progress)
            damaged = _indexes(rows[is_damaged])
            self.num_rejected["checksum"] += len(damaged)
            bad = outcome.bad | reused | again.bad | damaged
            outcome = PullOutcome(bad, max(outcome.quarantine_s, again.quarantine_s), outcome.pulled, damaged)
        return outcome

    async def _pull_once(
        self,
        link: Link,
        peer: RegionLayout,
        rows: Locations,
        into: npt.NDArray[np.int64],
        on_progress: Callable[[], None],
    ) -> tuple[PullOutcome, npt.NDArray[np.bool_]]:
        """Pull blocks; return what did not come, and which came with another checksum, `[len(rows)]`."""
        has_come = np.zeros(len(rows), bool)
        if not len(rows):
            return PullOutcome(), has_come
        checksums = np.zeros(len(rows), np.uint64)
        is_hashed = np.zeros(len(rows), bool)
        copies = Copies.of_equal(
            peer.block_offsets(rows["block_id"]), self._layout.block_offsets(into), peer.block_bytes
        )

        def take(position: int, checksum: int | None = None, /) -> None:  # on the road's thread
            on_progress()
            if checksum is None and self.memory.is_host:
                (checksum,) = self.checksums.compute([into[position]])  # now, while it is in the cache
            if checksum is not None:
                checksums[position] = checksum  # of the bytes that the road itself wrote, where it says so
                is_hashed[position] = True
            has_come[position] = True

        def forget() -> None:  # another road does all over
            has_come.fill(False)
            is_hashed.fill(False)

        if not self.checksums.are_steps_done():
            await asyncio.to_thread(self.checksums.await_steps)
        error: TransferError | None = None
        pulled: Pulled | None = None
        try:
            pulled = await self._roads.pull(link, copies, self.memory, take, forget)
        except TransferError as failure:
            error = failure
        if error is not None:
            logger.warning("pull of %d blocks failed: %s", len(rows), error.message)
            self.num_failed += 1
            if error.quarantine_s > 0:  # what is late may land in blocks that came before, too
                has_come[:] = False
        lacking = has_come & ~is_hashed
        if lacking.any():  # in a device's memory: there many are hashed at once, beside the steps
            checksums[lacking] = await asyncio.to_thread(self.checksums.compute, into[lacking].tolist())
        is_damaged = has_come & (checksums != rows["checksum"])
        if has_come.all():
            return PullOutcome(pulled=pulled), is_damaged
        outcome = self._reject(rows[~has_come], "refused" if isinstance(error, RegionError) else "transfer")
        return PullOutcome(outcome.bad, 0.0 if error is None else error.quarantine_s), is_damaged

    async def _is_reused(self, link: Link, peer: RegionLayout, rows: Locations) -> npt.NDArray[np.bool_]:
        """Tell which blocks their owner uses for something else by now, as far as can be told, `[len(rows)]`."""
        nothing = np.zeros(len(rows), bool)
        if not peer.has_generations:
            return nothing
        generations = Memory.allocate(GENERATION_BYTES * len(rows))
        copies = [
            Copy(peer.generation_offset(block_id), position * GENERATION_BYTES, GENERATION_BYTES)
            for position, block_id in enumerate(rows["block_id"].tolist())
        ]
        try:
            await self._roads.pull(link, copies, generations)
        except TransferError:
            return nothing
        else:
            seen = np.array(generations.view[: GENERATION_BYTES * len(rows)].cast("Q"), np.uint64)
            is_reused: npt.NDArray[np.bool_] = seen != rows["generation"]
            return is_reused
        finally:
            generations.close()

    def _reject(self, rows: Locations, reason: Rejection) -> PullOutcome:
        self.num_rejected[reason] += len(rows)
        return PullOutcome(_indexes(rows))


def _indexes(rows: Locations) -> frozenset[int]:
    return frozenset(rows["index"].tolist())
