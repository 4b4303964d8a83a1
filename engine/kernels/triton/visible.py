"""What all attention kernels share: which keys a row sees, how its sequence is split, and tiles read by block table.

Positions count from the sequence's start. A row's result depends on its own position alone: keys are taken in tiles
and splits that are fixed by it, whatever the batch or the cut of the prompt.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Keys of one split of decode attention, at least; twice as many where a row would have more than MAX_SPLITS.
MIN_SPLIT_TOKENS = 256
MAX_SPLITS = 64
#: "None" of a window or a chunk: beyond every position.
UNLIMITED = 1 << 30

_MIN_SPLIT = tl.constexpr(MIN_SPLIT_TOKENS)
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
#: So often a split doubles: sequences of up to 2**30 tokens.
_DOUBLINGS = tl.constexpr(16)


# Triton compiles these from their source, and takes no annotations but its own.
@triton.jit
def first_visible(position, window, chunk):
    """Return the first position that `position` sees."""
    return tl.maximum(tl.maximum(position - window + 1, 0), position // chunk * chunk)


@triton.jit
def split_tokens(num_keys):
    """Return how many of `num_keys` keys make a split: a power of two that gives at most MAX_SPLITS of them."""
    size = num_keys * 0 + _MIN_SPLIT
    for _ in tl.static_range(_DOUBLINGS):
        size = tl.where(num_keys > size.to(tl.int64) * _MAX_SPLITS, size * 2, size)
    return size


@triton.jit
def num_splits(kv_len, window, chunk, TILE: tl.constexpr):
    """Return how many splits a row with `kv_len` keys has, of those it sees from a tile's start; none of no keys."""
    begin = first_visible(kv_len - 1, window, chunk) // TILE * TILE
    num_keys = tl.maximum(kv_len - begin, 0)
    size = split_tokens(num_keys)
    return (num_keys + size - 1) // size


@triton.jit
def softcapped(scores, softcap):
    """Return `tanh(scores / softcap) * softcap`, written with what interpreter and compiler both have."""
    return (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap


@triton.jit
def part_of_keys(base, dim_stride, token_at, is_seen, BEGIN: tl.constexpr, DIMS: tl.constexpr, END: tl.constexpr):
    """Load dimensions [BEGIN, BEGIN + DIMS) of a tile's keys, `[DIMS, tokens]`; zeros beyond END and where not seen."""
    dim = BEGIN + tl.arange(0, DIMS)
    is_there = is_seen[None, :]
    if END < BEGIN + DIMS:
        is_there = is_there & (dim < END)[:, None]
    return tl.load(base + token_at[None, :] + dim[:, None] * dim_stride, mask=is_there, other=0.0)


@triton.jit
def part_of_values(base, dim_stride, token_at, is_seen, BEGIN: tl.constexpr, DIMS: tl.constexpr, END: tl.constexpr):
    """Load dimensions [BEGIN, BEGIN + DIMS) of a tile's values, `[tokens, DIMS]`; zeros as for keys."""
    dim = BEGIN + tl.arange(0, DIMS)
    is_there = is_seen[:, None]
    if END < BEGIN + DIMS:
        is_there = is_there & (dim < END)[None, :]
    return tl.load(base + token_at[:, None] + dim[None, :] * dim_stride, mask=is_there, other=0.0)
