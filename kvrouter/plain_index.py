"""The block index where nothing is compiled: as plain as it can be, and what the compiled one must equal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, groupby, takewhile

import numpy as np

from kvcache.names import split_names
from kvrouter.index import Appointed, Holder, Matches, Run, check_names
from kvrouter.keepers import Keepers
from messages.errors import InvariantError
from messages.tier import Tier


class PlainIndex:
    """As BlockIndex. `num_blocks` tells how many blocks a worker has room for."""

    def __init__(self, num_blocks: Callable[[str], int]) -> None:
        self._holders: dict[bytes, tuple[Holder, ...]] = {}  # by name, in the order of their columns; never empty
        self._held: dict[Holder, set[bytes]] = {}
        self._columns: dict[Holder, int] = {}
        self._by_column: tuple[Holder | None, ...] | None = None  # made when it is asked for
        self._keepers = Keepers(self.holders, lambda worker: self.num_held(worker) / num_blocks(worker), num_blocks)

    def __len__(self) -> int:
        return len(self._holders)

    def num_held(self, worker_id: str) -> int:
        """As BlockIndex."""
        return sum(len(held) for holder, held in self._held.items() if holder.worker_id == worker_id)

    def num_held_by_tier(self, worker_id: str) -> dict[Tier, int]:
        """As BlockIndex."""
        return {holder.tier: len(held) for holder, held in self._held.items() if holder.worker_id == worker_id}

    def num_spare(self, worker_id: str) -> int:
        """As BlockIndex."""
        return self._keepers.num_spare(worker_id)

    @property
    def num_shared(self) -> int:
        """As BlockIndex."""
        return len(self._keepers)

    def fold(
        self, worker_id: str, tier: Tier = "device", *, stored: bytes = b"", removed: bytes = b"", is_use: bool = True
    ) -> list[Appointed]:
        """As BlockIndex."""
        check_names(stored, removed)
        holder = Holder(worker_id, tier)
        if holder not in self._columns:
            self._columns[holder] = next(column for column in count() if column not in self._columns.values())
            self._held[holder] = set()
            self._by_column = None
        shared = [name for name in split_names(stored) if self._store(holder, name)]
        shared += [name for name in split_names(removed) if self._remove(holder, name)]
        return self._keepers.on_change(shared, worker_id if is_use else None)

    def drop(self, worker_id: str) -> list[Appointed]:
        """As BlockIndex."""
        shared: list[bytes] = []
        for holder in [holder for holder in self._columns if holder.worker_id == worker_id]:
            shared += [name for name in tuple(self._held[holder]) if self._remove(holder, name)]
            del self._columns[holder], self._held[holder]
            self._by_column = None
        return self._keepers.on_dropped(shared, worker_id)

    @property
    def is_swept(self) -> bool:
        """As BlockIndex."""
        return True

    def sweep(self) -> list[Appointed]:
        """As BlockIndex: nothing is left to."""
        return []

    def holders(self, name: bytes) -> tuple[Holder, ...]:
        """As BlockIndex."""
        return self._holders.get(name, ())

    def runs(self, names: bytes) -> list[Run]:
        """As BlockIndex."""
        runs: list[Run] = []
        for holders, run in groupby(takewhile(bool, map(self.holders, split_names(names)))):
            begin = runs[-1].end if runs else 0
            runs.append(Run(begin, begin + sum(1 for _ in run), holders))
        return runs

    def match(self, names: bytes, max_runs: int) -> Matches:
        """As BlockIndex."""
        if self._by_column is None:
            by_column = {column: holder for holder, column in self._columns.items()}
            self._by_column = tuple(map(by_column.get, range(max(by_column, default=-1) + 1)))
        runs = self.runs(names)[:max_runs]
        is_held = np.zeros((len(runs), len(self._by_column)), np.bool_)
        for number, run in enumerate(runs):
            is_held[number, [self._columns[holder] for holder in run.holders]] = True
        return Matches(np.array([run.end for run in runs], np.int64), is_held, self._by_column)

    def check_invariants(self) -> None:
        """As BlockIndex."""
        expected: dict[bytes, set[Holder]] = {}
        for holder, held in self._held.items():
            for name in held:
                expected.setdefault(name, set()).add(holder)
        if expected != {name: set(holders) for name, holders in self._holders.items()}:
            raise InvariantError("block index: names by worker and workers by name differ")
        self._keepers.check_invariants()

    def _store(self, holder: Holder, name: bytes) -> bool:
        """Take in that it holds a block; tell whether others do, too."""
        holders = self._holders.get(name, ())
        if holder not in holders:
            self._holders[name] = tuple(sorted((*holders, holder), key=self._columns.__getitem__))
            self._held[holder].add(name)
        return len(self._holders[name]) > 1

    def _remove(self, holder: Holder, name: bytes) -> bool:
        """Take in that it does not hold a block any more; tell whether that was so, and others do."""
        holders = self._holders.get(name, ())
        if holder not in holders:
            return False
        self._held[holder].discard(name)
        if len(holders) == 1:
            del self._holders[name]
            return False
        self._holders[name] = tuple(other for other in holders if other != holder)
        return True
