"""Blocks on their way up: what is read from a store into the arena, for whom, and what of it came. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.price import LearnedPrices
from messages.tier import Tier
from nodecache.arena import BlockIds
from nodecache.pool import HostPool, Written, as_names
from nodecache.store import StoredBlock
from nodecache.tiers import Found, Tiers

_SIGHTS = 2  #: somebody kept it, and somebody wants it
_SIGHTS_AHEAD = 1  #: somebody kept it; when somebody asks for it that will be counted
_GRACE_S = 1.0  #: by which a store may answer too late
#: A batch takes about so long, and so many times as long as a store needs for any read.
_BATCH_S = 0.02
_FIXED_TIMES = 4.0
_SLOW_READS = 2


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Read blocks of a store into blocks of the arena, in any thread; BlocksRead answers."""

    read_id: int
    tier: Tier
    names: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    deadline_s: float


class Outcome(NamedTuple):
    """What became of a name that somebody waits for."""

    key: str
    position: int  #: in the asker's sequence
    tier: Tier
    block: StoredBlock
    block_id: int | None  #: None: it does not come


@dataclass(slots=True)
class _Wanted:
    """A block that is to be read."""

    found: Found
    index: int  #: in the first asker's sequence, which all prefixes share
    num_sights: int
    askers: dict[str, None] = field(default_factory=dict)
    is_reading: bool = False


@dataclass(slots=True)
class _Read:
    tier: Tier
    wanted: list[tuple[bytes, _Wanted]]
    block_ids: BlockIds
    began_s: float
    late_s: float  #: from then on it is overdue
    is_overdue: bool = False


