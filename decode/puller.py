"""Pulls published blocks into the own pool and verifies them: read path step 6.

A block counts only if, after the last of its bytes was copied, its owner's region still says the generation that was
published (kvcache.region). Everything else is bad: it is computed instead, and counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.core import Engine
from kvcache.region import GENERATION_BYTES, RegionLayout
from messages.handoff import BlockLocation, RegionInfo
from transport.memory import Memory
from transport.protocol import Copy, TransferError, Transport

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PullStats:
    """What was pulled so far."""

    num_bytes: int = 0
    busy_s: float = 0.0
    num_failed: int = 0  #: pulls that did not end well
    num_rejected_generation: int = 0  #: blocks that had been reused by their owner
    num_rejected_transfer: int = 0  #: blocks that did not arrive


class BlockPuller:
    """Moves blocks from peers' regions into an engine's pool."""

    def __init__(self, engine: Engine, transport: Transport, timeout_s: float) -> None:
        self._layout = engine.layout
        self._memory = engine.memory
        self._transport = transport
        self._timeout_s = timeout_s
        self.stats = PullStats()

    async def pull(
        self, source: RegionInfo, num_source_blocks: int, pairs: Sequence[tuple[BlockLocation, int]]
    ) -> frozenset[int]:
        """Copy each (location, own block id); the answer is the indexes of the blocks that must not be used."""
        remote = RegionLayout(num_blocks=num_source_blocks, block_bytes=self._layout.block_bytes)
        everything = frozenset(location.index for location, _ in pairs)
        if remote.num_bytes != source.num_bytes or any(
            not 0 <= location.block_id < num_source_blocks for location, _ in pairs
        ):
            logger.warning("a handoff describes a region of %d bytes, wanted %d", source.num_bytes, remote.num_bytes)
            self.stats.num_failed += 1
            self.stats.num_rejected_transfer += len(pairs)
            return everything
        started_s = time.perf_counter()
        copies = [
            Copy(remote.block_offset(location.block_id), self._layout.block_offset(block_id), remote.block_bytes)
            for location, block_id in pairs
        ]
        generations = Memory.allocate(GENERATION_BYTES * len(pairs))
        try:
            await self._transport.pull(source, copies, self._memory, self._timeout_s)
            # Only after the data: a generation that has not moved on by now vouches for every byte before it.
            await self._transport.pull(
                source,
                [
                    Copy(remote.generation_offset(location.block_id), position * GENERATION_BYTES, GENERATION_BYTES)
                    for position, (location, _) in enumerate(pairs)
                ],
                generations,
                self._timeout_s,
            )
            with generations.view.cast("Q") as found:
                bad = frozenset(
                    location.index
                    for position, (location, _) in enumerate(pairs)
                    if found[position] != location.generation
                )
        except TransferError as error:
            logger.warning("pull of %d blocks failed: %s", len(pairs), error.message)
            self.stats.num_failed += 1
            self.stats.num_rejected_transfer += len(pairs)
            return everything
        finally:
            generations.close()
        self.stats.busy_s += time.perf_counter() - started_s
        self.stats.num_bytes += remote.block_bytes * len(pairs)
        self.stats.num_rejected_generation += len(bad)
        return bad
