"""What the store holds and where it lies. No IO, but that the writer closes what nobody reads any more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from messages.errors import InvariantError
from nodecache.disk.files import Files
from nodecache.disk.segment import Segment
from nodecache.quotas import Accounts
from nodecache.store import StoredBlock, StorePage

# A place is one int below 2^60, as is a key: such take 32 bytes of memory each.
_ROW_BITS = 24
_ROW_MASK = (1 << _ROW_BITS) - 1
_KEY_MASK = (1 << 60) - 1
_MAX_USE = (1 << 32) - 1
_COLD_BLOCKS = 256  #: of a tenant at its quota, that are looked for at a time: some ms with a million blocks


class Place(NamedTuple):
    """Where a block lies."""

    segment: Segment
    row: int


class _Use(NamedTuple):
    """Where a block lay, and when it was used last."""

    segment: Segment
    row: int
    use: int


class DiskIndex:
    """Names of blocks to their places, in about 150 bytes a block. Any thread.

    A name's key is 60 bits of it; of two names with one key the index holds one, and answers for the other that it is
    not there: names are compared whole.
    """

    def __init__(self, files: Files, accounts: Accounts) -> None:
        """`accounts`: of the tenants that are counted."""
        self._files = files
        self._lock = threading.Lock()
        self._unpinned = threading.Condition(self._lock)
        self._places: dict[int, int] = {}
        self._segments: dict[int, Segment] = {}
        self._retired: list[Segment] = []  # whose files are deleted, and open still
        self._use = 0
        self.accounts = accounts
        self._cold: dict[int, deque[_Use]] = {}  # of tenants that were at their quota: what goes first

    # ---------------------------------------------------------------------------------------------------- what is there

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Room on disk of all segments."""
        with self._lock:
            return sum(segment.geometry.num_bytes for segment in self._segments.values())

    def __contains__(self, name: bytes) -> bool:
        with self._lock:
            return self._place(name) is not None

    def find(self, name: bytes) -> StoredBlock | None:
        """Return what is known of a block; None where it is not there."""
        with self._lock:
            place = self._place(name)
            return None if place is None else place.segment.block(place.row)

    def names(self) -> list[bytes]:
        """Return the names of all blocks."""
        with self._lock:
            return [segment.name(row) for segment in self._segments.values() for row in segment.live_rows()]

    def page(self, cursor: int, max_blocks: int) -> StorePage:
        """Return the blocks from a place on, in the order of their places, at most so many, and where to go on."""
        blocks: list[StoredBlock] = []
        places: list[int] = []
        with self._lock:
            for segment_id in sorted(self._segments):
                segment, first = self._segments[segment_id], segment_id << _ROW_BITS
                skipped = min(max(0, cursor - first), segment.geometry.num_rows)
                rows = (np.flatnonzero(segment.is_live[skipped:]) + skipped).tolist()
                num_wanted = max_blocks - len(blocks)
                blocks += map(segment.block, rows[:num_wanted])
                places += [first | row for row in rows[:num_wanted]]
                if len(rows) > num_wanted:
                    return StorePage(blocks, places, len(self._places), first | rows[num_wanted])
            return StorePage(blocks, places, len(self._places), None)

    def segments(self) -> list[Segment]:
        """Return all segments, oldest first."""
        with self._lock:
            return list(self._segments.values())

    def live_blocks(self, segment: Segment) -> tuple[list[int], list[bytes], npt.NDArray[np.uint32]]:
        """Return the rows that are in use, their blocks' names, and when each was used last."""
        with self._lock:
            rows = segment.live_rows()
            return rows, [segment.name(row) for row in rows], segment.last_use[rows]

    def coldest(self, tenant: int, num_blocks: int, besides: Collection[bytes]) -> list[bytes]:
        """Return the names of the tenant's least recently used blocks, at most so many, none of them in `besides`.

        Looked for among all of the tenant's for some hundred of them at a time.
        """
        found: list[bytes] = []
        with self._lock:
            for is_new in (False, True):
                if is_new:
                    self._cold[tenant] = self._by_use(tenant, max(4 * num_blocks, _COLD_BLOCKS))
                cold = self._cold.get(tenant, deque())
                while cold and len(found) < num_blocks:
                    segment, row, use = cold.popleft()
                    name = segment.name(row)
                    is_same = bool(segment.is_live[row]) and segment.last_use[row] == use
                    if is_same and name not in besides and name not in found:
                        found.append(name)
        return found

    def _by_use(self, tenant: int, num_blocks: int) -> deque[_Use]:
        """Return the places of the tenant's least recently used blocks, with the lock."""
        parts = []
        for segment in self._segments.values():
            rows = np.flatnonzero(segment.is_live & (segment.tenants == np.uint64(tenant)))
            ids = np.full(len(rows), segment.segment_id)
            parts.append(np.stack([segment.last_use[rows].astype(np.int64), ids, rows], axis=1))
        every = np.concatenate(parts) if parts else np.zeros((0, 3), np.int64)
        first = every[np.argsort(every[:, 0], kind="stable")[:num_blocks]].tolist()
        return deque(_Use(self._segments[segment_id], row, use) for use, segment_id, row in first)

    def places_by_use(self) -> tuple[npt.NDArray[np.uint64], int]:
        """Return segment id and row of every block, [num_blocks, 2], least recently used first, and the use count."""
        with self._lock:
            parts = []
            for segment in self._segments.values():
                rows = np.flatnonzero(segment.is_live).astype(np.uint64)
                ids = np.full(len(rows), segment.segment_id, np.uint64)
                parts.append(np.stack([segment.last_use[rows].astype(np.uint64), ids, rows], axis=1))
            use = self._use
        parts_by_use = np.concatenate(parts) if parts else np.zeros((0, 3), np.uint64)
        return parts_by_use[np.argsort(parts_by_use[:, 0], kind="stable"), 1:], use

    # ------------------------------------------------------------------------------------------------------------ reads

    def touch(self, names: Sequence[bytes]) -> None:
        """Note that these blocks of one chain, head first, were used: the head last, so that tails go before it."""
        with self._lock:
            self._use_places([self._place(name) for name in names])

    def pin(self, names: Sequence[bytes]) -> list[Place | None]:
        """Say where blocks lie, note that they were used, and pin the segment of each until `unpin`."""
        with self._lock:
            places = [self._place(name) for name in names]
            self._use_places(places)
            for place in places:
                if place is not None:
                    place.segment.num_pins += 1
            return places

    def pin_segment(self, segment: Segment) -> None:
        """Keep a segment's file open until `unpin`."""
        with self._lock:
            segment.num_pins += 1

    def unpin(self, segment: Segment, num_pins: int) -> None:
        """Take back pins."""
        with self._lock:
            segment.num_pins -= num_pins
            self._unpinned.notify_all()

    # ---------------------------------------------------------------------------------------------------------- changes

    def add_segment(self, segment: Segment) -> None:
        """Take a segment in whose rows the index does not point to yet."""
        with self._lock:
            self._segments[segment.segment_id] = segment

    def restore(self, segment_ids: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint64]) -> list[Place]:
        """Take in what a scan found, in order of use; return the places of those that had to give way.

        Of two blocks of one name the one that was written first stays: the other is a copy that may have been torn.
        """
        with self._lock:
            displaced = []
            for segment_id, row in zip(segment_ids.tolist(), rows.tolist(), strict=True):
                self._use += 1
                place = Place(self._segments[segment_id], row)
                name = place.segment.name(row)
                other = self._places.get(_key(name))
                if other is not None and other < segment_id << _ROW_BITS | row:
                    displaced.append(place)
                    continue
                later = self._insert(place.segment, row, name)
                if later is not None:
                    displaced.append(later)
            return displaced

    def insert(self, segment: Segment, first_row: int, blocks: Sequence[StoredBlock]) -> list[Place]:
        """Point to blocks of one chain, head first, in consecutive rows; return the places of what gave way to them.

        Only a name of the same key gives way.
        """
        with self._lock:
            displaced = []
            for row, block in enumerate(blocks, first_row):
                segment.put(row, block)
                other = self._insert(segment, row, block.name)
                if other is not None:
                    displaced.append(other)
            return displaced

    def move(self, source: Place, target: Place) -> bool:
        """Point to a block's copy; False where the source is not in use any more."""
        with self._lock:
            if not source.segment.is_live[source.row]:
                return False
            block = source.segment.block(source.row)
            last_use = source.segment.last_use[source.row]
            target.segment.put(target.row, block)
            self._insert(target.segment, target.row, block.name)
            target.segment.last_use[target.row] = last_use
            return True

    def drop(self, name: bytes, of: Place | None = None) -> Place | None:
        """Forget a block and return where it lay; with `of` only if it lies there still."""
        with self._lock:
            place = self._place(name)
            if place is None or of not in (None, place):
                return None
            del self._places[_key(name)]
            self._leave(place)
            return place

    def retire(self, segment: Segment) -> list[bytes]:
        """Forget a segment, whose file is deleted; return the names of the blocks that it still held."""
        with self._lock:
            rows = segment.live_rows()
            names = [segment.name(row) for row in rows]
            for row, name in zip(rows, names, strict=True):
                del self._places[_key(name)]
                self._leave(Place(segment, row))
            del self._segments[segment.segment_id]
            segment.is_retired = True
            self._retired.append(segment)
            return names

    def close_retired(self, timeout_s: float) -> None:
        """Close retired segments, which frees their room, once the reads have ended that they are pinned for."""
        with self._lock:
            self._unpinned.wait_for(lambda: not any(segment.num_pins for segment in self._retired), timeout_s)
            unread = [segment for segment in self._retired if not segment.num_pins]
            self._retired = [segment for segment in self._retired if segment.num_pins]
        for segment in unread:  # without the lock: the disk may take its time
            self._files.close(segment.fd)

    def check_invariants(self) -> None:
        """Raise InvariantError where the books do not agree."""
        with self._lock:
            num_live = 0
            for segment in self._segments.values():
                rows = segment.live_rows()
                num_live += len(rows)
                _require(segment.num_live == len(rows), "counts of live rows add up")
                _require(segment.num_pins >= 0 and not segment.is_retired, "segments are readable")
                _require(
                    all(self._place(segment.name(row)) == (segment, row) for row in rows),
                    "every live row is where its name is found",
                )
            _require(num_live == len(self._places), "every name has one live row")
            for tenant in self.accounts.max_blocks:
                num_own = sum(int((each.is_live & (each.tenants == tenant)).sum()) for each in self._segments.values())
                _require(self.accounts[tenant] == num_own, "what tenants have adds up")

    # ---------------------------------------------------------------------------------------------------- with the lock

    def _place(self, name: bytes) -> Place | None:
        number = self._places.get(_key(name))
        if number is None:
            return None
        segment, row = self._segments[number >> _ROW_BITS], number & _ROW_MASK
        return Place(segment, row) if segment.name(row) == name else None

    def _insert(self, segment: Segment, row: int, name: bytes) -> Place | None:
        key = _key(name)
        number = self._places.get(key)
        displaced = None
        if number is not None:
            displaced = Place(self._segments[number >> _ROW_BITS], number & _ROW_MASK)
            self._leave(displaced)
        self._places[key] = segment.segment_id << _ROW_BITS | row
        segment.is_live[row] = True
        segment.num_live += 1
        segment.last_use[row] = self._use
        self.accounts.add(int(segment.tenants[row]), 1)
        return displaced

    def _leave(self, place: Place) -> None:
        """Note that a row holds nothing any more."""
        segment, row = place
        segment.is_live[row] = False
        segment.num_live -= 1
        self.accounts.add(int(segment.tenants[row]), -1)

    def _use_places(self, places: Sequence[Place | None]) -> None:
        if self._use > _MAX_USE - len(places):  # once in four billion uses: all are equal again
            self._use = 0
            for segment in self._segments.values():
                segment.last_use[:] = 0
        for place in reversed(places):
            self._use += 1
            if place is not None:
                place.segment.last_use[place.row] = self._use


def _key(name: bytes) -> int:
    return int.from_bytes(name[:8], "little") & _KEY_MASK


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise InvariantError(f"disk index: not true that {what}")
