"""Draws on a device: all rows in the same few dozen operations, whatever their logits are.

What is drawn is what `host_draw` draws. There the weights of the first candidates are added up in float64; here those
of the whole vocabulary are, as multiples of 2^-40 of the likeliest token's, which no order of summation changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.device_order import first_key_beyond, keys_of, nth_with_key
from engine.sampling.row import SamplingRow
from engine.sampling.settings import NO_CUT, UNIT, Settings

#: Logits that one call draws from: its intermediate results take some 60 bytes for each.
_GROUP_LOGITS = 1 << 23


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """`Settings` of n rows on a device, and which of the cuts any of them wants."""

    temperature: Tensor  #: [n] float32
    top_k: Tensor  #: [n] int64
    top_p: Tensor  #: [n] float64
    min_p: Tensor  #: [n] float64
    uniform: Tensor  #: [n] float64
    is_uncut: Tensor  #: [n] bool
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool

    @staticmethod
    def arrays(rows: Sequence[SamplingRow]) -> list[NDArray[Any]]:
        """Return what is to be uploaded for the draws of `rows`."""
        found = Settings.of(rows)
        return [found.temperature, found.top_k, found.top_p, found.min_p, found.uniform]

    @classmethod
    def of(cls, arrays: Sequence[NDArray[Any]], uploaded: Sequence[Tensor]) -> DrawSettings:
        """Make them of `arrays`, which are on the device as `uploaded`."""
        _, top_k, top_p, min_p, _ = arrays
        there = dict(zip(("temperature", "top_k", "top_p", "min_p", "uniform"), uploaded, strict=True))
        return cls(
            **there,
            is_uncut=(there["top_k"] == NO_CUT) & (there["top_p"] >= 1) & (there["min_p"] <= 0),
            has_top_k=bool(np.any(top_k != NO_CUT)),
            has_top_p=bool(np.any(top_p < 1)),
            has_min_p=bool(np.any(min_p > 0)),
        )

    def part(self, rows: slice) -> DrawSettings:
        """Return those of some of the rows."""
        return DrawSettings(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.uniform[rows],
            self.is_uncut[rows],
            self.has_top_k,
            self.has_top_p,
            self.has_min_p,
        )


def draw(logits: Tensor, tops: Tensor, settings: DrawSettings) -> Tensor:
    """Draw a token id for each row of [n, vocab] float32, [n] int64; void where a row's largest logit is not finite."""
    group = max(1, _GROUP_LOGITS // logits.shape[1])
    parts = [slice(begin, begin + group) for begin in range(0, len(logits), group)]
    return torch.cat([_draw(logits[part], tops[part], settings.part(part)) for part in parts])


def mass_units(logits: Tensor, tops: Tensor, temperature: Tensor) -> Tensor:
    """Sum exp((logit - top) / temperature) over each row, [n] int64, in units, as `host_draw.mass` does."""
    weights = (logits - tops.unsqueeze(1)).div_(temperature.unsqueeze(1))
    return weights.exp_().mul_(UNIT).to(torch.int64).sum(dim=1)


def _draw(logits: Tensor, tops: Tensor, settings: DrawSettings) -> Tensor:
    keys = keys_of(logits)
    weights = (logits.double() - tops.double().unsqueeze(1)).div_(settings.temperature.double().unsqueeze(1)).exp_()
    units = (weights * UNIT + 0.5).to(torch.int64)
    total = units.sum(1)
    masses = mass_units(logits, tops, settings.temperature)
    kept = total
    if settings.has_min_p:
        kept = torch.where(weights >= settings.min_p.unsqueeze(1), units, 0).sum(1)
    del weights
    if settings.has_top_k:
        by_k = _units_of_first(keys, units, settings.top_k, (logits > -torch.inf).to(torch.int64))
        kept = torch.minimum(kept, by_k)
        masses = torch.where(settings.top_k == NO_CUT, masses, by_k)
    if settings.has_top_p:
        share = (settings.top_p * masses.double()).ceil().to(torch.int64) - 1
        by_p = _upto_first_beyond(keys, units, torch.minimum(share, total - 1).clamp(min=0))
        kept = torch.minimum(kept, torch.where(settings.top_p < 1, by_p, total))
    whole = torch.where(settings.is_uncut, masses, kept)
    target = (settings.uniform * whole.double()).floor().to(torch.int64)
    # What rounding puts past the end belongs to the last that has any weight.
    target = torch.minimum(target, torch.where(settings.is_uncut, total, kept) - 1)
    key, before = first_key_beyond(keys, units, target)
    return nth_with_key(keys, key, (target - before) // _units_of_key(keys, units, key).clamp(min=1))


def _units_of_key(keys: Tensor, units: Tensor, key: Tensor) -> Tensor:
    """Return the units of one token of each row that has the row's `key`, [n]."""
    return torch.where(keys == key.unsqueeze(1), units, 0).amax(1)


def _units_of_first(keys: Tensor, units: Tensor, counts: Tensor, present: Tensor) -> Tensor:
    """Add up the units of each row's first `counts` tokens, [n]; of all that are `present` where those are fewer."""
    wanted = torch.minimum(counts, present.sum(1)).clamp(min=1)
    key, num_before = first_key_beyond(keys, present, wanted - 1)
    before = torch.where(keys > key.unsqueeze(1), units, 0).sum(1)
    return before + (wanted - num_before) * _units_of_key(keys, units, key)


def _upto_first_beyond(keys: Tensor, units: Tensor, targets: Tensor) -> Tensor:
    """Add up the units of each row's tokens up to the first with which they exceed the target, [n]."""
    key, before = first_key_beyond(keys, units, targets)
    each = _units_of_key(keys, units, key).clamp(min=1)  # less is of a void row
    return before + ((targets - before) // each + 1) * each
