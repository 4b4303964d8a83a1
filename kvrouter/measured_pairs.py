"""Prices of pairs of workers, as far as they were measured: four bytes for a pair that was not, 28 for one that was."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class MeasuredPairs:
    """Prices by the rows of target and source. One thread.

    Memory of `numbers` is taken by the system where it is written to: 64 MiB at most for 4,096 rows.
    """

    def __init__(self) -> None:
        #: `[target, source]`: where in `prices` the pair's is; 0: it was not measured
        self.numbers = np.zeros((0, 0), np.int32)
        self.prices = np.zeros((3, 1))  #: `[3, numbers]`: seconds of a pull, of a byte, of a handoff
        self._pairs = np.zeros((2, 1), np.int64)  # [2, numbers]: the target's and the source's row
        self._free: list[int] = []

    def grow(self, capacity: int) -> None:
        """Make room for so many rows."""
        self.numbers = np.zeros((capacity, capacity), np.int32)
        used = np.delete(np.arange(self.prices.shape[1]), [0, *self._free])
        target, source = self._pairs[:, used]
        self.numbers[target, source] = used

    def put(self, target: int, source: int, parts: npt.NDArray[np.float64]) -> None:
        """Note the price of a pair, `[3]`, in the stead of what was measured before."""
        number = int(self.numbers[target, source])
        if not number:
            if not self._free:
                size = self.prices.shape[1]
                self.prices = np.concatenate([self.prices, np.zeros((3, size))], axis=1)
                self._pairs = np.concatenate([self._pairs, np.zeros((2, size), np.int64)], axis=1)
                self._free = list(range(2 * size - 1, size - 1, -1))
            number = self._free.pop()
            self.numbers[target, source] = number
            self._pairs[:, number] = target, source
        self.prices[:, number] = parts

    def of_source(self, source: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return who measured it, `[targets]`, and what, `[3, targets]`."""
        targets = np.flatnonzero(self.numbers[:, source])
        return targets, self.prices[:, self.numbers[targets, source]]

    def remove(self, row: int) -> None:
        """Forget all pairs that this row is in."""
        sources, targets = np.flatnonzero(self.numbers[row]), np.flatnonzero(self.numbers[:, row])
        self._free += {*self.numbers[row, sources].tolist(), *self.numbers[targets, row].tolist()}
        self.numbers[row, sources] = 0
        self.numbers[targets, row] = 0
