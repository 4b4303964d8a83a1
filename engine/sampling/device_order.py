"""The one order of candidates, logit downwards, then id upwards, by integers and with no sort, on any device.

Nothing here waits for the host. A float32 logit becomes a key, an integer of the same order; -0.0 and 0.0
have one, every NaN has the largest there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def first_key_beyond(keys: Tensor, weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the weights of a row, added up from the largest key on, first exceed the row's target.

        keys          9  7  7  7  4 ...
        weights       5  2  2  2  1 ...     target 8: key 7, of which those before it weigh 5

    Integers are added, in whatever order: the result is exact. Digit by digit, as radix sort does, of histograms alone.

    Args:
        keys: [n, vocab] int64, as of `keys_of`.
        weights: [n, vocab] int64, none negative; a row's sum is below 2^63.
        targets: [n] int64, from 0 up to less than the row's sum; else what the row gets is void.

    Returns:
        The key, [n], and the weight of all with a larger one, [n].
    """
    prefix = torch.zeros_like(targets)
    before = torch.zeros_like(targets)
    for shift, width in _DIGITS:
        inside = (keys >> (shift + width)) == prefix.unsqueeze(1)
        histogram = torch.zeros((len(keys), 1 << width), dtype=torch.int64, device=keys.device)
        histogram.scatter_add_(1, (keys >> shift) & ((1 << width) - 1), torch.where(inside, weights, 0))
        from_here = histogram.flip(1).cumsum(1).flip(1)  # of this digit and all larger ones
        reached = (before.unsqueeze(1) + from_here) > targets.unsqueeze(1)
        digit = (reached.sum(1) - 1).clamp(min=0)
        before += (from_here - histogram).gather(1, digit.unsqueeze(1)).squeeze(1)
        prefix = (prefix << width) | digit
    return prefix, before


def nth_with_key(keys: Tensor, key: Tensor, n: Tensor) -> Tensor:
    """Return the id of the n-th token, from 0, [rows], of those of a row that have its `key`; void if there is none."""
    passed = (keys == key.unsqueeze(1)).cumsum(1, dtype=torch.int32)
    return (passed <= n.unsqueeze(1)).sum(1).clamp(max=keys.shape[1] - 1)


def first_ids(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the keys and ids of the first k tokens of each row of [n, vocab], in order, [n, k] int64 each."""
    ids = torch.arange(keys.shape[1], device=keys.device)
    ordered = ((keys - 2**31) << 32) | (_ID_MASK - ids)  # all different: which of several is selected is not open
    found = torch.topk(ordered, k, dim=1).values
    return (found >> 32) + 2**31, _ID_MASK - (found & _ID_MASK)
