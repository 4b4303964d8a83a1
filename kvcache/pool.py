"""The paged pool's bookkeeping: which block is whose, what it is called, what goes when room is needed.

A block is in exactly one state:

    free ---allocate---> writing ---commit---> committed, pinned ---last unpin---> committed, evictable
      ^                    |  |                       ^-------------- pin --------------'  |
      |--- last unpin -----'  '--- quarantine ---> quarantined ---time---> free            |
      '------------------------------- evict (inside allocate) ----------------------------'

Every operation is O(1) a block. No bytes are touched here, except the generations, which lie in shared memory so that
a peer who copies a block can see that it was reused meanwhile.
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count, islice

import numpy as np
import numpy.typing as npt

from messages.errors import CapacityError, InvariantError


class BlockState(Enum):
    """The one state that a block is in at a time."""

    FREE = "free"
    WRITING = "writing"  #: pinned, without a name
    PINNED = "pinned"  #: committed, in use
    EVICTABLE = "evictable"  #: committed, in nobody's use
    QUARANTINED = "quarantined"  #: late writes may still land in it


@dataclass(slots=True)
class PoolStats:
    """Counters since the pool was made."""

    num_allocated_blocks: int = 0
    num_hit_blocks: int = 0  #: pins of blocks that were already there
    num_committed_blocks: int = 0
    num_duplicate_blocks: int = 0  #: commits under a name that another block had
    num_evicted_blocks: int = 0
    num_evicted_spare_blocks: int = 0  #: of those, copies that other holders keep
    num_quarantined_blocks: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of all blocks handed out that did not have to be written; 0 before the first."""
        total = self.num_hit_blocks + self.num_allocated_blocks
        return self.num_hit_blocks / total if total else 0.0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. One thread.

    `generations` [num_blocks] uint64, written through: `memoryview(...).cast("Q")` over the region, or None for
    memory of its own. They count from `first_generation` (None: a random one, so that a restarted worker repeats none).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        generations: memoryview | None = None,
        *,
        first_generation: int | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvariantError(f"a pool of {num_blocks} blocks of {block_size} tokens; both must be at least 1")
        if generations is not None and len(generations) < num_blocks:
            raise InvariantError(f"{len(generations)} generations for {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.stats = PoolStats()
        self._generations = memoryview(bytearray(8 * num_blocks)).cast("Q") if generations is None else generations
        base = secrets.randbits(62) if first_generation is None else first_generation
        for block_id in range(num_blocks):
            self._generations[block_id] = base
        self._num_pins = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._tenants = [0] * num_blocks  # 0: nobody's in particular, or without a name
        self._by_name: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the last freed is the first reused, still in cache
        self._is_spare = bytearray(num_blocks)  # another holder keeps the block that is committed there
        # Two queues, least recently used first, kept blocks and spare ones, with the time of the last use.
        self._evictable: tuple[OrderedDict[int, float], OrderedDict[int, float]] = (OrderedDict(), OrderedDict())
        self.now_s = 0.0  #: of its owner's clock: as of then blocks that are unpinned count as used
        self._reuse_age_s: float | None = None  # how long blocks lay unused that were used again, the mean of late
        self.reused_share = 0.0  #: of what lay unused and was kept, what was used again and not evicted: of late, too
        self._expected: set[int] = set()  # evictable blocks whose next use is known, and tells nothing of reuse
        self._quarantined: dict[int, float] = {}  # block id -> until when
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    # ---------------------------------------------------------------------------------------------------- counts

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free or evictable."""
        return len(self._free) + self.num_evictable

    @property
    def num_evictable(self) -> int:
        """Committed blocks that nobody uses."""
        return len(self._evictable[0]) + len(self._evictable[1])

    @property
    def num_dispensable(self) -> int:
        """Blocks that are free, or copies that other holders keep."""
        return len(self._free) + len(self._evictable[1])

    @property
    def num_named(self) -> int:
        """Blocks that are committed under a name."""
        return len(self._by_name)

    @property
    def num_quarantined(self) -> int:
        """Blocks that nobody may use for a while."""
        return len(self._quarantined)

    @property
    def num_used(self) -> int:
        """Blocks pinned by somebody."""
        return self.num_blocks - self.num_free - len(self._quarantined)

    def generation(self, block_id: int) -> int:
        """Return the block's generation, which changes before the block's bytes may change, and only then."""
        return self._generations[block_id]

    def generations(self, block_ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        """Do as `generation` for many blocks."""
        seen: npt.NDArray[np.uint64] = np.frombuffer(self._generations, np.uint64)[block_ids]
        return seen

    def name(self, block_id: int) -> bytes | None:
        """Return the name under which the block is committed; None where it has none."""
        return self._names[block_id]

    def tenant(self, block_id: int) -> int:
        """Return whose the block is, 64 bits; 0: nobody's in particular, or it has no name."""
        return self._tenants[block_id]

    def num_blocks_by_tenant(self) -> Counter[int]:
        """Count the blocks of each tenant; what is nobody's is left out. Looks at all blocks: 3 ms for 100,000."""
        counts = Counter(self._tenants)
        del counts[0]
        return counts

    def num_pins(self, block_id: int) -> int:
        """Return how many times the block is pinned."""
        return self._num_pins[block_id]

    def state(self, block_id: int) -> BlockState:
        """Return the one state that the block is in."""
        if block_id in self._quarantined:
            return BlockState.QUARANTINED
        if self._names[block_id] is None:
            return BlockState.WRITING if self._num_pins[block_id] else BlockState.FREE
        return BlockState.PINNED if self._num_pins[block_id] else BlockState.EVICTABLE

    # ------------------------------------------------------------------------------------------------- a block's life

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks to write, each pinned once. What nobody uses is evicted when no block is free.

        Raises:
            CapacityError: fewer than `num_blocks` are free or evictable; nothing changed.
        """
        if num_blocks > self.num_free:
            raise CapacityError(f"{num_blocks} blocks wanted, {self.num_free} of {self.num_blocks} are free")
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._generations[block_id] += 1
            self._num_pins[block_id] = 1
        self.stats.num_allocated_blocks += num_blocks
        return block_ids

    def num_idle(self, most: int) -> int:
        """Count the blocks that can be had without loss, up to `most`: dispensable ones, and those that lay too long.

        Of blocks that lie unused for several times as long as those do that are used again hardly any will be.
        """
        if self._reuse_age_s is None:
            return min(most, self.num_dispensable)
        return self.num_worth_less(self.now_s - _DEAD_AGES * self._reuse_age_s, most)

    def is_dispensable(self, block_id: int) -> bool:
        """Tell whether a committed block is a copy that another holder keeps, and nobody uses."""
        return block_id in self._evictable[1]

    def num_worth_less(self, used_s: float, most: int) -> int:
        """Count the blocks that are worth less than one that was last used at `used_s`, up to `most`."""
        num_older = 0
        for used in islice(self._evictable[0].values(), most):
            if used >= used_s:
                break
            num_older += 1
        return min(most, self.num_dispensable + num_older)

    def match(self, names: Iterable[bytes]) -> list[int]:
        """Find the longest leading run of `names` that is held; its block ids. Pin them before the next `allocate`."""
        block_ids: list[int] = []
        for name in names:
            block_id = self._by_name.get(name)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def holds(self, name: bytes) -> bool:
        """Tell whether a block is committed under `name`."""
        return name in self._by_name

    def find(self, name: bytes) -> int | None:
        """Return the block that is committed under `name`; None where there is none."""
        return self._by_name.get(name)

    def pin(self, block_ids: Sequence[int]) -> None:
        """Forbid eviction, once more for each call, of blocks that `match` gave."""
        idle_s: list[float] = []
        for block_id in block_ids:
            if self._num_pins[block_id] == 0:
                if self._names[block_id] is None:
                    raise InvariantError(f"block {block_id} is {self.state(block_id).value}; only committed ones match")
                used_s = self._evictable[self._is_spare[block_id]].pop(block_id)
                if block_id in self._expected:
                    self._expected.remove(block_id)
                else:
                    idle_s.append(self.now_s - used_s)
            self._num_pins[block_id] += 1
        if idle_s:
            age_s, before_s = max(idle_s), self._reuse_age_s
            self._reuse_age_s = age_s if before_s is None else before_s + _AGE_WEIGHT * (age_s - before_s)
            self._learn_reuse(len(idle_s), is_reused=True)
        self.stats.num_hit_blocks += len(block_ids)

    def unpin(self, block_ids: Sequence[int], used_s: float | None = None) -> None:
        """Take one pin off each block of a chain, given head first.

        What has no pin left is free if it has no name, else it may be evicted: tails before heads. `used_s`: when what
        nobody used here was last used elsewhere; it is the next to go.
        """
        num_pins, names, is_spare, now_s = self._num_pins, self._names, self._is_spare, self.now_s
        for block_id in reversed(block_ids):
            left = num_pins[block_id] - 1
            if left < 0 or block_id in self._quarantined:
                raise InvariantError(f"block {block_id} is {self.state(block_id).value}, not pinned")
            num_pins[block_id] = left
            if left == 0:
                if names[block_id] is None:
                    self._free.append(block_id)
                else:
                    queue = self._evictable[is_spare[block_id]]
                    queue[block_id] = now_s if used_s is None else used_s
                    if used_s is not None:
                        queue.move_to_end(block_id, last=False)

    def expect(self, block_ids: Iterable[int]) -> None:
        """Note that somebody who waits will use these blocks: it is not learned from whether and when that happens."""
        self._expected.update(each for each in block_ids if self.state(each) is BlockState.EVICTABLE)

    def commit(self, block_id: int, name: bytes, tenant: int = 0) -> bool:
        """Do as `commit_all` with one block; tell whether it has the name."""
        return self.commit_all((block_id,), (name,), tenant) == 1

    def commit_all(self, block_ids: Sequence[int], names: Sequence[bytes], tenant: int = 0) -> int:
        """Name written blocks; count those that have their name then.

        Where another block has the name, this one stays unnamed and is freed when unpinned. `tenant`: whose they are,
        64 bits (kvcache.names); 0: nobody's in particular.

        Raises:
            InvariantError: a block is not being written, or has another name; those before it are named.
        """
        num_pins, name_of, by_name = self._num_pins, self._names, self._by_name
        stored, removed = self._stored, self._removed
        num_new = num_duplicate = 0
        for block_id, name in zip(block_ids, names, strict=True):
            before = name_of[block_id]
            if num_pins[block_id] < 1 or (before is not None and before != name):
                raise InvariantError(
                    f"block {block_id} is {self.state(block_id).value}; only a written block gets a name"
                )
            if by_name.setdefault(name, block_id) != block_id:
                num_duplicate += 1
            elif before is None:
                name_of[block_id] = name
                self._tenants[block_id] = tenant
                num_new += 1
                if not removed or removed.pop(name, _ABSENT) is _ABSENT:
                    stored[name] = None
        self.stats.num_committed_blocks += num_new
        self.stats.num_duplicate_blocks += num_duplicate
        return len(block_ids) - num_duplicate

    def mark(self, names: Sequence[bytes], *, is_spare: bool) -> None:
        """Note that other holders keep these blocks, so that the copies here are worth less, or not any more.

        They come head first, where they are of one chain. Names that no block has are ignored; a block that is
        committed counts as kept.
        """
        queue = self._evictable[is_spare]
        for name in reversed(names):  # so that tails stay before heads
            block_id = self._by_name.get(name)
            if block_id is None or self._is_spare[block_id] == is_spare:
                continue
            used = self._evictable[not is_spare].pop(block_id, None)
            self._is_spare[block_id] = is_spare
            if used is not None:
                is_older = used < next(reversed(queue.values()), 0)
                queue[block_id] = used
                if is_older:
                    queue.move_to_end(block_id, last=False)

    def quarantine(self, block_ids: Sequence[int], until_s: float) -> None:
        """Give up blocks that the caller was writing; nobody gets them before `release_quarantined(until_s)`."""
        for block_id in block_ids:
            if self.state(block_id) is not BlockState.WRITING or self._num_pins[block_id] != 1:
                raise InvariantError(
                    f"block {block_id} is {self.state(block_id).value}; only a sole writer gives it up"
                )
            self._num_pins[block_id] = 0
            self._quarantined[block_id] = until_s
        self.stats.num_quarantined_blocks += len(block_ids)

    def release_quarantined(self, now_s: float) -> int:
        """Free the quarantined blocks whose time is over; return how many."""
        if not self._quarantined:
            return 0
        ended = [block_id for block_id, until_s in self._quarantined.items() if until_s <= now_s]
        for block_id in ended:
            del self._quarantined[block_id]
        self._free.extend(ended)
        return len(ended)

    def clear(self) -> int:
        """Evict all blocks that nobody uses; return how many."""
        num_evicted = self.num_evictable
        for _ in range(num_evicted):
            self._free.append(self._evict())
        return num_evicted

    def drop(self, block_ids: Iterable[int]) -> list[int]:
        """Free those of these blocks that are committed and that nobody uses; return which."""
        dropped = [each for each in dict.fromkeys(block_ids) if self.state(each) is BlockState.EVICTABLE]
        for block_id in dropped:
            del self._evictable[self._is_spare[block_id]][block_id]
            self._unname(block_id)
        self._free.extend(dropped)
        return dropped

    def _evict(self) -> int:
        is_spare = bool(self._evictable[1])  # what others keep goes first
        block_id, _ = self._evictable[is_spare].popitem(last=False)
        is_expected = block_id in self._expected
        self._unname(block_id)
        self.stats.num_evicted_blocks += 1
        self.stats.num_evicted_spare_blocks += is_spare
        if not is_spare and not is_expected:
            self._learn_reuse(1, is_reused=False)
        return block_id

    def _unname(self, block_id: int) -> None:
        """Let a block not be found any more."""
        self._is_spare[block_id] = False
        self._expected.discard(block_id)
        name = self._names[block_id]
        if name is None:
            raise InvariantError(f"block {block_id} is evictable without a name")
        self._names[block_id] = None
        self._tenants[block_id] = 0
        del self._by_name[name]
        if self._stored.pop(name, _ABSENT) is _ABSENT:
            self._removed[name] = None

    def _learn_reuse(self, num_blocks: int, *, is_reused: bool) -> None:
        """Learn what became of kept blocks that lay unused; as many as the pool has count."""
        weight = min(1.0, num_blocks / self.num_blocks)
        self.reused_share += weight * (is_reused - self.reused_share)

    # ---------------------------------------------------------------------------------------------------- what is told

    def snapshot(self) -> list[bytes]:
        """Return all names held, oldest commit first. Call `take_events` with it, or a change is told twice."""
        return list(self._by_name)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """Return the names (stored, removed) since the last call, as the difference between then and now.

        No name is in both, so it does not matter in which order a receiver applies them.
        """
        events = (list(self._stored), list(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events

    # ------------------------------------------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        """Raise InvariantError where the pool's books do not agree."""
        evictable = [block_id for queue in self._evictable for block_id in queue]
        groups = (self._free, evictable, list(self._quarantined))
        idle = [block_id for group in groups for block_id in group]
        used = [block_id for block_id in range(self.num_blocks) if self._num_pins[block_id] > 0]
        _require(sorted(idle + used) == list(range(self.num_blocks)), "every block is in exactly one state")
        _require(min(self._num_pins) >= 0, "no negative pins")
        _require(self.num_used == len(used), "the counts add up")
        _require(all(self._names[b] is None for b in self._free), "free blocks have no name")
        _require(self._expected <= set(evictable), "only what nobody uses yet is expected to be used")
        _require(
            all(self._is_spare[b] == is_spare for is_spare in (0, 1) for b in self._evictable[is_spare]),
            "spare blocks wait in the queue of spare ones",
        )
        _require(
            all(self._names[b] is not None for b in range(self.num_blocks) if self._is_spare[b]), "spares are named"
        )
        _require(all(self._names[b] is None for b in self._quarantined), "quarantined blocks have no name")
        _require(
            all(self._names[b] is not None for b in range(self.num_blocks) if self._tenants[b]),
            "blocks without a name are nobody's",
        )
        _require(all(self._names[b] is not None for b in evictable), "evictable blocks have a name")
        named = {name: block_id for block_id, name in zip(count(), self._names) if name is not None}
        _require(named == self._by_name, "names and blocks correspond one to one")
        _require(len(named) == sum(name is not None for name in self._names), "no name is given twice")
        _require(all(name in self._by_name for name in self._stored), "what was told stored is held")
        _require(not any(name in self._by_name for name in self._removed), "what was told removed is not held")


_ABSENT = object()
#: What lay unused for so many times as long as blocks do that are used again will hardly be.
_DEAD_AGES = 8.0
#: Weight of the last hit in the mean age at which blocks are used again.
_AGE_WEIGHT = 0.05


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise InvariantError(f"block pool: not true that {what}")
