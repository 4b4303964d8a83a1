"""Which blocks are in which objects, as far as is known here. No IO."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from messages.errors import InvariantError
from nodecache.quotas import Accounts
from nodecache.remote.layout import Record
from nodecache.remote.manifests import REMEMBERED_US, Rows
from nodecache.store import StoredBlock, StorePage

#: What is known of a block beside its name.
_KNOWN = np.dtype(
    [
        ("object", "<u4"),  # a number of our own
        ("position", "<u2"),
        ("codec", "<u1"),
        ("offset", "<u4"),
        ("stored_bytes", "<u4"),
        ("num_tokens", "<u4"),
        ("written_us", "<i8"),
        ("checksum", "<u8"),
        ("tenant", "<u8"),
    ]
)
#: As numpy gives a manifest's row, in the order of `manifests.ROW`.
ManifestRow: TypeAlias = tuple[bytes, bytes, int, int, int, int, bool, int, int, int, int]

_ROWS_AT_A_TIME = 4096  #: a caller who asks waits for no more: some 10 ms


class Place(NamedTuple):
    """Where a block lies."""

    object: bytes  #: its digest
    record: Record


class Changes(NamedTuple):
    """What rows of others made known."""

    stored: list[bytes]
    removed: list[bytes]


class RemoteIndex:
    """Names of blocks to their places, in some 180 bytes a block and 200 an object. Any thread."""

    def __init__(self, accounts: Accounts | None = None) -> None:
        """`accounts`: of the tenants that are counted."""
        self.accounts = Accounts() if accounts is None else accounts
        self._lock = threading.Lock()
        self._known = np.zeros(1024, _KNOWN)
        self._rows: dict[bytes, int] = {}  # of _known, by name
        self._names: list[bytes | None] = [None] * len(self._known)  # the other way round
        self._free = array("I", range(len(self._known)))
        self._digests: dict[int, bytes] = {}  # of objects, by number
        self._numbers: dict[bytes, int] = {}
        self._num_live: dict[int, int] = {}  # blocks that are found in an object, by its number
        self._next_number = 0
        self._stored_bytes = 0
        self._removed_us: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_objects(self) -> int:
        """Objects that hold blocks."""
        return len(self._digests)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all blocks, as they lie in objects, without headers."""
        return self._stored_bytes

    def find(self, name: bytes) -> StoredBlock | None:
        """Return what is known of a block; None where it is not there."""
        with self._lock:
            place = self._place(name)
            return place and place.record.block

    def names(self) -> list[bytes]:
        """Return the names of all blocks."""
        with self._lock:
            return list(self._rows)

    def page(self, cursor: int, max_blocks: int) -> StorePage:
        """Return the blocks from a row on, at most so many of so many rows, and where to go on."""
        with self._lock:
            end = min(max(cursor, 0) + max_blocks, len(self._names))
            found = [(row, name) for row, name in enumerate(self._names[cursor:end], cursor) if name is not None]
            kept = self._known[[row for row, _ in found]]
            columns = (kept[key].tolist() for key in ("num_tokens", "checksum", "tenant"))
            blocks = map(StoredBlock, (name for _, name in found), *columns)
            next_cursor = end if end < len(self._names) else None
            return StorePage(list(blocks), [row for row, _ in found], len(self._rows), next_cursor)

    def places(self, names: Sequence[bytes]) -> list[Place | None]:
        """Say where blocks lie."""
        with self._lock:
            return [self._place(name) for name in names]

    def oldest(self, tenant: int, num_blocks: int, besides: Collection[bytes]) -> list[Place]:
        """Return the places of the tenant's blocks that were written first, at most so many, none in `besides`."""
        with self._lock:
            rows = np.flatnonzero(self._known["tenant"] == np.uint64(tenant))  # some ms with a million blocks
            kept = self._known[rows]
            order = np.lexsort((-kept["position"].astype(np.int64), kept["written_us"]))  # tails before heads
            rows = rows[order[: num_blocks + len(besides)]]
            names = [self._names[row] for row in rows.tolist()]
            places = [self._place(name) for name in names if name is not None and name not in besides]
            return [place for place in places if place is not None][:num_blocks]

    def times(self, names: Iterable[bytes], now_us: int) -> list[int]:
        """Return a time for each of these blocks at which a row of it counts, whatever is known of it: now, or later.

        Clocks of other writers may be ahead.
        """
        with self._lock:
            return [max(now_us, self._last_us(name) + 1) for name in names]

    def apply(self, rows: Rows) -> Changes:
        """Take in rows of a manifest, in any order; what they changed."""
        changes = Changes([], [])
        for begin in range(0, len(rows), _ROWS_AT_A_TIME):
            with self._lock:
                for row in rows[begin : begin + _ROWS_AT_A_TIME].tolist():
                    self._apply(row, changes)
                self._forget_removals()
        return changes

    def drop(self, name: bytes, of: bytes | None = None) -> bool:
        """Forget a block; with `of` only if it lies in that object still. Whether it was there."""
        with self._lock:
            place = self._place(name)
            if place is None or of not in (None, place.object):
                return False
            # What is in a manifest may be read again, with others' rows.
            self._note_removed(name, self._last_us(name))
            self._forget(name)
            return True

    def is_empty(self, digest: bytes) -> bool:
        """Tell whether no block is found in an object any more."""
        with self._lock:
            return digest not in self._numbers

    def check_invariants(self) -> None:
        """Raise InvariantError where the books do not agree."""
        with self._lock:
            counts: dict[int, int] = {}
            for row in self._rows.values():
                number = int(self._known["object"][row])
                counts[number] = counts.get(number, 0) + 1
            used = set(self._rows.values())
            _require(counts == self._num_live, "blocks of objects add up")
            _require(len(used) == len(self._rows) and not used & set(self._free), "every block has a row of its own")
            named = {name: row for row, name in enumerate(self._names) if name is not None}
            _require(named == self._rows and len(self._names) == len(self._known), "rows and names agree")
            _require(len(used) + len(self._free) == len(self._known), "no row is lost")
            _require({digest: n for n, digest in self._digests.items()} == self._numbers, "objects are numbered once")
            _require(set(self._digests) == set(self._num_live), "every object holds a block")
            stored_bytes = int(self._known["stored_bytes"][list(used)].sum())
            _require(stored_bytes == self._stored_bytes, "bytes of blocks add up")
            for tenant in self.accounts.max_blocks:
                num_own = int((self._known["tenant"] == np.uint64(tenant)).sum())
                _require(self.accounts[tenant] == num_own, "what tenants have adds up")

    # ---------------------------------------------------------------------------------------------------- with the lock

    def _place(self, name: bytes) -> Place | None:
        row = self._rows.get(name)
        if row is None:
            return None
        number, position, codec, offset, stored_bytes, num_tokens, _, checksum, tenant = self._known[row].item()
        block = StoredBlock(name, num_tokens, checksum, tenant)
        return Place(self._digests[number], Record(block, position, offset, codec, stored_bytes))

    def _last_us(self, name: bytes) -> int:
        row = self._rows.get(name)
        written_us = -1 if row is None else int(self._known["written_us"][row])
        return max(written_us, self._removed_us.get(name, -1))

    def _apply(self, row: ManifestRow, changes: Changes) -> None:
        name, digest, position, num_tokens, checksum, written_us, is_removed, codec, offset, stored_bytes, tenant = row
        last_us = self._last_us(name)
        is_there = name in self._rows
        if is_removed and written_us >= last_us:
            self._note_removed(name, written_us)
            if is_there:
                self._forget(name)
                changes.removed.append(name)
        elif not is_removed and written_us > last_us:
            if is_there:
                self._forget(name)
            else:
                changes.stored.append(name)
            fields = (position, codec, offset, stored_bytes, num_tokens, written_us, checksum, tenant)
            self._keep(name, digest, fields)

    def _note_removed(self, name: bytes, written_us: int) -> None:
        self._removed_us.pop(name, None)  # and to the end
        self._removed_us[name] = written_us

    def _keep(self, name: bytes, digest: bytes, fields: tuple[int, ...]) -> None:
        number = self._numbers.get(digest)
        if number is None:
            number = self._numbers[digest] = self._next_number
            self._digests[number] = digest
            self._num_live[number] = 0
            self._next_number += 1
        if not self._free:
            num_rows = len(self._known)
            self._known = np.concatenate([self._known, np.zeros(num_rows, _KNOWN)])
            self._names = self._names + [None] * num_rows
            self._free = array("I", range(num_rows, 2 * num_rows))
        row = self._free.pop()
        self._known[row] = (number, *fields)
        self._rows[name] = row
        self._names[row] = name
        self._num_live[number] += 1
        self._stored_bytes += int(self._known["stored_bytes"][row])
        self.accounts.add(int(self._known["tenant"][row]), 1)

    def _forget(self, name: bytes) -> None:
        row = self._rows.pop(name)
        self._names[row] = None
        self._free.append(row)
        self.accounts.add(int(self._known["tenant"][row]), -1)
        self._known["tenant"][row] = 0
        number = int(self._known["object"][row])
        self._stored_bytes -= int(self._known["stored_bytes"][row])
        self._num_live[number] -= 1
        if not self._num_live[number]:
            del self._num_live[number]
            del self._numbers[self._digests.pop(number)]

    def _forget_removals(self) -> None:
        """Forget old removals: oldest first, by when they came."""
        if self._removed_us:
            latest_us = next(reversed(self._removed_us.values()))
            while True:
                name = next(iter(self._removed_us))
                if self._removed_us[name] >= latest_us - REMEMBERED_US:
                    return
                del self._removed_us[name]


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise InvariantError(f"remote index: not true that {what}")
