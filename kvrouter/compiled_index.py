"""The block index in C++ (`index.cpp`): some 45 bytes a name, two bytes more for each of its holders.

Nothing that it does takes long: a table grows a thousandth at a time, and what a worker had is swept in pieces.
"""

from __future__ import annotations

import ctypes
import secrets
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcache.names import NAME_BYTES
from kvrouter.index import Appointed, Holder, Matches, Run, check_names
from messages.errors import CapacityError, InvariantError
from messages.tier import Tier

_KINDS: dict[Tier, int] = {"disk": 0, "remote": 0, "device": 1, "host": 2}  #: as in `index.cpp`
_NUM_SHARDS = 1024  #: as there
_SWEPT_AT_ONCE = 100_000  #: names, some 2 ms
_TOLD = np.dtype([("name", "V16"), ("column", np.uint32), ("is_spare", np.uint32)])


class CompiledIndex:
    """As BlockIndex. `num_blocks` tells how many blocks a worker has room for."""

    def __init__(self, path: Path, num_blocks: Callable[[str], int]) -> None:
        """Load the library.

        Raises:
            OSError: it does not load.
            AttributeError: it is another library.
        """
        self._library = _load(path)
        self._num_blocks = num_blocks
        self._handle = self._library.kvray_index_new(secrets.randbits(64))
        weakref.finalize(self, self._library.kvray_index_delete, self._handle)
        self._columns: dict[Holder, int] = {}  # of those who are there
        self._by_worker: dict[str, list[int]] = {}
        self._by_column: list[Holder | None] = []
        self._holders: tuple[Holder | None, ...] | None = None  # the same, made when it is asked for
        self._is_swept = True

    def __len__(self) -> int:
        return int(self._library.kvray_index_num_names(self._handle))

    def num_held(self, worker_id: str) -> int:
        """As BlockIndex."""
        columns = self._by_worker.get(worker_id, ())
        return sum(self._library.kvray_index_num_held(self._handle, column) for column in columns)

    def num_held_by_tier(self, worker_id: str) -> dict[Tier, int]:
        """As BlockIndex."""
        holders = ((self._by_column[column], column) for column in self._by_worker.get(worker_id, ()))
        return {
            holder.tier: int(self._library.kvray_index_num_held(self._handle, column))
            for holder, column in holders
            if holder is not None
        }

    def num_spare(self, worker_id: str) -> int:
        """As BlockIndex."""
        columns = self._by_worker.get(worker_id, ())
        return sum(self._library.kvray_index_num_spare(self._handle, column) for column in columns)

    @property
    def num_shared(self) -> int:
        """As BlockIndex."""
        return int(self._library.kvray_index_num_shared(self._handle))

    def fold(
        self, worker_id: str, tier: Tier = "device", *, stored: bytes = b"", removed: bytes = b"", is_use: bool = True
    ) -> list[Appointed]:
        """As BlockIndex.

        Raises:
            CapacityError: there are 65,536 holders.
        """
        check_names(stored, removed)
        column = self._columns.get(Holder(worker_id, tier))
        if column is None:
            column = self._take_column(Holder(worker_id, tier))
        num_stored, num_removed = len(stored) // NAME_BYTES, len(removed) // NAME_BYTES
        num_told = self._library.kvray_index_fold(
            self._handle, column, stored, num_stored, removed, num_removed, is_use
        )
        # Of those who are gone what is swept just before a change is told, too.
        is_once = self._is_swept and not (stored and removed)
        self._note_swept()
        return self._told(num_told, is_once=is_once) if num_told else []

    def drop(self, worker_id: str) -> list[Appointed]:
        """As BlockIndex: who is told comes with the sweep."""
        for column in self._by_worker.pop(worker_id, ()):
            holder = self._by_column[column]
            assert holder is not None
            del self._columns[holder]
            self._by_column[column] = self._holders = None
            self._library.kvray_index_drop(self._handle, column)
            self._is_swept = False
        return []

    @property
    def is_swept(self) -> bool:
        """As BlockIndex."""
        return self._is_swept

    def sweep(self) -> list[Appointed]:
        """As BlockIndex."""
        num_shards = 1 + _SWEPT_AT_ONCE * _NUM_SHARDS // (len(self) + 1)
        num_told = self._library.kvray_index_sweep(self._handle, num_shards)
        self._note_swept()
        return self._told(num_told, is_once=True) if num_told else []

    def holders(self, name: bytes) -> tuple[Holder, ...]:
        """As BlockIndex."""
        columns = np.empty(len(self._by_column), np.uint16)
        count = self._library.kvray_index_holders(self._handle, name, columns.ctypes.data)
        return self._named(columns[:count])

    def runs(self, names: bytes) -> list[Run]:
        """As BlockIndex."""
        matches = self.match(names, sys.maxsize)
        begins = [0, *matches.ends.tolist()]
        columns = (np.flatnonzero(is_held) for is_held in matches.is_held)
        return [
            Run(begin, end, self._named(held)) for begin, end, held in zip(begins, begins[1:], columns, strict=False)
        ]

    def match(self, names: bytes, max_runs: int) -> Matches:
        """As BlockIndex."""
        if self._holders is None:
            self._holders = tuple(self._by_column)
        num_names = len(names) // NAME_BYTES
        max_runs = min(max_runs, num_names)
        ends, sets = np.empty(max_runs, np.int64), np.empty(max_runs, np.uint32)
        num_runs = self._library.kvray_index_runs(
            self._handle, names, num_names, max_runs, ends.ctypes.data, sets.ctypes.data
        )
        is_held = np.zeros((num_runs, len(self._holders)), np.bool_)
        self._library.kvray_index_fill(
            self._handle, sets.ctypes.data, num_runs, len(self._holders), is_held.ctypes.data
        )
        return Matches(ends[:num_runs], is_held, self._holders)

    def check_invariants(self) -> None:
        """As BlockIndex."""
        disagreement = self._library.kvray_index_disagreement(self._handle)
        if disagreement is not None:
            raise InvariantError(f"block index: {disagreement.decode()}")

    def _note_swept(self) -> None:
        self._is_swept = self._is_swept or bool(self._library.kvray_index_is_swept(self._handle))

    def _take_column(self, holder: Holder) -> int:
        num_blocks = self._num_blocks(holder.worker_id)
        column: int = self._library.kvray_index_add(self._handle, _KINDS[holder.tier], num_blocks)
        if column < 0:
            raise CapacityError(
                "block index: 65,536 holders are there, or not swept yet, and no more can be told apart"
            )
        self._columns[holder] = column
        self._by_worker.setdefault(holder.worker_id, []).append(column)
        self._by_column += [None] * (column + 1 - len(self._by_column))
        self._by_column[column] = holder
        self._holders = None
        return column

    def _named(self, columns: npt.NDArray[np.integer]) -> tuple[Holder, ...]:
        holders = (self._by_column[column] for column in columns.tolist())
        return tuple(holder for holder in holders if holder is not None)

    def _told(self, num_told: int, *, is_once: bool) -> list[Appointed]:
        """Say who is told what. `is_once`: nobody was told of a block twice, which takes the first word back."""
        size = num_told * _TOLD.itemsize
        told = np.frombuffer(ctypes.string_at(self._library.kvray_index_told(self._handle), size), _TOLD)
        if not is_once:
            last: dict[bytes, int] = {}
            for number, one in enumerate(told):
                key = one.tobytes()[:-4]
                if last.pop(key, None) is None:
                    last[key] = number
            told = told[list(last.values())]
        appointed: list[Appointed] = []
        for column in np.unique(told["column"]).tolist():
            its = told[told["column"] == column]
            holder = self._by_column[column]
            assert holder is not None, "who is dropped is told nothing"
            is_spare = its["is_spare"] != 0
            appointed.append(
                Appointed(holder.worker_id, its["name"][is_spare].tobytes(), its["name"][~is_spare].tobytes())
            )
        return appointed


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    handle, pointer, number, column = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    names = ctypes.c_char_p
    for name, restype, argtypes in (
        ("new", handle, [number]),
        ("delete", None, [handle]),
        ("add", ctypes.c_int64, [handle, column, ctypes.c_double]),
        ("drop", None, [handle, column]),
        ("fold", number, [handle, column, names, number, names, number, ctypes.c_uint32]),
        ("sweep", number, [handle, number]),
        ("is_swept", ctypes.c_uint32, [handle]),
        ("told", pointer, [handle]),
        ("runs", number, [handle, names, number, number, pointer, pointer]),
        ("fill", None, [handle, pointer, number, number, pointer]),
        ("holders", number, [handle, names, pointer]),
        ("num_names", number, [handle]),
        ("num_shared", number, [handle]),
        ("num_held", number, [handle, column]),
        ("num_spare", number, [handle, column]),
        ("disagreement", ctypes.c_char_p, [handle]),
    ):
        function = getattr(library, f"kvray_index_{name}")
        function.restype, function.argtypes = restype, argtypes
    return library
