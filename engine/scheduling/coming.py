"""Blocks of one prefix that come from others: offered, being pulled, here.

LACKING ---offered---> OFFERED ---pulled next---> OPEN ---came well---> ARRIVED
^----- withdrawn -------'                        '--- came badly ---> LACKING
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcache.locations import LOCATION, Locations


class Coming(IntEnum):
    """How far a block is on its way."""

    LACKING = 0
    OFFERED = 1  #: to be pulled next
    OPEN = 2  #: being pulled
    ARRIVED = 3  #: whole and verified; or it was here before


class ComingBlocks:
    """Which of the blocks [begin, end) of a prefix are how far, and where they lie at the source that offers them."""

    def __init__(self, begin: int, end: int, arrived: Iterable[int] = ()) -> None:
        """`arrived`: those of them that were found here."""
        self._begin = begin
        self._states = np.zeros(end - begin, np.uint8)  # Coming
        self._states[np.fromiter(arrived, np.int64) - begin] = Coming.ARRIVED
        self._rows = np.empty(end - begin, LOCATION)  # of those that are offered or open
        self._sources = np.empty(end - begin, np.uint16)
        self._addresses: list[str] = []  # by number of a source

    def state(self, index: int) -> Coming:
        """Return how far a block is; LACKING outside of the range."""
        position = index - self._begin
        return Coming(self._states[position]) if 0 <= position < len(self._states) else Coming.LACKING

    def has(self, state: Coming) -> bool:
        """Tell whether a block is in that state."""
        return bool((self._states == state).any())

    def num(self, state: Coming) -> int:
        """Count the blocks in that state."""
        return int(np.count_nonzero(self._states == state))

    def indexes(self, state: Coming) -> list[int]:
        """Return the blocks in that state, head first."""
        indexes: list[int] = self._in(state).tolist()
        return indexes

    def rows(self, state: Coming) -> Locations:
        """Return where the blocks that are OFFERED or OPEN lie, head first."""
        rows: Locations = self._rows[self._states == state]
        return rows

    def num_leading(self) -> int:
        """Count the blocks from the first one on that have arrived."""
        missing = self._states != Coming.ARRIVED
        return int(missing.argmax()) if missing.any() else len(missing)

    def last_arrived(self) -> int:
        """Return the last block that has arrived; -1 where none has."""
        arrived = self._in(Coming.ARRIVED)
        return int(arrived[-1]) if len(arrived) else -1

    def lacks(self, rows: Locations) -> npt.NDArray[np.bool_]:
        """Tell which rows are of blocks of this range that have not arrived, nor are being pulled."""
        position = rows["index"].astype(np.int64) - self._begin
        is_lacking = (position >= 0) & (position < len(self._states))
        is_lacking[is_lacking] = self._states[position[is_lacking]] < Coming.OPEN
        return is_lacking

    def offer(self, source: str, rows: Locations) -> None:
        """Note that blocks that are lacking can be pulled from `source`; the last offer of each counts."""
        if source not in self._addresses:
            self._addresses.append(source)
        places = _places(rows["index"].astype(np.int64) - self._begin)
        self._states[places] = Coming.OFFERED
        self._rows[places] = rows
        self._sources[places] = self._addresses.index(source)

    def take_over(self, source: str, others: ComingBlocks) -> None:
        """Go on with what of `others` is offered by `source` or being pulled from there, as far as it is lacking here.

        What is being pulled is in the range, and lacking. No pull runs here.
        """
        opened, offered = others.rows(Coming.OPEN), others.rows(Coming.OFFERED)
        self.offer(source, opened)
        self._states[self._states == Coming.OFFERED] = Coming.OPEN
        self.offer(source, offered[self.lacks(offered)])

    def withdraw_before(self, end: int) -> None:
        """Note that nobody wants OFFERED blocks before `end` any more."""
        head = self._states[: max(0, end - self._begin)]
        head[head == Coming.OFFERED] = Coming.LACKING

    def begin_pull(self, max_blocks: int = sys.maxsize, *, is_tail_first: bool = False) -> tuple[str, Locations]:
        """Open what one source offers of the OFFERED, its first `max_blocks`; return it, and where they lie.

        The others' turn comes when this pull has ended.
        """
        position = self._in(Coming.OFFERED) - self._begin
        if is_tail_first:
            position = position[::-1]
        source = self._sources[position[0]]
        places = _places(position[self._sources[position] == source][:max_blocks])
        self._states[places] = Coming.OPEN
        return self._addresses[source], self._rows[places].copy()

    def arrive(self, bad_indexes: Collection[int]) -> list[int]:
        """Note that the OPEN ones are here, but for these, which stay open; return those that came, head first."""
        well = self._states == Coming.OPEN
        for index in bad_indexes:
            well[index - self._begin] = False
        self._states[well] = Coming.ARRIVED
        arrived: list[int] = (np.flatnonzero(well) + self._begin).tolist()
        return arrived

    def close(self) -> None:
        """Note that no pull runs: what is OPEN did not come."""
        self._states[self._states == Coming.OPEN] = Coming.LACKING

    def _in(self, state: Coming) -> npt.NDArray[np.intp]:
        indexes: npt.NDArray[Any] = np.flatnonzero(self._states == state) + self._begin
        return indexes


def _places(position: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """Return the same positions as a slice where they are a run: a tenth of the time for thousands of rows."""
    is_run = len(position) > 0 and bool((np.diff(position) == 1).all())
    return slice(int(position[0]), int(position[-1]) + 1) if is_run else position
