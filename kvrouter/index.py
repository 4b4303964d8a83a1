"""Which worker holds which block: name -> holders, folded from what workers report (write path step c).

Holders of a name are one integer, a bit per column; a worker has one column. Workers evict tails of a prefix before its
heads, so along a prompt's names the set of holders only shrinks, and the longest match of every worker is found by
galloping: tens of probes instead of one per block.

    names      0 1 2 3 4 5 6 7
    worker a   # # # # # # . .      match 6
    worker b   # # . . . . . .      match 2

A worker that left or was cleared stops counting at once; its names are swept out by and by, and its column is used
again only when nothing of it is left. Memory follows what workers hold: about 190 bytes a name with one holder
(benchmarks/router.py, 2026-11-23). Not thread-safe.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from itertools import count

from messages.errors import InvariantError

NAME_BYTES = 16

_BATCH_NAMES = 256
_SWEPT_PER_FOLD = 256  #: besides twice as many as came in, so that sweeping keeps up


class BlockIndex:
    """The names that all workers hold, by name and by worker. One thread."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}  # name -> bits of columns, live or retired; never 0
        self._columns: dict[str, int] = {}  # live worker -> column
        self._workers: dict[int, str] = {}  # column -> live worker
        self._held: dict[int, set[bytes]] = {}  # column, live or retired -> its names
        self._retired: list[int] = []
        self._live = 0  # bits of live columns

    def __len__(self) -> int:
        return len(self._holders)

    def num_held(self, worker_id: str) -> int:
        """Return how many names the worker holds; 0 for one that is unknown."""
        column = self._columns.get(worker_id)
        return 0 if column is None else len(self._held[column])

    def fold(self, worker_id: str, *, cleared: bool = False, stored: bytes = b"", removed: bytes = b"") -> None:
        """Apply one worker's change: `cleared` first, then `stored`, then `removed` (concatenated names).

        Storing what is held and removing what is not are both fine. An unknown worker becomes known.

        Raises:
            ValueError: `stored` or `removed` is no whole number of names; nothing was applied.
        """
        if len(stored) % NAME_BYTES or len(removed) % NAME_BYTES:
            raise ValueError(f"names come in {NAME_BYTES} bytes each: saw {len(stored)} and {len(removed)} bytes")
        if cleared:
            self.drop(worker_id)
        column = self._columns.get(worker_id)
        if column is None:
            column = self._take_column(worker_id)
        self._store(column, stored)
        self._remove(column, removed)
        if self._retired:
            self.sweep(2 * (len(stored) + len(removed)) // NAME_BYTES + _SWEPT_PER_FOLD)

    def drop(self, worker_id: str) -> None:
        """Forget a worker: no match names it any more. Unknown ids are ignored."""
        column = self._columns.pop(worker_id, None)
        if column is not None:
            del self._workers[column]
            self._live &= ~(1 << column)
            self._retired.append(column)

    def sweep(self, max_names: int) -> None:
        """Free at most `max_names` entries of workers that are gone."""
        holders = self._holders
        while self._retired and max_names > 0:
            column = self._retired[-1]
            held = self._held[column]
            others = ~(1 << column)
            num_swept = min(max_names, len(held))
            for _ in range(num_swept):
                name = held.pop()
                bits = holders[name] & others
                if bits:
                    holders[name] = bits
                else:
                    del holders[name]
            max_names -= num_swept
            if not held:
                self._retired.pop()
                del self._held[column]

    def match(self, names: bytes) -> dict[str, int]:
        """Count the leading blocks that each worker holds of a prompt with these concatenated names, zeros left out.

        For a worker that does not hold a prefix without gaps the figure is the end of *some* run of held names: a hint,
        as everything here.
        """
        matches: dict[str, int] = {}
        num_names = len(names) // NAME_BYTES
        get = self._holders.get
        alive = self._live & get(names[:NAME_BYTES], 0)
        held = 0  # all of `alive` hold name number `held`
        while alive:
            begin = held
            step = 1
            while begin + step < num_names:
                at = (begin + step) * NAME_BYTES
                if get(names[at : at + NAME_BYTES], 0) & alive != alive:
                    break
                begin += step
                step *= 2
            end = min(begin + step, num_names)  # all of `alive` hold `begin`; not all of them hold `end`
            while end - begin > 1:
                middle = (begin + end) // 2
                at = middle * NAME_BYTES
                if get(names[at : at + NAME_BYTES], 0) & alive == alive:
                    begin = middle
                else:
                    end = middle
            at = end * NAME_BYTES
            staying = alive & get(names[at : at + NAME_BYTES], 0) if end < num_names else 0
            leaving = alive & ~staying
            while leaving:
                bit = leaving & -leaving
                matches[self._workers[bit.bit_length() - 1]] = end
                leaving ^= bit
            alive, held = staying, end
        return matches

    def check_invariants(self) -> None:
        """Raise InvariantError unless both directions of the index agree."""
        expected: dict[bytes, int] = {}
        for column, held in self._held.items():
            for name in held:
                expected[name] = expected.get(name, 0) | 1 << column
        live = sum(1 << column for column in self._columns.values())
        columns = {column: worker_id for worker_id, column in self._columns.items()}
        if expected != self._holders or live != self._live or columns != self._workers:
            raise InvariantError("block index: names by worker and workers by name differ")
        if sorted([*self._workers, *self._retired]) != sorted(self._held):
            raise InvariantError(f"block index: columns {sorted(self._held)} are neither live nor retired, or both")

    def _take_column(self, worker_id: str) -> int:
        column = next(column for column in count() if column not in self._held)
        self._columns[worker_id] = column
        self._workers[column] = worker_id
        self._held[column] = set()
        self._live |= 1 << column
        return column

    def _store(self, column: int, names: bytes) -> None:
        holders, held, bit = self._holders, self._held[column], 1 << column
        for batch in _split(names):
            held.update(batch)
            if holders.keys().isdisjoint(batch):  # the usual case, at C's speed; one integer object for all of them
                holders.update(dict.fromkeys(batch, bit))
                continue
            for name in batch:
                holders[name] = holders.get(name, 0) | bit

    def _remove(self, column: int, names: bytes) -> None:
        holders, bit = self._holders, 1 << column
        discard = self._held[column].discard
        for batch in _split(names):
            for name in batch:
                bits = holders.get(name, 0)
                if bits & bit:
                    if bits == bit:
                        del holders[name]
                    else:
                        holders[name] = bits ^ bit
                    discard(name)


def _split(names: bytes) -> Iterator[tuple[bytes, ...]]:
    """Split concatenated names, and yield them in batches."""
    batch_bytes = _BATCH_NAMES * NAME_BYTES
    for begin in range(0, len(names), batch_bytes):
        batch = names[begin : begin + batch_bytes]
        yield _unpacker(len(batch) // NAME_BYTES).unpack(batch)


@cache
def _unpacker(num_names: int) -> struct.Struct:
    return struct.Struct(f"{NAME_BYTES}s" * num_names)
