"""Which worker holds which block: name -> holders, folded from what workers report (write path step c).

Holders of a name are one integer, a bit per column; a worker has one column for each of its tiers. Along a prompt's
names the holders seldom change: where a block has the same ones as another far behind it, so has, nearly always, what
lies between. So runs of blocks with the same holders are found by galloping: tens of probes instead of one per block.

    names      0 1 2 3 4 5 6 7
    worker a   # # # # . . . .      runs [0, 2) at a and b, [2, 4) at a, [4, 6) at c
    worker b   # # . . . . . .
    worker c   . . . . # # . .

A worker that left or was cleared stops counting at once; its names are swept out by and by, and its column is used
again only when nothing of it is left. Memory follows what workers hold: about 190 bytes a name with one holder
(benchmarks/router.py, 2026-11-23). Not thread-safe.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from messages.errors import InvariantError
from messages.tier import Tier

NAME_BYTES = 16

_BATCH_NAMES = 256
_SWEPT_PER_FOLD = 256  #: besides twice as many as came in, so that sweeping keeps up


class Holder(NamedTuple):
    """A worker that holds a block, and the tier where it has it."""

    worker_id: str
    tier: Tier = "device"


class Run(NamedTuple):
    """Blocks [begin, end) of a prompt have the same holders."""

    begin: int
    end: int
    holders: tuple[Holder, ...]


class Matches(NamedTuple):
    """The runs of a prompt, `num_runs` of them in a row from its head on, as arrays."""

    ends: npt.NDArray[np.int64]  #: `[num_runs]`: block number that each ends before
    is_held: npt.NDArray[np.bool_]  #: `[num_runs, num_columns]`
    holders: Sequence[Holder | None]  #: by column; the same object until they change


class BlockIndex:
    """The names that all workers hold, by name and by worker. One thread."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}  # name -> bits of columns, live or retired; never 0
        self._columns: dict[Holder, int] = {}  # live holder -> column
        self._live_holders: dict[int, Holder] = {}  # the other way round
        self._held: dict[int, set[bytes]] = {}  # column, live or retired -> its names
        self._retired: list[int] = []
        self._live = 0  # bits of live columns
        self._by_column: tuple[Holder | None, ...] | None = None  # made when it is asked for

    def __len__(self) -> int:
        return len(self._holders)

    def num_held(self, worker_id: str) -> int:
        """Return how many names the worker holds; 0 for one that is unknown."""
        return sum(len(self._held[column]) for holder, column in self._columns.items() if holder.worker_id == worker_id)

    def fold(
        self,
        worker_id: str,
        tier: Tier = "device",
        *,
        stored: bytes = b"",
        removed: bytes = b"",
    ) -> list[bytes]:
        """Apply one worker's change of one of its tiers: `stored` first, then `removed`.

        Names are concatenated. Storing what is held and removing what is not are both fine. An unknown worker becomes
        known. The answer names the blocks that others hold, too, and whose holders changed.

        Raises:
            ValueError: `stored` or `removed` is no whole number of names; nothing was applied.
        """
        if len(stored) % NAME_BYTES or len(removed) % NAME_BYTES:
            raise ValueError(f"names come in {NAME_BYTES} bytes each: saw {len(stored)} and {len(removed)} bytes")
        holder = Holder(worker_id, tier)
        column = self._columns.get(holder)
        if column is None:
            column = self._take_column(holder)
        shared = self._store(column, stored)
        shared += self._remove(column, removed)
        if self._retired:
            self.sweep(2 * (len(stored) + len(removed)) // NAME_BYTES + _SWEPT_PER_FOLD)
        return shared

    def drop(self, worker_id: str) -> list[bytes]:
        """Forget a worker and what it holds, in all its tiers: no run names it any more. Unknown ids are ignored.

        The answer names the blocks that others hold, too.
        """
        dropped: list[int] = []
        for holder in [holder for holder in self._columns if holder.worker_id == worker_id]:
            column = self._columns.pop(holder)
            self._by_column = None
            del self._live_holders[column]
            self._live &= ~(1 << column)
            self._retired.append(column)
            dropped.append(column)
        return [name for column in dropped for name in self._held[column] if self._holders[name] & self._live]

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

    def holders(self, name: bytes) -> tuple[Holder, ...]:
        """Return who holds this block."""
        return self._named(self._live & self._holders.get(name, 0))

    def runs(self, names: bytes) -> list[Run]:
        """Divide a prompt with these concatenated names into runs with the same holders, up to the first without any.

        A change of holders between two blocks that have the same ones may be missed: a hint, as everything here.
        """
        begin = 0
        runs: list[Run] = []
        for end, bits in self._runs(names, sys.maxsize):
            runs.append(Run(begin, end, self._named(bits)))
            begin = end
        return runs

    def match(self, names: bytes, max_runs: int) -> Matches:
        """Return the same runs as arrays, at most `max_runs` of them."""
        if self._by_column is None:
            self._by_column = tuple(map(self._live_holders.get, range(self._live.bit_length())))
        runs = self._runs(names, max_runs)
        num_bytes = (len(self._by_column) + 7) // 8
        packed = np.frombuffer(b"".join(bits.to_bytes(num_bytes, "little") for _, bits in runs), np.uint8)
        is_held = np.unpackbits(packed.reshape(len(runs), num_bytes), axis=1, bitorder="little")
        ends = np.array([end for end, _ in runs], np.int64)
        return Matches(ends, is_held[:, : len(self._by_column)].view(np.bool_), self._by_column)

    def _runs(self, names: bytes, max_runs: int) -> list[tuple[int, int]]:
        """Return (end, bits of its holders) of each run."""
        runs: list[tuple[int, int]] = []
        num_names = len(names) // NAME_BYTES
        live, get = self._live, self._holders.get
        begin = 0
        bits = live & get(names[:NAME_BYTES], 0)
        while bits and len(runs) < max_runs:
            same, step = begin, 1  # block `same` has the same holders
            while same + step < num_names:
                at = (same + step) * NAME_BYTES
                if live & get(names[at : at + NAME_BYTES], 0) != bits:
                    break
                same += step
                step *= 2
            other = min(same + step, num_names)
            while other - same > 1:
                middle = (same + other) // 2
                at = middle * NAME_BYTES
                if live & get(names[at : at + NAME_BYTES], 0) == bits:
                    same = middle
                else:
                    other = middle
            runs.append((other, bits))
            begin = other
            at = begin * NAME_BYTES
            bits = live & get(names[at : at + NAME_BYTES], 0) if begin < num_names else 0
        return runs

    def _named(self, bits: int) -> tuple[Holder, ...]:
        named: list[Holder] = []
        while bits:
            bit = bits & -bits
            named.append(self._live_holders[bit.bit_length() - 1])
            bits ^= bit
        return tuple(named)

    def check_invariants(self) -> None:
        """Raise InvariantError unless both directions of the index agree."""
        expected: dict[bytes, int] = {}
        for column, held in self._held.items():
            for name in held:
                expected[name] = expected.get(name, 0) | 1 << column
        live = sum(1 << column for column in self._columns.values())
        columns = {column: holder for holder, column in self._columns.items()}
        if expected != self._holders or live != self._live or columns != self._live_holders:
            raise InvariantError("block index: names by worker and workers by name differ")
        if sorted([*self._live_holders, *self._retired]) != sorted(self._held):
            raise InvariantError(f"block index: columns {sorted(self._held)} are neither live nor retired, or both")

    def _take_column(self, holder: Holder) -> int:
        column = next(column for column in count() if column not in self._held)
        self._columns[holder] = column
        self._by_column = None
        self._live_holders[column] = holder
        self._held[column] = set()
        self._live |= 1 << column
        return column

    def _store(self, column: int, names: bytes) -> list[bytes]:
        holders, held, bit = self._holders, self._held[column], 1 << column
        shared: list[bytes] = []
        for batch in _split(names):
            held.update(batch)
            if holders.keys().isdisjoint(batch):  # the usual case, at C's speed; one integer object for all of them
                holders.update(dict.fromkeys(batch, bit))
                continue
            for name in batch:
                before = holders.get(name, 0)
                holders[name] = before | bit
                if before & self._live & ~bit:
                    shared.append(name)
        return shared

    def _remove(self, column: int, names: bytes) -> list[bytes]:
        holders, bit = self._holders, 1 << column
        shared: list[bytes] = []
        discard = self._held[column].discard
        for batch in _split(names):
            for name in batch:
                bits = holders.get(name, 0)
                if bits & bit:
                    if bits == bit:
                        del holders[name]
                    else:
                        holders[name] = bits ^ bit
                        shared.append(name)
                    discard(name)
        return shared


def _split(names: bytes) -> Iterator[tuple[bytes, ...]]:
    """Split concatenated names, and yield them in batches."""
    batch_bytes = _BATCH_NAMES * NAME_BYTES
    for begin in range(0, len(names), batch_bytes):
        batch = names[begin : begin + batch_bytes]
        yield _unpacker(len(batch) // NAME_BYTES).unpack(batch)


@cache
def _unpacker(num_names: int) -> struct.Struct:
    return struct.Struct(f"{NAME_BYTES}s" * num_names)
