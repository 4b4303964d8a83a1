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

from engine.memory.checksums import ALGORITHMS, Algorithm, BlockChecksums
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
class PeerPool:
    """A peer's pool, as it described it."""

    layout: RegionLayout
    algorithm: Algorithm


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

    def understand(self, described: RegionsDescribed) -> PeerPool:
        """Return the pool that the peer described, if its blocks can be pulled into ours.

        Raises:
            RegionError: the blocks are of another size, or their checksums of an algorithm that we do not have.
        """
        layout = RegionLayout(described.num_blocks, self._layout.block_bytes, described.has_generations)
        algorithm = next((name for name in ALGORITHMS if name == described.checksum), None)
        if algorithm is None:
            raise RegionError(f"checksum {described.checksum!r}; wanted one of {', '.join(ALGORITHMS)}")
        for region in described.regions:
            if described.num_blocks < 1 or region.num_bytes != layout.num_bytes:
                raise RegionError(
                    f"road {region.road}: a region of {region.num_bytes} bytes for {described.num_blocks} blocks, "
                    f"wanted {layout.num_bytes} bytes: blocks of {layout.block_bytes}"
                )
        return PeerPool(layout, algorithm)

    async def pull(
        self, link: Link, peer: PeerPool, pairs: Sequence[Pair], on_progress: Callable[[], None]
    ) -> PullOutcome:
        """Bring each pair's block here, and verify it. What came damaged is asked for once more.

        `on_progress` is called for each block that came, from any thread.
        """
        bad_ids = [location.block_id for location, _ in pairs if not 0 <= location.block_id < peer.layout.num_blocks]
        if bad_ids:
            logger.warning("a handoff names block %d of a pool of %d", bad_ids[0], peer.layout.num_blocks)
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
        self, link: Link, peer: PeerPool, pairs: Sequence[Pair], on_progress: Callable[[], None]
    ) -> tuple[PullOutcome, list[Pair]]:
        """Pull the pairs; return what did not come, and the pairs that came with another checksum."""
        if not pairs:
            return PullOutcome(), []
        num_bytes = peer.layout.block_bytes
        copies = [
            Copy(peer.layout.block_offset(location.block_id), self._layout.block_offset(target), num_bytes)
            for location, target in pairs
        ]
        found: dict[int, int] = {}  # position -> checksum
        targets = [target for _, target in pairs]
        is_hashed_at_once = peer.algorithm == "xxh3_64" and self._memory.is_host

        def take(position: int) -> None:  # on the road's thread, while the bytes are in the cache
            on_progress()
            if is_hashed_at_once:
                found[position] = self._checksums.hash_block(targets[position])

        error: TransferError | None = None
        pulled: Pulled | None = None
        try:
            pulled = await self._roads.pull(link, copies, self._memory, take, found.clear)
        except TransferError as failure:
            error = failure
        if error is None and not is_hashed_at_once:
            found = dict(enumerate(await asyncio.to_thread(self._checksums.compute, targets, peer.algorithm)))
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

    async def _reused(self, link: Link, peer: PeerPool, damaged: Sequence[Pair]) -> frozenset[int]:
        """Return the indexes of the blocks that their owner uses for something else by now, as far as can be told."""
        if not peer.layout.has_generations or not self._memory.is_host:
            return frozenset()
        generations = Memory.allocate(GENERATION_BYTES * len(damaged))
        copies = [
            Copy(peer.layout.generation_offset(location.block_id), position * GENERATION_BYTES, GENERATION_BYTES)
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
