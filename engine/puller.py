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
from typing import Literal, TypeAlias, get_args

from engine.memory.checksums import BlockChecksums
from kvcache.region import GENERATION_BYTES, RegionLayout
from messages.handoff import BlockLocation, RegionsDescribed
from transport.memory import Memory
from transport.protocol import Copy, Link, RegionError, RegionMemory, TransferError
from transport.roads import Pulled, Roads

logger = logging.getLogger(__name__)

#: Why a block was not used: its owner reused it; it came damaged; it did not come; what was described is not there.
Rejection: TypeAlias = Literal["generation", "checksum", "transfer", "refused"]
REJECTIONS: tuple[Rejection, ...] = get_args(Rejection)

#: A location with the block of the own pool that it goes to.
Pair: TypeAlias = tuple[BlockLocation, int]


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """`bad`: indexes of blocks that must not be used. For `quarantine_s` late bytes may land in their targets."""

    bad: frozenset[int] = frozenset()
    quarantine_s: float = 0.0
    #: how the bytes came, where they all came; no part of what must be done about it
    pulled: Pulled | None = field(default=None, compare=False)


class BlockPuller:
    """Moves blocks from peers' pools into the own one."""

    def __init__(self, layout: RegionLayout, memory: RegionMemory, checksums: BlockChecksums, roads: Roads) -> None:
        """Pull into `memory`, the region that `layout` describes; `checksums` are of its blocks."""
        self.block_bytes = layout.block_bytes
        self._layout = layout
        self._memory = memory
        self._checksums = checksums
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
        self, link: Link, peer: RegionLayout, pairs: Sequence[Pair], on_progress: Callable[[], None]
    ) -> PullOutcome:
        """Bring each pair's block here, and verify it. What came damaged is asked for once more.

        `on_progress` is called for each block that came, from any thread.
        """
        bad_ids = [location.block_id for location, _ in pairs if not 0 <= location.block_id < peer.num_blocks]
        if bad_ids:
            logger.warning("a handoff names block %d of a pool of %d", bad_ids[0], peer.num_blocks)
            return self._reject(pairs, "refused")
        outcome, damaged = await self._pull_once(link, peer, pairs, on_progress)
        if damaged:
            reused = await self._reused(link, peer, damaged)
            self.num_rejected["generation"] += len(reused)
            self.num_rejected["checksum"] += len(damaged) - len(reused)
            if len(reused) < len(damaged) and outcome.pulled is not None:
                self._roads.distrust(link, outcome.pulled.road)
            again, still_damaged = await self._pull_once(
                link, peer, [pair for pair in damaged if pair[0].index not in reused], on_progress
            )
            self.num_rejected["checksum"] += len(still_damaged)
            bad = outcome.bad | reused | again.bad | {location.index for location, _ in still_damaged}
            outcome = PullOutcome(bad, max(outcome.quarantine_s, again.quarantine_s), outcome.pulled)
        return outcome

    async def _pull_once(
        self, link: Link, peer: RegionLayout, pairs: Sequence[Pair], on_progress: Callable[[], None]
    ) -> tuple[PullOutcome, list[Pair]]:
        """Pull the pairs; return what did not come, and the pairs that came with another checksum."""
        if not pairs:
            return PullOutcome(), []
        num_bytes = peer.block_bytes
        copies = [
            Copy(peer.block_offset(location.block_id), self._layout.block_offset(target), num_bytes)
            for location, target in pairs
        ]
        found: dict[int, int] = {}  # position -> checksum
        targets = [target for _, target in pairs]

        def take(position: int, checksum: int | None = None, /) -> None:  # on the road's thread
            on_progress()
            if checksum is not None:  # of the bytes that the road itself wrote
                found[position] = checksum
            elif self._memory.is_host:  # now, while they are in the cache
                (found[position],) = self._checksums.compute(targets[position : position + 1])

        error: TransferError | None = None
        pulled: Pulled | None = None
        try:
            pulled = await self._roads.pull(link, copies, self._memory, take, found.clear)
        except TransferError as failure:
            error = failure
        if error is None and not self._memory.is_host:
            found = dict(enumerate(await asyncio.to_thread(self._checksums.compute, targets)))
        if error is not None:
            logger.warning("pull of %d blocks failed: %s", len(pairs), error.message)
            self.num_failed += 1
            if error.quarantine_s > 0:  # what is late may land in blocks that came before, too
                found = {}
        damaged = [pair for i, pair in enumerate(pairs) if i in found and found[i] != pair[0].checksum]
        missing = [pair for i, pair in enumerate(pairs) if i not in found]
        if not missing:
            return PullOutcome(pulled=pulled), damaged
        outcome = self._reject(missing, "refused" if isinstance(error, RegionError) else "transfer")
        return PullOutcome(outcome.bad, 0.0 if error is None else error.quarantine_s), damaged

    async def _reused(self, link: Link, peer: RegionLayout, damaged: Sequence[Pair]) -> frozenset[int]:
        """Return the indexes of the blocks that their owner uses for something else by now, as far as can be told."""
        if not peer.has_generations or not self._memory.is_host:
            return frozenset()
        generations = Memory.allocate(GENERATION_BYTES * len(damaged))
        copies = [
            Copy(peer.generation_offset(location.block_id), position * GENERATION_BYTES, GENERATION_BYTES)
            for position, (location, _) in enumerate(damaged)
        ]
        try:
            await self._roads.pull(link, copies, generations)
            with generations.view.cast("Q") as seen:
                return frozenset(
                    location.index for i, (location, _) in enumerate(damaged) if seen[i] != location.generation
                )
        except TransferError:
            return frozenset()
        finally:
            generations.close()

    def _reject(self, pairs: Sequence[Pair], reason: Rejection) -> PullOutcome:
        self.num_rejected[reason] += len(pairs)
        return PullOutcome(frozenset(location.index for location, _ in pairs))
