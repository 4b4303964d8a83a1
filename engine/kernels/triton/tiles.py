"""What both attention kernels share: which keys a row sees, how its sequence is split, and what a tile of keys adds.

Positions count from the sequence's start. A row's result depends on its own position alone: keys are taken in tiles
and splits that are fixed by it, whatever the batch or the cut of the prompt.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from engine.kernels.protocol import AttentionOptions

#: Keys of one split of decode attention, at least; twice as many where a row would have more than MAX_SPLITS.
MIN_SPLIT_TOKENS = 256
MAX_SPLITS = 64
#: "None" of a window or a chunk: beyond every position.
UNLIMITED = 1 << 30

LOG2_E = tl.constexpr(math.log2(math.e))
_MIN_SPLIT = tl.constexpr(MIN_SPLIT_TOKENS)
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
#: So often a split doubles: sequences of up to 2**30 tokens.
_DOUBLINGS = tl.constexpr(16)


def score_factor(options: AttentionOptions) -> float:
    """Return what `tile_scores` are to be multiplied by, above 0; with a softcap they are scaled already."""
    return math.log2(math.e) * (1.0 if options.softcap is not None else options.scaling)


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
def tile_scores(
    q_main,
    q_rest,
    keys,
    dim_stride,
    token_at,
    is_key,
    is_seen,
    scaling,
    softcap,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Score rows `[rows, K_MAIN]`, and `[rows, K_REST]` where there is a rest, by a tile's keys: `[rows, tokens]`.

    Scores times `score_factor` of the options are logarithms to base 2 of weights; they are -inf where a row does not
    see a key. Keys lie at `token_at [tokens]` from `keys`; where not `is_key [tokens]` nothing is read. Where not
    IS_MASKED, all rows see all keys, which changes no bit.
    """
    tile = _tile_part(keys, dim_stride, token_at, is_key, 0, K_MAIN, K_DIM, IS_MASKED).to(COMPUTE)
    scores = tl.dot(q_main, tl.trans(tile), input_precision="ieee")
    if K_REST > 0:
        tile = _tile_part(keys, dim_stride, token_at, is_key, K_MAIN, K_REST, K_DIM, IS_MASKED).to(COMPUTE)
        scores = tl.dot(q_rest, tl.trans(tile), scores, input_precision="ieee")
    if HAS_SOFTCAP:  # tanh, written with what interpreter and compiler both have
        scores = (2.0 * tl.sigmoid(2.0 * (scores * scaling) / softcap) - 1.0) * softcap
    if IS_MASKED:
        scores = tl.where(is_seen, scores, float("-inf"))
    return scores


@triton.jit
def take_in(
    scores,
    factor,
    largest,
    total,
    sum_main,
    sum_rest,
    values,
    dim_stride,
    token_at,
    is_key,
    V_DIM: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    IS_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Add a tile's values, weighted by `scores [rows, tokens]` times `factor`, to what rows have so far.

    That is the largest score and the sum of weights beside it, `[rows]`, and the weighted sums of values,
    `[rows, V_MAIN]` and, where there is a rest, `[rows, V_REST]`; they are returned as they are then.

    Products that are added to something are said to be one operation: left to the compiler, a loop with masks could
    round otherwise than one without.
    """
    new_largest = tl.maximum(largest, tl.max(scores, 1) * factor)
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # of a row that has seen no key yet
    kept = tl.exp2(largest - base)
    weights = tl.exp2(tl.fma(scores, factor, -base[:, None]))
    total = tl.fma(total, kept, tl.sum(weights, 1))
    weights = weights.to(COMPUTE)
    tile = _tile_part(values, dim_stride, token_at, is_key, 0, V_MAIN, V_DIM, IS_MASKED).to(COMPUTE)
    sum_main = tl.dot(weights, tile, sum_main * kept[:, None], input_precision="ieee")
    if V_REST > 0:
        tile = _tile_part(values, dim_stride, token_at, is_key, V_MAIN, V_REST, V_DIM, IS_MASKED).to(COMPUTE)
        sum_rest = tl.dot(weights, tile, sum_rest * kept[:, None], input_precision="ieee")
    return new_largest, total, sum_main, sum_rest


@triton.jit
def _tile_part(
    base,
    dim_stride,
    token_at,
    is_token,
    BEGIN: tl.constexpr,
    DIMS: tl.constexpr,
    END: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Load dimensions [BEGIN, BEGIN + DIMS) of a tile, `[tokens, DIMS]`; zeros beyond END and where no token is."""
    dim = BEGIN + tl.arange(0, DIMS)
    at = base + token_at[:, None] + dim[None, :] * dim_stride
    if IS_MASKED:
        is_there = is_token[:, None]
        if END < BEGIN + DIMS:
            is_there = is_there & (dim < END)[None, :]
        tile = tl.load(at, mask=is_there, other=0.0)
    elif END < BEGIN + DIMS:
        tile = tl.load(at, mask=(dim < END)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile
