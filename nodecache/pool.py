"""Which block of the arena is whose: the states of kvcache.pool, kept in arrays, as there may be millions of blocks.

    free ---take---> writing ---commit---> pinned ---last unpin---> evictable
      ^               | |                     ^---------- pin ---------'  |
      |-- give back --' '-- quarantine --> quarantined --time--> free     |
      '------------------------ evict (inside take) ----------------------'

At most 160 bytes a block, the arena's record included (`num_bookkeeping_bytes` tells). Names, checksums and the like
lie in the arena's records, so that a successor finds them; who pins what does not: pins end with the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.names import NAME_BYTES
from kvcache.pool import BlockState
from messages.errors import InvariantError
from nodecache.arena import RECORD, Arena, BlockIds, RecordState, as_ids
from nodecache.quotas import Accounts
from nodecache.store import StoredBlock
from nodecache.worth import MAX_PRIORITY, Ghosts, Levels, Worth, heads_last, no_links

Names = npt.NDArray[np.uint64]  #: `[n, 2]`, 16 bytes each

#: Blocks kept by hints that `take` passes over before it gives up: some ms. With half of an arena kept by one tenant,
#: 0.96 of what others wrote found room; with 64 it was half, in the same time (20,000 blocks, 50 a time, 2026-11-29).
_MAX_PASSED: Final = 1024
_NOBODY: Final = -1


class Written(NamedTuple):
    """What is known of blocks that were written: `[n]` each, names `[n, 2]`."""

    block_ids: BlockIds
    names: Names
    checksums: npt.NDArray[np.uint64]
    num_tokens: npt.NDArray[np.uint32]
    indexes: npt.NDArray[np.uint32]  #: positions in the prefix


class HostPool:
    """The bookkeeping of one arena. One thread; `now_s` is CLOCK_MONOTONIC (`time.monotonic`)."""

    def __init__(
        self, arena: Arena, worth: Worth, now_s: float, quarantine_s: float, accounts: Accounts | None = None
    ) -> None:
        """Take in what the arena holds; what its last owner had given out to write is quarantined for so long.

        `accounts`: of the tenants that are counted; of what one has above its quota the least worthy is dropped.
        """
        count = arena.layout.num_blocks
        self.num_blocks = count
        self.arena = arena
        self.worth = worth
        self.ghosts = Ghosts(count)
        self.accounts = Accounts() if accounts is None else accounts
        self.num_evicted_for_quota = 0  #: of those that were evicted, to keep their tenant within its quota
        self.num_taken = self.num_evicted = self.num_dropped = self.num_committed = self.num_duplicates = 0
        self._records: npt.NDArray[Any] = arena.records
        self._levels = Levels(count)
        # Those of each tenant with a quota once more, in an order of their own: which of them goes first.
        limited = list(self.accounts.limited())
        links = no_links(count, len(limited)) if limited else None
        self._own = {
            tenant: Levels(count, links=links, number=number, turn_blocks=self.accounts.max_blocks[tenant])
            for number, tenant in enumerate(limited)
        }
        self._num_own_bytes = 0 if links is None else links.nbytes
        self._num_pins = np.zeros(count, np.int32)
        self._buckets = np.full(1 << (count - 1).bit_length(), _NOBODY, np.int32)  # by name: the first block there
        self._chain = np.full(count, _NOBODY, np.int32)  # the next block of the same bucket
        # Views of the same numbers: one at a time costs half of what it does by numpy.
        self._buckets_view, self._chain_view = self._buckets.data, self._chain.data
        self._pinned_until_s = self._records["pinned_until_s"].data
        self._tenants = self._records["tenant"].data
        self._quarantined: dict[int, float] = {}  # block id -> until when
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

        is_committed = arena.committed()
        is_free = ~is_committed & (self._records["state"] == RecordState.FREE)
        free = np.flatnonzero(is_free).astype(np.int32)
        self._free = np.empty(count, np.int32)  # a stack
        self._num_free = len(free)
        self._free[: len(free)] = free[::-1]
        lost = np.flatnonzero(~is_committed & ~is_free).astype(np.int32)
        arena.renew(lost)
        self._quarantined.update(dict.fromkeys(lost.tolist(), now_s + quarantine_s))
        held = np.flatnonzero(is_committed).astype(np.int32)
        self.num_adopted = len(held)
        self._link(held)
        held = held[np.argsort(self._records["used_s"][held], kind="stable")]
        for chain in np.split(held, np.flatnonzero(np.diff(self._records["used_s"][held])) + 1):
            self._place(chain)  # what was used together, the least recently used first
        for tenant in self._records["tenant"][held].tolist():
            self.accounts.add(tenant, 1)
        for tenant, own in self._own.items():
            self.drop(as_ids(list(islice(own.in_order(), self.accounts.num_over(tenant)))))
        self._removed.clear()  # nobody was told of them

    # --------------------------------------------------------------------------------------------------------- counts

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing, or that nobody uses."""
        return self._num_free + self._levels.num_placed

    @property
    def num_empty(self) -> int:
        """Blocks that hold nothing."""
        return self._num_free

    @property
    def num_quarantined(self) -> int:
        """Blocks that nobody may use for a while."""
        return len(self._quarantined)

    @property
    def num_used(self) -> int:
        """Blocks that are being written, read or held for somebody."""
        return self.num_blocks - self.num_free - self.num_quarantined

    @property
    def num_held(self) -> int:
        """Blocks that have a name."""
        return self.num_adopted + self.num_committed - self.num_evicted - self.num_dropped

    @property
    def num_bookkeeping_bytes(self) -> int:
        """All bytes besides the blocks that grow with their number."""
        arrays = (self._records, self.arena.generations, self._num_pins, self._buckets, self._chain, self._free)
        own_bytes = self._levels.num_bytes + self._num_own_bytes + self.ghosts.num_bytes
        return sum(array.nbytes for array in arrays) + own_bytes

    def state(self, block_id: int) -> BlockState:
        """Return the one state that the block is in."""
        if block_id in self._quarantined:
            return BlockState.QUARANTINED
        if block_id in self._levels:
            return BlockState.EVICTABLE
        if not self._num_pins[block_id]:
            return BlockState.FREE
        is_committed = self._records["state"][block_id] == RecordState.COMMITTED
        return BlockState.PINNED if is_committed else BlockState.WRITING

    # ----------------------------------------------------------------------------------------------------- looking up

    def find(self, names: bytes) -> BlockIds:
        """Return for each of the concatenated names the block that has it, -1 where none has: `[num_names]`."""
        wanted = as_names(names)
        found = np.full(len(wanted), _NOBODY, np.int32)
        at = self._buckets[self._bucket_of(wanted)]
        pending = np.flatnonzero(at >= 0)
        while len(pending):
            blocks = at[pending]
            is_it = (self._records["name"][blocks] == wanted[pending]).all(axis=1)
            found[pending[is_it]] = blocks[is_it]
            pending = pending[~is_it]
            at[pending] = self._chain[at[pending]]
            pending = pending[at[pending] >= 0]
        return found

    def names(self, block_ids: BlockIds) -> list[bytes]:
        """Return the names of committed blocks."""
        joined = self._records["name"][block_ids].tobytes()
        return [joined[i : i + NAME_BYTES] for i in range(0, len(joined), NAME_BYTES)]

    def records(self, block_ids: BlockIds) -> npt.NDArray[Any]:
        """Return copies of the records of blocks, `[n]` RECORD."""
        copies: npt.NDArray[Any] = self._records[block_ids]
        return copies

    def stored_blocks(self, block_ids: BlockIds) -> tuple[StoredBlock, ...]:
        """Return what a store is to keep of committed blocks."""
        rows = self._records[block_ids]
        columns = (rows[key].tolist() for key in ("num_tokens", "checksum", "tenant"))
        return tuple(map(StoredBlock, self.names(block_ids), *columns))

    def num_pins(self, block_ids: BlockIds) -> npt.NDArray[np.int32]:
        """Return how often each of these blocks is pinned."""
        pins: npt.NDArray[np.int32] = self._num_pins[block_ids]
        return pins

    def in_order(self) -> Iterator[int]:
        """Yield the blocks that may be evicted, those that go first first. Nothing may change meanwhile."""
        return self._levels.in_order()

    # ------------------------------------------------------------------------------------------------- a block's life

    def take(self, levels: Sequence[int], now_s: float, tenant: int = 0) -> BlockIds:
        """Take blocks for a tenant to write, each pinned once: as many as there is room for, the first `levels` first.

        `levels`: what each newcomer is worth; it gets an empty block, or that of a block worth no more, beyond the
        tenant's quota only one of its own.
        """
        room = self.accounts.room(tenant)
        num_within = len(levels) if room is None else min(room, len(levels))
        num_empty = min(num_within, self._num_free)
        self._num_free -= num_empty
        empty = self._free[self._num_free : self._num_free + num_empty][::-1]
        evicted = self._evict(levels[num_empty:num_within], now_s, self._levels)
        if num_empty + len(evicted) == num_within < len(levels):
            own = self._evict(levels[num_within:], now_s, self._own[tenant])
            self.num_evicted_for_quota += len(own)
            evicted = np.concatenate([evicted, own])
        self._levels.on_wanted(len(levels))
        if tenant in self._own:
            self._own[tenant].on_wanted(len(levels))
        block_ids = np.concatenate([empty, evicted])
        self.arena.renew(block_ids)
        self._records["tenant"][block_ids] = tenant
        self.accounts.add(tenant, len(block_ids))
        self._num_pins[block_ids] = 1
        self.num_taken += len(block_ids)
        return block_ids

    def commit(self, written: Written, num_sights: npt.NDArray[np.uint32], now_s: float) -> npt.NDArray[np.bool_]:
        """Name written blocks, which stay pinned. False: another block has that name; this one is still being written.

        `num_sights`: `[n]`, how often each was wanted, this time included.
        """
        is_new = self.find(written.names.tobytes()) < 0
        _, first = np.unique(written.names, axis=0, return_index=True)
        is_first = np.zeros_like(is_new)
        is_first[first] = True
        is_new &= is_first
        self.num_duplicates += int((~is_new).sum())
        block_ids = written.block_ids[is_new]
        rows = np.zeros(len(block_ids), RECORD)
        rows["name"] = written.names[is_new]
        rows["checksum"] = written.checksums[is_new]
        rows["num_tokens"] = written.num_tokens[is_new]
        rows["index"] = written.indexes[is_new]
        rows["num_sights"] = num_sights[is_new]
        rows["tenant"] = self._records["tenant"][block_ids]
        rows["used_s"] = now_s
        rows["state"] = RecordState.WRITING
        self._records[block_ids] = rows
        self.arena.commit(block_ids)
        self._link(block_ids)
        self.worth.observe(rows["num_sights"])
        self.num_committed += len(block_ids)
        for name in self.names(block_ids):
            if self._removed.pop(name, _ABSENT) is _ABSENT:
                self._stored[name] = None
        return is_new

    def pin(self, block_ids: BlockIds) -> None:
        """Forbid eviction of committed blocks, once more for each call; no block is given twice."""
        self._displace(block_ids[self._num_pins[block_ids] == 0])
        self._num_pins[block_ids] += 1

    def unpin(self, block_ids: BlockIds, *, are_leaving: bool = False) -> None:
        """Take one pin off committed blocks of a chain; what has none left may be evicted: tails before heads.

        `are_leaving`: they were the next to go, and are again.
        """
        if (self._num_pins[block_ids] < 1).any():
            raise InvariantError("a block is unpinned that is not pinned")
        self._num_pins[block_ids] -= 1
        placed = block_ids[self._num_pins[block_ids] == 0]
        if not are_leaving:
            self._place(placed)
        for block_id in reversed(placed.tolist() if are_leaving else []):
            self._place_one(block_id, 0)

    def see(self, block_ids: BlockIds, now_s: float) -> None:
        """Note that committed blocks were wanted again, and by that are worth more."""
        self._records["used_s"][block_ids] = now_s
        self._records["num_sights"][block_ids] += np.uint32(1)
        self.worth.observe(self._records["num_sights"][block_ids])

    def replace(self, block_ids: BlockIds) -> None:
        """Put those of a chain's blocks that may be evicted where they belong by now: the last to go of their worth."""
        placed = block_ids[self._num_pins[block_ids] == 0]
        self._displace(placed)
        self._place(placed)

    def hint(
        self,
        block_ids: BlockIds,
        priority: int | npt.NDArray[np.int8],
        pinned_until_s: float | npt.NDArray[np.float64],
    ) -> None:
        """Keep committed blocks until then (inf: for good; 0: no longer than others), and value them by `priority`.

        Both for all of them, or `[n]`.
        """
        self._records["priority"][block_ids] = np.clip(priority, -MAX_PRIORITY, MAX_PRIORITY)
        self._records["pinned_until_s"][block_ids] = pinned_until_s
        self.replace(block_ids)

    def num_hinted(self, now_s: float) -> int:
        """Count the blocks that a hint keeps. Looks at all records."""
        return int(np.count_nonzero(self.arena.committed() & (self._records["pinned_until_s"] > now_s)))

    def give_back(self, block_ids: BlockIds) -> None:
        """Free blocks that were taken and that nobody writes into any more."""
        self._require_writing(block_ids)
        self._num_pins[block_ids] = 0
        self._disown(block_ids)
        self._push_empty(block_ids)

    def quarantine(self, block_ids: BlockIds, until_s: float) -> None:
        """Give up blocks that were taken, and into which late bytes may land: nobody gets them before `until_s`."""
        self._require_writing(block_ids)
        self._num_pins[block_ids] = 0
        self._disown(block_ids)
        self._quarantined.update(dict.fromkeys(block_ids.tolist(), until_s))

    def drop(self, block_ids: BlockIds) -> BlockIds:
        """Forget committed blocks that nobody uses, whatever hints say; return those that it did forget."""
        dropped: BlockIds = block_ids[self._num_pins[block_ids] == 0]
        self._displace(dropped)
        self._unname(dropped)
        self._disown(dropped)
        self.num_dropped += len(dropped)
        self.arena.renew(dropped)
        self._push_empty(dropped)
        return dropped

    def release_quarantined(self, now_s: float) -> int:
        """Free the quarantined blocks whose time is over; return how many."""
        ended = [block_id for block_id, until_s in self._quarantined.items() if until_s <= now_s]
        for block_id in ended:
            del self._quarantined[block_id]
        self._push_empty(as_ids(ended))
        return len(ended)

    # --------------------------------------------------------------------------------------------------- what is told

    def snapshot(self) -> bytes:
        """Return all names held, concatenated. Call `take_events` with it, or a change is told twice."""
        return self._records["name"][self.arena.committed()].tobytes()

    def take_events(self) -> tuple[bytes, bytes]:
        """Return the names (stored, removed) since the last call, concatenated; no name is in both."""
        events = (b"".join(self._stored), b"".join(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events

    # ----------------------------------------------------------------------------------------------------- invariants

    def check_invariants(self) -> None:
        """Raise InvariantError where the pool's books do not agree."""
        placed = list(self._levels.in_order())
        empty = self._free[: self._num_free].tolist()
        used = np.flatnonzero(self._num_pins).tolist()
        everyone = sorted([*placed, *empty, *used, *self._quarantined])
        _require(everyone == list(range(self.num_blocks)), "every block is in exactly one state")
        _require(len(placed) == self._levels.num_placed, "the counts add up")
        _require(int(self._num_pins.min()) >= 0, "no negative pins")
        committed = self.arena.committed()
        _require(bool(committed[as_ids(placed)].all()), "what may be evicted is committed")
        _require(not committed[as_ids(empty)].any(), "empty blocks have no name")
        _require(not committed[as_ids(list(self._quarantined))].any(), "quarantined blocks have no name")
        owned = self._records["tenant"][as_ids(sorted({*placed, *used}))].tolist()
        for tenant, limit in self.accounts.max_blocks.items():
            _require(self.accounts[tenant] == owned.count(tenant), "what tenants have adds up")
            _require(limit is None or self.accounts[tenant] <= limit, "no tenant is above its quota")
        for tenant, own in self._own.items():
            ids = sorted(block_id for block_id in placed if self._tenants[block_id] == tenant)
            _require(sorted(own.in_order()) == ids, "a tenant's order has its blocks")
        held = np.flatnonzero(committed)
        found = self.find(self._records["name"][held].tobytes())
        _require(bool((found == held).all()), "names and blocks correspond one to one")
        linked = sum(1 for bucket in self._buckets.tolist() for _ in self._in_bucket(bucket))
        _require(linked == len(held), "what is found is committed")
        _require(bool((self.find(b"".join(self._stored)) >= 0).all()), "what was told stored is held")
        _require(bool((self.find(b"".join(self._removed)) < 0).all()), "what was told removed is not held")

    def _bucket_of(self, names: Names) -> npt.NDArray[np.uint64]:
        return names[:, 0] & np.uint64(len(self._buckets) - 1)

    def _in_bucket(self, block_id: int) -> Iterator[int]:
        while block_id >= 0:
            yield block_id
            block_id = int(self._chain[block_id])

    def _link(self, block_ids: BlockIds) -> None:
        """Let committed blocks be found by their names."""
        buckets = self._bucket_of(self._records["name"][block_ids])
        for block_id, bucket in zip(block_ids.tolist(), buckets.tolist(), strict=True):
            self._chain_view[block_id] = self._buckets_view[bucket]
            self._buckets_view[bucket] = block_id

    def _unlink(self, block_id: int, bucket: int) -> None:
        chain, buckets = self._chain_view, self._buckets_view
        before = buckets[bucket]
        if before == block_id:
            buckets[bucket] = chain[block_id]
        else:
            while chain[before] != block_id:
                before = chain[before]
            chain[before] = chain[block_id]
        chain[block_id] = _NOBODY

    def _levels_of(self, block_ids: BlockIds) -> npt.NDArray[np.int64]:
        rows = self._records[block_ids]
        return self.worth.levels(rows["index"], rows["num_sights"], rows["priority"])

    def _place(self, block_ids: BlockIds) -> None:
        order, levels = heads_last(self._records["index"][block_ids], self._levels_of(block_ids))
        for block_id, worth in zip(block_ids[order].tolist(), levels.tolist(), strict=True):
            self._place_one(block_id, worth)

    def _place_one(self, block_id: int, levels: int) -> None:
        self._levels.place(block_id, levels)
        own = self._own.get(self._tenants[block_id]) if self._own else None
        if own is not None:
            own.place(block_id, levels)

    def _displace(self, block_ids: BlockIds) -> None:
        """Take blocks out of the order in which they go."""
        for block_id in block_ids.tolist():
            self._displace_one(block_id)

    def _displace_one(self, block_id: int) -> None:
        self._levels.remove(block_id)
        own = self._own.get(self._tenants[block_id]) if self._own else None
        if own is not None:
            own.remove(block_id)

    def _evict(self, levels: Sequence[int], now_s: float, order: Levels) -> BlockIds:
        """Evict one block of `order` for each of `levels` that is worth at most that, until there is none."""
        evicted: list[int] = []
        kept: list[int] = []  # by a hint
        for worth in levels:
            lowest = order.lowest()
            while lowest is not None and self._pinned_until_s[lowest[0]] > now_s and len(kept) < _MAX_PASSED:
                self._displace_one(lowest[0])
                kept.append(lowest[0])
                lowest = order.lowest()
            if lowest is None or lowest[1] > worth or len(kept) >= _MAX_PASSED:
                break
            self._displace_one(lowest[0])
            evicted.append(lowest[0])
        self._place(as_ids(kept))
        block_ids = as_ids(evicted)
        self._unname(block_ids)
        self._disown(block_ids)
        self.ghosts.add(self._records["name"][block_ids])
        self.num_evicted += len(evicted)
        return block_ids

    def _unname(self, block_ids: BlockIds) -> None:
        """Let blocks not be found any more."""
        buckets = self._bucket_of(self._records["name"][block_ids])
        for block_id, bucket, name in zip(block_ids.tolist(), buckets.tolist(), self.names(block_ids), strict=True):
            self._unlink(block_id, bucket)
            if self._stored.pop(name, _ABSENT) is _ABSENT:
                self._removed[name] = None

    def _disown(self, block_ids: BlockIds) -> None:
        """Count blocks as nobody's any more."""
        for tenant in self._records["tenant"][block_ids].tolist() if self.accounts else ():
            self.accounts.add(tenant, -1)

    def _push_empty(self, block_ids: BlockIds) -> None:
        self.arena.free(block_ids)
        self._free[self._num_free : self._num_free + len(block_ids)] = block_ids
        self._num_free += len(block_ids)

    def _require_writing(self, block_ids: BlockIds) -> None:
        if (self._num_pins[block_ids] != 1).any() or self.arena.committed(block_ids).any():
            raise InvariantError("blocks are given back that nobody took, or that have a name")


_ABSENT = object()


def as_names(names: bytes) -> Names:
    """Return concatenated names as numbers, `[num_names, 2]` uint64; a rest that is no whole name is ignored."""
    return np.frombuffer(names, "<u8", len(names) // NAME_BYTES * 2).reshape(-1, 2)


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise InvariantError(f"host pool: not true that {what}")
