"""The parameters of a draw, of several rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.sampling.row import SamplingRow, uniform

#: Probabilities are summed in units of 2^-40 of the likeliest token's: 2^23 of them fit into 63 bits.
UNIT = float(2**40)
NO_CUT = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Settings:
    """The draw's parameters of n rows, [n] each."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]  # NO_CUT: all
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    uniform: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[SamplingRow]) -> Settings:
        """Gather what the draws of `rows` are to be made with."""
        params = [row.params for row in rows]
        return cls(
            temperature=np.array([p.temperature for p in params], np.float32),
            top_k=np.array([p.top_k if p.top_k > 0 else NO_CUT for p in params], np.int64),
            top_p=np.array([p.top_p for p in params], np.float64),
            min_p=np.array([p.min_p for p in params], np.float64),
            uniform=np.array([uniform(row.params.seed, row.params.choice, row.num_output_tokens) for row in rows]),
        )

    def part(self, rows: slice) -> Settings:
        """Return the parameters of some of the rows."""
        return Settings(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows]
        )