class Reading:
    """All reads of one node cache. Whoever waits is known by a key; each name is read once, for all who want it.

    Askers take turns, a batch each, and those who only will ask come last; so many batches of a store are read at a
    time, and no more of the arena is bound by them. A store that lets a read hang is given fewer.
    """

    def __init__(self, pool: HostPool, tiers: Tiers, batch_blocks: int, max_reads: int, deadline_s: float) -> None:
        """Read into `pool`: `batch_blocks` or fewer at a time, `max_reads` batches of a store, within `deadline_s`."""
        self._pool = pool
        self._tiers = tiers
        self._batch_blocks = batch_blocks
        self._max_reads = max_reads
        self._deadline_s = deadline_s
        self._prices = {
            entry.tier: LearnedPrices(2) for entry in tiers.all
        }  # of a read: blocks, 1; all is laid to blocks at first
        self._ended_s: dict[Tier, float] = {}  # the last read
        self._wanted: dict[bytes, _Wanted] = {}
        self._queues: Mapping[Tier, OrderedDict[str, deque[bytes]]] = {entry.tier: OrderedDict() for entry in tiers.all}
        self._ahead: set[str] = set()  # keys of those who only will ask
        self._reads: dict[int, _Read] = {}
        self._ids = count()
        self.num_read = dict.fromkeys(self._queues, 0)  #: blocks, by tier
        self.num_lost = dict.fromkeys(self._queues, 0)  #: blocks that did not come, by tier
        self.num_without_room = 0

    @property
    def num_waiting(self) -> int:
        """Blocks that are being read or will be."""
        return len(self._wanted)

    @property
    def num_bound(self) -> int:
        """Blocks of the arena that stores read into."""
        return sum(len(read.block_ids) for read in self._reads.values())

    def is_reading(self, name: bytes) -> bool:
        """Tell whether a block is on its way."""
        wanted = self._wanted.get(name)
        return wanted is not None and wanted.is_reading

    def want(
        self, key: str, blocks: Sequence[tuple[bytes, int]], now_s: float, *, is_ahead: bool = False
    ) -> set[bytes]:
        """Note that blocks (name, index), none of them in the arena, are wanted in this order; which will be read.

        Those that no store has are not. `is_ahead`: they will be asked for, and are not waited for yet.
        """
        awaited: set[bytes] = set()
        num_sights = _SIGHTS_AHEAD if is_ahead else _SIGHTS
        if is_ahead:
            self._ahead.add(key)
        for name, index in blocks:
            wanted = self._wanted.get(name)
            if wanted is None:
                found = self._tiers.find(name, now_s)
                if found is None:
                    continue
                wanted = self._wanted[name] = _Wanted(found, index, num_sights)
            wanted.askers[key] = None
            awaited.add(name)
            if not wanted.is_reading:
                wanted.num_sights = max(wanted.num_sights, num_sights)
                self._queues[wanted.found.tier].setdefault(key, deque()).append(name)
        return awaited

    def forget(self, key: str, names: Iterable[bytes]) -> None:
        """Note that nobody waits for `names` under `key` any more. What is being read for it is kept all the same."""
        self._ahead.discard(key)
        for queue in self._queues.values():
            queue.pop(key, None)
        for name in names:
            wanted = self._wanted.get(name)
            if wanted is not None:
                wanted.askers.pop(key, None)
                if not wanted.askers and not wanted.is_reading:
                    del self._wanted[name]

    def begin(self, now_s: float) -> tuple[list[ReadBlocks], list[Outcome]]:
        """Begin as many reads as may run; blocks without room in the arena, or of a store that failed, do not come."""
        instructions: list[ReadBlocks] = []
        outcomes: list[Outcome] = []
        for tier, queue in self._queues.items():
            running = [read for read in self._reads.values() if read.tier == tier]
            num_running = len(running)
            has_hung = num_running >= self._max_reads and all(read.is_overdue for read in running)
            is_usable = self._tiers[tier].is_usable(now_s) and not has_hung
            # Of a slow store one more than is being read: what is wanted first would not come first.
            is_slow = self._num_at_once(tier) < self._batch_blocks
            num_hung = sum(read.is_overdue for read in running)
            limit = min(self._max_reads, _SLOW_READS + num_hung) if is_slow else self._max_reads
            while queue and (num_running < limit or not is_usable):
                batch = self._next_batch(tier, queue)
                if not batch:
                    continue
                if not is_usable:
                    for name, wanted in batch:
                        outcomes += self._outcomes(name, wanted, None, now_s)
                    continue
                read, without_room = self._begin(tier, batch, now_s)
                outcomes += without_room
                if read is not None:
                    instructions.append(read)
                    num_running += 1
        return instructions, outcomes

    def end(self, read_id: int, arrived: Sequence[bool] | None, now_s: float) -> tuple[list[Outcome], BlockIds]:
        """Take in what a store answered (None: an error). The blocks, committed ones pinned once: unpin them at last.

        What did not come is asked of the next store that has it, if there is one.
        """
        read = self._reads.pop(read_id)
        entry = self._tiers[read.tier]
        came = np.array(arrived if arrived is not None else [False] * len(read.wanted), bool)
        if arrived is None and not read.is_overdue:
            entry.on_failed(now_s)
        if arrived is not None:
            entry.on_worked()
            # Since the one before it came: a disk serves those that run beside each other one after the other.
            elapsed_s = now_s - max(read.began_s, self._ended_s.get(read.tier, 0.0))
            self._prices[read.tier].observe((float(len(read.wanted)), 1.0), max(1e-6, elapsed_s))
            self._ended_s[read.tier] = now_s
            lost = [name for (name, _), is_there in zip(read.wanted, arrived, strict=True) if not is_there]
            entry.on_changed([], [name for name in lost if entry.store.find(name) is None])
            # Others may have written a block anew meanwhile, with other bytes: which came, nobody knows.
            now = [entry.store.find(name) for name, _ in read.wanted]
            came &= [
                block is None or block.checksum == wanted.found.block.checksum
                for (_, wanted), block in zip(read.wanted, now, strict=True)
            ]
        kept = self._commit(read, came, now_s)
        outcomes: list[Outcome] = []
        for (name, wanted), block_id in zip(read.wanted, kept, strict=True):
            if block_id is None:
                self.num_lost[read.tier] += 1
            if not read.is_overdue:
                outcomes += self._outcomes(name, wanted, block_id, now_s)
        return outcomes, np.array([block_id for block_id in kept if block_id is not None], np.int32)

    def give_up(self, now_s: float) -> list[Outcome]:
        """Stop waiting for reads whose store does not answer; their blocks stay bound until it does."""
        outcomes: list[Outcome] = []
        for read in self._reads.values():
            if now_s >= read.late_s and not read.is_overdue:
                read.is_overdue = True
                self._tiers[read.tier].on_failed(now_s)
                for name, wanted in read.wanted:
                    outcomes += self._outcomes(name, wanted, None, now_s)
        return outcomes

    def _num_at_once(self, tier: Tier) -> int:
        """Return how many blocks to read together: whoever asks goes on with what has come, while more is read."""
        block_s, fixed_s = self._prices[tier].prices
        if block_s <= 0:
            return self._batch_blocks
        return min(self._batch_blocks, int(max(_BATCH_S, _FIXED_TIMES * fixed_s) / block_s) + 1)

    def _next_batch(self, tier: Tier, queue: OrderedDict[str, deque[bytes]]) -> list[tuple[bytes, _Wanted]]:
        """Take the next blocks of whose turn it is, all of one tenant."""
        num_blocks = self._num_at_once(tier)
        key = next((key for key in queue if key not in self._ahead), next(iter(queue)))
        names = queue.pop(key)
        batch: dict[bytes, _Wanted] = {}
        while names and len(batch) < num_blocks:
            name = names.popleft()
            wanted = self._wanted.get(name)
            if wanted is None or wanted.is_reading:
                continue
            if any(wanted.found.block.tenant != first.found.block.tenant for first in islice(batch.values(), 1)):
                names.appendleft(name)
                break
            batch[name] = wanted
        if names:
            queue[key] = names
        return list(batch.items())

    def _begin(
        self, tier: Tier, batch: list[tuple[bytes, _Wanted]], now_s: float
    ) -> tuple[ReadBlocks | None, list[Outcome]]:
        index = np.array([wanted.index for _, wanted in batch])
        num_sights = np.array([wanted.num_sights for _, wanted in batch])
        levels = self._pool.worth.levels(index, num_sights, np.zeros_like(index))
        block_ids = self._pool.take(levels.tolist(), now_s, batch[0][1].found.block.tenant)
        outcomes: list[Outcome] = []
        for name, wanted in batch[len(block_ids) :]:
            self.num_without_room += 1
            outcomes += self._told(name, wanted, None)
        batch = batch[: len(block_ids)]
        if not batch:
            return None, outcomes
        for _, wanted in batch:
            wanted.is_reading = True
        read_id = next(self._ids)
        self._reads[read_id] = _Read(tier, batch, block_ids, now_s, now_s + self._deadline_s + _GRACE_S)
        names = tuple(name for name, _ in batch)
        return ReadBlocks(read_id, tier, names, tuple(block_ids.tolist()), self._deadline_s), outcomes

    def _commit(self, read: _Read, came: npt.NDArray[np.bool_], now_s: float) -> list[int | None]:
        """Commit what came and free the rest; which block each name has now, pinned."""
        here = [pair for pair, is_there in zip(read.wanted, came, strict=True) if is_there]
        blocks = [wanted.found.block for _, wanted in here]
        written = Written(
            read.block_ids[came],
            as_names(b"".join(name for name, _ in here)),
            np.array([block.checksum for block in blocks], np.uint64),
            np.array([block.num_tokens for block in blocks], np.uint32),
            np.array([wanted.index for _, wanted in here], np.uint32),
        )
        num_sights = np.array([wanted.num_sights for _, wanted in here], np.uint32)
        is_new = self._pool.commit(written, num_sights, now_s)
        self._pool.give_back(np.concatenate([read.block_ids[~came], written.block_ids[~is_new]]))
        self.num_read[read.tier] += len(here)
        # A worker wrote the same block meanwhile: that one will do.
        others = self._pool.find(written.names[~is_new].tobytes())
        self._pool.pin(others)
        kept = np.full(len(came), -1, np.int32)
        came_at = np.flatnonzero(came)
        kept[came_at] = written.block_ids
        kept[came_at[~is_new]] = others
        return [block_id if block_id >= 0 else None for block_id in kept.tolist()]

    def _outcomes(self, name: bytes, wanted: _Wanted, block_id: int | None, now_s: float) -> list[Outcome]:
        if block_id is None and wanted.askers:
            found = self._tiers.find(name, now_s, below=wanted.found.tier)
            if found is not None:
                again = self._wanted[name] = _Wanted(found, wanted.index, wanted.num_sights, wanted.askers)
                for key in again.askers:
                    self._queues[found.tier].setdefault(key, deque()).append(name)
                return []
        return self._told(name, wanted, block_id)

    def _told(self, name: bytes, wanted: _Wanted, block_id: int | None) -> list[Outcome]:
        if self._wanted.get(name) is wanted:
            del self._wanted[name]
        return [Outcome(key, wanted.index, wanted.found.tier, wanted.found.block, block_id) for key in wanted.askers]

    def check_invariants(self) -> Iterator[str]:
        """Yield what does not hold."""
        for read_id, read in self._reads.items():
            if len(read.wanted) != len(read.block_ids):
                yield f"read {read_id} has {len(read.wanted)} names and {len(read.block_ids)} blocks"
        queued = {name for queue in self._queues.values() for names in queue.values() for name in names}
        for name, wanted in self._wanted.items():
            if not wanted.is_reading and name not in queued:
                yield f"{name.hex()} is wanted and neither read nor queued"
