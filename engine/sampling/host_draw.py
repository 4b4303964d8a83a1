"""Draws on a CPU: a row at a time, whose cache holds it, from its likeliest tokens, from more where they do not decide.

Everything that crosses the vocabulary is either a comparison or a sum of integers, so that no order of summation, hence
no batch shape and no number of threads, shows in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.candidates import Candidates, all_in_order, at_least, leading
from engine.sampling.row import SamplingRow
from engine.sampling.settings import NO_CUT, UNIT, Settings

#: Candidates looked at before more of a row is sorted: they hold 95 % of the mass of most text.
NUM_CANDIDATES = 256


def mass(logits: Tensor, tops: NDArray[np.float32], temperatures: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sum exp((logit - top) / temperature) over each row, [n]: the same whatever the order of summation."""
    weights = logits - torch.from_numpy(tops).unsqueeze(1)
    if (temperatures != 1).any():
        weights /= torch.from_numpy(temperatures).unsqueeze(1)
    units: NDArray[np.int64] = weights.exp_().mul_(UNIT).to(torch.int64).sum(dim=1).numpy()
    return units / UNIT


def draw_rows(logits: list[Tensor], rows: Sequence[SamplingRow]) -> tuple[list[int], list[float]]:
    """Draw a token id for each row; return the rows' largest logits, too: an id is void where that is not finite."""
    settings = Settings.of(rows)
    parts: list[Candidates] = []
    masses = np.full(len(rows), np.nan)
    with np.errstate(invalid="ignore"):
        for index, row in enumerate(logits):
            one = slice(index, index + 1)
            candidates = leading(row.unsqueeze(0), min(NUM_CANDIDATES, len(row)))
            parts.append(candidates)
            if settings.top_k[index] == NO_CUT:
                masses[one] = mass(row.unsqueeze(0), candidates.tops, settings.temperature[one])
        candidates = Candidates.joined(parts)
        positions = _draw(candidates, masses, settings)
    tops = candidates.tops
    ids = candidates.ids[np.arange(len(rows)), np.maximum(positions, 0)]
    for index in np.flatnonzero((positions < 0) & np.isfinite(tops)).tolist():
        one = slice(index, index + 1)
        ids[index] = _draw_slowly(logits[index].unsqueeze(0), float(tops[index]), masses[one], settings.part(one))
    return ids.tolist(), tops.tolist()


def _draw_slowly(logits: Tensor, top: float, masses: NDArray[np.float64], settings: Settings) -> int:
    """Draw the token of one row, [1, vocab], that the first candidates do not decide."""
    share = float(settings.top_p[0] if settings.top_p[0] < 1 else settings.uniform[0])
    if not np.isnan(masses[0]):
        # All tokens together that have less than this weight cannot make up the share that is not needed.
        weight = (1 - share) * float(masses[0]) / logits.shape[1]
        heavy = at_least(logits, top + float(settings.temperature[0]) * math.log(weight))
        position = int(_draw(heavy, masses, settings)[0])
        if position >= 0:
            return int(heavy.ids[0, position])
    whole = all_in_order(logits)
    return int(whole.ids[0, _draw(whole, masses, settings)[0]])


def _draw(candidates: Candidates, masses: NDArray[np.float64], settings: Settings) -> NDArray[np.int64]:
    """Draw a candidate of each row: its position, [n]; -1 where the candidates at hand do not decide it.

    top_k, top_p and min_p each keep a leading part of the order, so all that is wanted is where the shortest ends.

        candidates   0 ......... end ... num_sure ... k      kept are [0, end), if end <= num_sure
        cumulative   w0, w0 + w1, ...         drawn is the first that exceeds uniform * cumulative[end - 1]

    Weights are added up from the likeliest on, in float64, so that a longer list of candidates has the same beginning.
    """
    num_sure, is_all = candidates.num_sure, candidates.is_all
    k = candidates.values.shape[1]
    is_sure = np.arange(k) < num_sure[:, None]
    values = candidates.values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        weights = np.exp((values - values[:, :1]) / settings.temperature.astype(np.float64)[:, None])
    weights = np.where(is_sure, weights, 0.0)
    cumulative = np.cumsum(weights, axis=1)

    def upto(end: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.take_along_axis(cumulative, np.clip(end, 1, k)[:, None] - 1, axis=1)[:, 0]

    # Where a cut is at hand it is exact; where it is not, it is beyond num_sure, unless these are all candidates.
    beyond = np.where(is_all, num_sure, NO_CUT)
    by_k = np.where(settings.top_k <= num_sure, settings.top_k, beyond)
    by_min_p = (is_sure & (weights >= settings.min_p[:, None])).sum(axis=1)
    by_min_p = np.where(by_min_p < num_sure, np.maximum(by_min_p, 1), beyond)
    has_k = settings.top_k != NO_CUT
    total = np.where(has_k, np.where(by_k == NO_CUT, np.nan, upto(by_k)), masses)
    by_p = (is_sure & (cumulative < (settings.top_p * total)[:, None])).sum(axis=1) + 1
    by_p = np.where((settings.top_p < 1) & (by_p <= num_sure), by_p, beyond)
    end = np.minimum(np.minimum(by_k, by_p), by_min_p)

    is_uncut = ~has_k & (settings.top_p >= 1) & (settings.min_p <= 0)
    target = settings.uniform * np.where(is_uncut, masses, upto(end))
    position = (is_sure & (cumulative <= target[:, None])).sum(axis=1)
    # What rounding puts past the end belongs to the last that has any weight.
    last = (is_sure & (np.arange(k) < end[:, None]) & (weights > 0)).sum(axis=1) - 1
    is_decided = np.where(is_uncut, position < num_sure, (end <= num_sure) & ~((settings.top_p < 1) & np.isnan(total)))
    return np.where(is_decided | is_all, np.minimum(position, last), -1)
