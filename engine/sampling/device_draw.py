"""Draws on a device: all rows in the same few dozen operations, whatever their logits are.

What is drawn is what `host_draw` draws. There the weights of the first candidates are added up in float64; here those
of the whole vocabulary are, as multiples of 2^-40 of the likeliest token's, which no order of summation changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.memory.device_checksum import has_triton
from engine.sampling.device_order import first_key_beyond, nth_place, places_with_key
from engine.sampling.device_weights import DrawWeights, TorchWeights
from engine.sampling.row import SamplingRow
from engine.sampling.settings import NO_CUT, Settings

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

    @staticmethod
    def arrays(rows: Sequence[SamplingRow]) -> list[NDArray[Any]]:
        """Return what is to be uploaded for the draws of `rows`."""
        found = Settings.of(rows)
        return [found.temperature, found.top_k, found.top_p, found.min_p, found.uniform]

    @classmethod
    def of(cls, arrays: Sequence[NDArray[Any]], uploaded: Sequence[Tensor]) -> DrawSettings:
        """Make them of `arrays`, which are on the device as `uploaded`."""
        _, top_k, top_p, _, _ = arrays
        there = dict(zip(("temperature", "top_k", "top_p", "min_p", "uniform"), uploaded, strict=True))
        return cls(
            **there,
            is_uncut=(there["top_k"] == NO_CUT) & (there["top_p"] >= 1) & (there["min_p"] <= 0),
            has_top_k=bool(np.any(top_k != NO_CUT)),
            has_top_p=bool(np.any(top_p < 1)),
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
        )


def draw(logits: Tensor, tops: Tensor, settings: DrawSettings) -> Tensor:
    """Draw a token id for each row of [n, vocab] float32, [n] int64; void where a row's largest logit is not finite."""
    group = max(1, _GROUP_LOGITS // logits.shape[1])
    parts = [slice(begin, begin + group) for begin in range(0, len(logits), group)]
    return torch.cat([_draw(logits[part], tops[part], settings.part(part)) for part in parts])


def _draw(logits: Tensor, tops: Tensor, settings: DrawSettings) -> Tensor:
    weights = _weights_kind(logits.device)(logits, tops, settings.temperature)
    total, masses, kept, num_present = weights.sums(settings.min_p)
    if settings.has_top_k:
        by_k = _units_of_first(weights, torch.minimum(settings.top_k, num_present).clamp(min=1))
        kept = torch.minimum(kept, by_k)
        masses = torch.where(settings.top_k == NO_CUT, masses, by_k)
    if settings.has_top_p:
        share = (settings.top_p * masses.double()).ceil().to(torch.int64) - 1
        by_p = _units_upto(weights, torch.minimum(share, total - 1).clamp(min=0))
        kept = torch.minimum(kept, torch.where(settings.top_p < 1, by_p, total))
    whole = torch.where(settings.is_uncut, masses, kept)
    target = (settings.uniform * whole.double()).floor().to(torch.int64)
    # What rounding puts past the end belongs to the last that has any weight.
    target = torch.minimum(target, torch.where(settings.is_uncut, total, kept) - 1)
    found = first_key_beyond(weights.units, target)
    places = places_with_key(logits, found.key)
    return nth_place(places, (target - found.before) // _each(found.here, places))


def _each(here: Tensor, places: Tensor) -> Tensor:
    """Return the units of one of those that `places` counts, which all have the same, [n]; at least 1."""
    return (here // places[:, -1].clamp(min=1)).clamp(min=1)


def _units_of_first(weights: DrawWeights, counts: Tensor) -> Tensor:
    """Add up the units of each row's first `counts` tokens, [n]."""
    found = first_key_beyond(weights.present, counts - 1)
    before, here = weights.units_from(found.key)
    return before + (counts - found.before) * (here // found.here.clamp(min=1))


def _units_upto(weights: DrawWeights, targets: Tensor) -> Tensor:
    """Add up the units of each row's tokens up to the first with which they exceed the target, [n]."""
    found = first_key_beyond(weights.units, targets)
    each = _each(found.here, places_with_key(weights.logits, found.key))
    return found.before + ((targets - found.before) // each + 1) * each


@functools.cache
def _weights_kind(device: torch.device) -> type[DrawWeights]:
    """Return what weighs there: Triton's kernels read the logits alone, torch's operators move many times that."""
    if device.type == "cuda" and has_triton():
        from engine.sampling.triton_weights import TritonWeights

        return TritonWeights
    return TorchWeights
