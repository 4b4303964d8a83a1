"""Which tokens of a row of logits come first, in one order everywhere: logit downwards, then id upwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens of n rows, in the one order: logit downwards, then id upwards."""

    values: NDArray[np.float32]  # [n, k]
    ids: NDArray[np.int64]  # [n, k]
    num_sure: NDArray[np.int64]  # [n] how many are surely the first ones: the rest may miss one that ties with the last
    is_all: NDArray[np.bool_]  # [n] whether no other token of the row has a logit above -inf

    @property
    def tops(self) -> NDArray[np.float32]:
        """The largest logit of each row, [n] float32."""
        return np.ascontiguousarray(self.values[:, 0])

    @classmethod
    def joined(cls, parts: list[Candidates]) -> Candidates:
        """Join the rows of all parts, which have one k."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.num_sure for part in parts]),
            np.concatenate([part.is_all for part in parts]),
        )


def argmax(logits: Tensor) -> tuple[int, float]:
    """Return the first token with the largest logit of a row, [vocab], and that logit; a NaN counts as the largest."""
    row = logits.numpy()  # 0.007 ms of 0.15 M logits against torch's 0.09 ms
    found = int(row.argmax())
    return found, float(row[found])


def leading(logits: Tensor, k: int) -> Candidates:
    """Return the first k candidates of each row of [n, vocab], by selection."""
    return Candidates.joined([_leading_by_partition(row, k) for row in logits.numpy()])


def _leading_by_partition(logits: NDArray[np.float32], k: int) -> Candidates:
    """Do as `leading` for one row, [vocab]: numpy selects with vector instructions, several times as fast as topk."""
    least = np.partition(logits, len(logits) - k)[len(logits) - k]
    found = np.flatnonzero(logits >= least) if least > -np.inf else np.flatnonzero(logits > -np.inf)
    values, ids = np.full(k, -np.inf, np.float32), np.zeros(k, np.int64)
    num_sure = min(k, len(found))
    ordered = _in_order(logits[found], found)
    values[:num_sure], ids[:num_sure] = ordered[0][:num_sure], ordered[1][:num_sure]
    if np.isnan(logits.max()):
        values[0] = np.nan
    is_all = bool(least == -np.inf) or k == len(logits)
    return Candidates(values[None], ids[None], np.array([num_sure]), np.array([is_all]))


def at_least(logits: Tensor, least: float) -> Candidates:
    """Return the candidates of one row, [1, vocab], with a logit of `least` or more."""
    found = (logits[0] >= least).nonzero().squeeze(1)
    values, ids = _in_order(logits[0][found].numpy(), found.numpy())
    return Candidates(values[None], ids[None], np.array([len(ids)]), np.array([len(ids) == logits.shape[1]]))


def all_in_order(logits: Tensor) -> Candidates:
    """Return all candidates of one row, [1, vocab]."""
    values, ids = _in_order(logits[0].numpy(), np.arange(logits.shape[1]))
    return Candidates(values[None], ids[None], np.array([np.count_nonzero(values > -np.inf)]), np.array([True]))


def _in_order(values: NDArray[np.float32], ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Sort both along the last axis: values downwards, equal ones by id.

    Logit and id are sorted as one integer, which numpy does with vector instructions: 0.15 M in 1.4 ms, where torch's
    stable sort takes 12.8 ms (AVX-512, one thread).
    """
    keys = _flipped((values + np.float32(0)).view(np.int32))  # -0.0 becomes 0.0, which has other bits
    keys = np.sort(~keys.astype(np.int64) << 32 | ids, axis=-1)
    return _flipped(~(keys >> 32).astype(np.int32)).view(np.float32), keys & 0xFFFFFFFF


def _flipped(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Map the bits of float32 numbers to integers of the same order, and back: it is its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
