"""What the tokens of some rows weigh in a draw, in units of 2^-40 of the likeliest one's."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.sampling.device_order import histogram_of, keys_of
from engine.sampling.settings import UNIT


class Sums(NamedTuple):
    """Of all tokens of each row, [n] int64 each."""

    units: Tensor
    mass: Tensor  #: in units too, as `host_draw.mass` sums it up
    heavy_units: Tensor  #: of those that weigh min_p of the likeliest one, or more
    num_present: Tensor  #: those that are not masked


class DrawWeights(Protocol):
    """Weighs [n, vocab] float32 logits, each row dense, by their largest and by temperatures, [n] float32 both."""

    logits: Tensor

    def __init__(self, logits: Tensor, tops: Tensor, temperature: Tensor) -> None: ...

    def sums(self, min_p: Tensor) -> Sums:
        """Add all up; `min_p` is [n] float64."""

    def units(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """Return the histogram of units, as `device_order.Histogram` says."""

    def present(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """Return the histogram of tokens that are not masked, a one for each."""

    def units_from(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the units of those with larger keys than their row's, and of those with it, [n] each."""


class TorchWeights:
    """By torch's operators, on any device."""

    def __init__(self, logits: Tensor, tops: Tensor, temperature: Tensor) -> None:
        self.logits = logits
        self._tops = tops
        self._temperature = temperature
        self._keys = keys_of(logits)
        self._weights = logits.double().sub_(tops.double().unsqueeze(1)).div_(temperature.double().unsqueeze(1)).exp_()
        self._units = (self._weights * UNIT + 0.5).to(torch.int64)
        self._present = (logits > -torch.inf).to(torch.int64)
        self.units = histogram_of(self._keys, self._units)
        self.present = histogram_of(self._keys, self._present)

    def sums(self, min_p: Tensor) -> Sums:
        """Do as `DrawWeights` says."""
        heavy = torch.where(self._weights >= min_p.unsqueeze(1), self._units, 0)
        mass = mass_units(self.logits, self._tops, self._temperature)
        return Sums(self._units.sum(1), mass, heavy.sum(1), self._present.sum(1))

    def units_from(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Do as `DrawWeights` says."""
        key = key.unsqueeze(1)
        before = torch.where(self._keys > key, self._units, 0).sum(1)
        return before, torch.where(self._keys == key, self._units, 0).sum(1)


def mass_units(logits: Tensor, tops: Tensor, temperature: Tensor) -> Tensor:
    """Sum exp((logit - top) / temperature) over each row, [n] int64, in units, as `host_draw.mass` does."""
    weights = (logits - tops.unsqueeze(1)).div_(temperature.unsqueeze(1))
    return weights.exp_().mul_(UNIT).to(torch.int64).sum(dim=1)
