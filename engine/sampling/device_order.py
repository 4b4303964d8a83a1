"""The one order of candidates, logit downwards, then id upwards, by integers and with no sort, on any device.

Nothing here waits for the host. A float32 logit becomes a key, an integer of the same order; -0.0 and 0.0
have one, every NaN has the largest there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

#: Adds up, of each row, the weights of those whose keys begin with its `prefix`, [n], by the next `width` bits of them,
#: behind which there are `shift` more: [n, 2^width] int64.
Histogram: TypeAlias = Callable[[Tensor, int, int], Tensor]

#: How a key of 32 bits is searched for: the shift and the width of each digit.
_DIGITS = ((21, 11), (10, 11), (0, 10))
_ID_MASK = 0xFFFFFFFF


def keys_of(logits: Tensor) -> Tensor:
    """Return the keys of float32 logits, in [0, 2^32), as int64."""
    bits = torch.where(logits.isnan(), torch.nan, logits + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + 2**31


def logits_of(keys: Tensor) -> Tensor:
    """Return the float32 logits that have these keys."""
    bits = (keys - 2**31).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


class Found(NamedTuple):
    """Where weights that are added up first exceed a target, [n] int64 each."""

    key: Tensor
    before: Tensor  #: the weight of all with a larger key
    here: Tensor  #: the weight of all with this one


def first_key_beyond(histogram: Histogram, targets: Tensor) -> Found:
    """Find where the weights of a row, added up from the largest key on, first exceed the row's target.

        keys          9  7  7  7  4 ...
        weights       5  2  2  2  1 ...     target 8: key 7, of which those before it weigh 5

    Integers are added, in whatever order: the result is exact. Digit by digit, as radix sort does, of histograms alone.

    Args:
        histogram: of the weights, none negative, of n rows; a row's sum is below 2^63.
        targets: [n] int64, from 0 up to less than the row's sum; else what the row gets is void.
    """
    prefix = torch.zeros_like(targets)
    before = torch.zeros_like(targets)
    here = before
    for shift, width in _DIGITS:
        weights = histogram(prefix, shift, width)
        from_here = weights.flip(1).cumsum(1).flip(1)  # of this digit and all larger ones
        reached = (before.unsqueeze(1) + from_here) > targets.unsqueeze(1)
        digit = (reached.sum(1) - 1).clamp(min=0).unsqueeze(1)
        here = weights.gather(1, digit).squeeze(1)
        before = before + from_here.gather(1, digit).squeeze(1) - here
        prefix = (prefix << width) | digit.squeeze(1)
    return Found(prefix, before, here)


def histogram_of(keys: Tensor, weights: Tensor) -> Histogram:
    """Return the histogram of `weights`, [n, vocab] int64, by `keys`, as of `keys_of`."""

    def histogram(prefix: Tensor, shift: int, width: int) -> Tensor:
        inside = (keys >> (shift + width)) == prefix.unsqueeze(1)
        found = torch.zeros((len(keys), 1 << width), dtype=torch.int64, device=keys.device)
        return found.scatter_add_(1, (keys >> shift) & ((1 << width) - 1), torch.where(inside, weights, 0))

    return histogram


def places_with_key(logits: Tensor, key: Tensor) -> Tensor:
    """Count in each row, from the first token up to each, those that have the row's `key`, [n, vocab] int32."""
    return (logits == logits_of(key).unsqueeze(1)).cumsum(1, dtype=torch.int32)


def nth_place(places: Tensor, n: Tensor) -> Tensor:
    """Return the id of the n-th token, from 0, [rows], that `places_with_key` counts; void if there is none."""
    return (places <= n.unsqueeze(1)).sum(1).clamp(max=places.shape[1] - 1)


def first_ids(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the keys and ids of the first k tokens of each row of [n, vocab], in order, [n, k] int64 each."""
    ids = torch.arange(keys.shape[1], device=keys.device)
    ordered = ((keys - 2**31) << 32) | (_ID_MASK - ids)  # all different: which of several is selected is not open
    found = torch.topk(ordered, k, dim=1).values
    return (found >> 32) + 2**31, _ID_MASK - (found & _ID_MASK)
