"""Blocks on their way down: which are written to which store, and when. Pure.

By worth: a block that was wanted twice goes down, and before it is evicted at the latest. One that was wanted once goes
down as long as a store has room for it: it would push out what is worth more. Offers never wait for any of this.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import count, islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from messages.tier import Tier
from nodecache.arena import BlockIds, as_ids
from nodecache.pool import HostPool
from nodecache.store import StoredBlock
from nodecache.tiers import Tiers, TierStore

_MAX_QUEUED: Final = 1024  #: chains for each store; beyond it the oldest are left for when they are about to be evicted
_LOOK_AHEAD: Final = 64  #: blocks about to be evicted that are looked at
_LOW_SHARE: Final = 1 / 16  #: of the arena's blocks: with fewer empty ones, blocks are about to be evicted
_GRACE_S: Final = 1.0  #: by which a store may answer too late


class _Chain(NamedTuple):
    """Blocks of a chain, head first: `[n]` each."""

    block_ids: BlockIds
    generations: npt.NDArray[np.uint64]
    are_leaving: bool  #: they are the next to be evicted


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Write blocks of the arena, of one chain, to a store, in any thread; BlocksKept answers."""

    write_id: int
    tier: Tier
    blocks: tuple[StoredBlock, ...]
    block_ids: tuple[int, ...]
    deadline_s: float


@dataclass(slots=True)
class _Write:
    tier: Tier
    names: list[bytes]
    tenants: set[int]
    block_ids: BlockIds
    are_leaving: bool
    late_s: float
    is_overdue: bool = False


class WritingDown:
    """All writes of one node cache to its stores: one batch for each at a time."""

    def __init__(self, pool: HostPool, tiers: Tiers, batch_blocks: int, deadline_s: float) -> None:
        """Write what `pool` holds, `batch_blocks` at a time, each batch within `deadline_s`."""
        self._pool = pool
        self._tiers = tiers
        self._batch_blocks = batch_blocks
        self._deadline_s = deadline_s
        self._queues: dict[Tier, deque[_Chain]] = {entry.tier: deque(maxlen=_MAX_QUEUED) for entry in tiers.all}
        self._writes: dict[int, _Write] = {}
        self._num_evicted = pool.num_evicted
        self._ids = count()
        self.num_written = dict.fromkeys(self._queues, 0)  #: blocks, by tier

    @property
    def num_bound(self) -> int:
        """Blocks of the arena that are being written to stores, each counted for each store."""
        return sum(len(write.block_ids) for write in self._writes.values())

    def offer(self, block_ids: BlockIds) -> None:
        """Note committed blocks of one chain that may be worth writing."""
        if self._queues and len(block_ids):
            chain = block_ids[np.argsort(self._pool.records(block_ids)["index"], kind="stable")]
            for queue in self._queues.values():
                queue.append(_Chain(chain, self._pool.arena.generations[chain], are_leaving=False))

    def begin(self, now_s: float) -> list[WriteBlocks]:
        """Begin the writes that are worth it, one for each store that is idle."""
        busy = {write.tier for write in self._writes.values()}
        self._look_ahead(busy)
        writes: list[WriteBlocks] = []
        for entry in self._tiers.all:
            if entry.tier not in busy and entry.is_usable(now_s):
                chosen = self._choose(entry)
                if len(chosen.block_ids):
                    writes.append(self._begin(entry, chosen, now_s))
        return writes

    def end(self, write_id: int, dropped: list[bytes] | None, now_s: float) -> None:
        """Take in what a store answered: the names that it dropped for these; None: an error."""
        write = self._writes.pop(write_id)
        entry = self._tiers[write.tier]
        self._pool.unpin(write.block_ids, are_leaving=write.are_leaving)
        if dropped is None:
            if not write.is_overdue:
                entry.on_failed(now_s)
            return
        entry.on_worked()
        entry.on_written(write.tenants, dropped)
        kept = [name for name in write.names if entry.store.find(name) is not None]  # others may remove some
        entry.on_changed(kept, dropped)
        self.num_written[write.tier] += len(write.names)

    def give_up(self, now_s: float) -> None:
        """Leave stores alone that do not answer; what they were to write stays pinned until they do."""
        for write in self._writes.values():
            if now_s >= write.late_s and not write.is_overdue:
                write.is_overdue = True
                self._tiers[write.tier].on_failed(now_s)

    def _look_ahead(self, busy: set[Tier]) -> None:
        """Have the blocks that are the next to be evicted written first, if blocks were evicted since the last look."""
        pool = self._pool
        if self._num_evicted == pool.num_evicted or pool.num_empty > pool.num_blocks * _LOW_SHARE:
            return
        self._num_evicted = pool.num_evicted
        next_to_go = as_ids(list(islice(pool.in_order(), _LOOK_AHEAD)))
        for tier, queue in self._queues.items():
            if tier not in busy and len(next_to_go):
                if len(queue) == queue.maxlen:
                    queue.pop()
                queue.appendleft(_Chain(next_to_go, pool.arena.generations[next_to_go], are_leaving=True))

    def _choose(self, entry: TierStore) -> _Chain:
        """Take the next blocks of a chain from the store's queue that are still there, worth it and not stored yet."""
        queue, pool = self._queues[entry.tier], self._pool
        while queue:
            chain = queue.popleft()
            is_wanted = pool.arena.committed(chain.block_ids)
            is_wanted &= pool.arena.generations[chain.block_ids] == chain.generations
            rows = pool.records(chain.block_ids)
            is_wanted &= (rows["num_sights"] > 1) | entry.have_room(rows["tenant"])
            chain = _picked(chain, is_wanted)
            end = self._batch_blocks
            if len(chain.block_ids) > end:
                queue.appendleft(_picked(chain, slice(end, None)))
                chain = _picked(chain, slice(0, end))
            is_new = np.array([entry.store.find(name) is None for name in pool.names(chain.block_ids)], bool)
            if is_new.any():
                return _picked(chain, is_new)
        return _Chain(as_ids([]), np.array([], np.uint64), are_leaving=False)

    def _begin(self, entry: TierStore, chain: _Chain, now_s: float) -> WriteBlocks:
        pool, block_ids = self._pool, chain.block_ids
        blocks = pool.stored_blocks(block_ids)
        pool.pin(block_ids)
        write_id = next(self._ids)
        late_s = now_s + self._deadline_s + _GRACE_S
        self._writes[write_id] = _Write(
            *(entry.tier, [block.name for block in blocks], {block.tenant for block in blocks}),
            *(block_ids, chain.are_leaving, late_s),
        )
        return WriteBlocks(write_id, entry.tier, blocks, tuple(block_ids.tolist()), self._deadline_s)


def _picked(chain: _Chain, which: npt.NDArray[np.bool_] | slice) -> _Chain:
    return _Chain(chain.block_ids[which], chain.generations[which], chain.are_leaving)
