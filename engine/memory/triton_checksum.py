"""The checksum on a GPU: one program per leaf, read once, where the blocks lie; then one per block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transport.checksum import GOLDEN, LEAF_LINES, LEAF_WORDS, MIX, NUM_LANES

_LINES = tl.constexpr(LEAF_LINES)
_WORDS = tl.constexpr(LEAF_WORDS)
_LANES = tl.constexpr(NUM_LANES)
_GOLDEN = tl.constexpr(GOLDEN)
_LOWER = tl.constexpr((1 << 32) - 1)
_ABOVE = tl.constexpr(1 << 32)
_SHIFT_0, _SHIFT_1, _SHIFT_2 = (tl.constexpr(shift) for shift, _ in MIX)
_FACTOR_0, _FACTOR_1, _ = (tl.constexpr(factor) for _, factor in MIX)


def lane_totals(rows: torch.Tensor, block_ids: torch.Tensor, line_keys: torch.Tensor) -> torch.Tensor:
    """Compute each lane's total of each block, `[num_wanted, NUM_LANES]` int64.

    Args:
        rows: `[num_blocks, block_bytes]` uint8, contiguous, whole words.
        block_ids: `[num_wanted]` int64, on the same device.
        line_keys: the keys of a leaf's words, `[LEAF_WORDS]` int64, on the same device.
    """
    words = rows.view(torch.int64)
    num_leaves = triton.cdiv(words.shape[1], LEAF_WORDS)
    totals = torch.zeros(len(block_ids), NUM_LANES, dtype=torch.int64, device=rows.device)
    _add_leaf[(len(block_ids) * num_leaves,)](words, block_ids, line_keys, totals, words.shape[1], num_leaves)
    return totals


def block_checksums(totals: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Fold the lanes' totals of each block, `[num_wanted, NUM_LANES]` int64, into its checksum, `[num_wanted]` int64.

    `seed`: the key of a block's length, `[1]` int64, on the same device.
    """
    checksums = totals.new_empty(len(totals))
    _fold[(len(totals),)](totals, seed, checksums)
    return checksums


# Triton compiles these from their source, and takes no annotations but its own.
@triton.jit
def _mix(word):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    word = (word ^ (word >> _SHIFT_0)) * _FACTOR_0
    word = (word ^ (word >> _SHIFT_1)) * _FACTOR_1
    return word ^ (word >> _SHIFT_2)


@triton.jit
def _add_leaf(words, block_ids, line_keys, totals, block_words, num_leaves):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = (tl.program_id(0) // num_leaves).to(tl.int64)
    leaf = (tl.program_id(0) % num_leaves).to(tl.int64)
    place = tl.arange(0, _WORDS)
    at = leaf * _WORDS + place
    begin = tl.load(block_ids + row) * block_words
    word = tl.load(words + begin + at, mask=at < block_words, other=0) ^ tl.load(line_keys + place)
    word = word.to(tl.uint64, bitcast=True)
    product = ((word & _LOWER) | _ABOVE) * ((word >> 32) | _ABOVE)
    filled_words = (block_words + _LANES - 1) // _LANES * _LANES  # the last line is filled up with zeros
    sums = tl.sum(tl.reshape(tl.where(at < filled_words, product, 0), (_LINES, _LANES)), axis=0)
    leaf_key = _mix((leaf + (_WORDS + 1)).to(tl.uint64) * _GOLDEN)
    total = _mix(sums ^ leaf_key).to(tl.int64, bitcast=True)
    tl.atomic_add(totals + row * _LANES + tl.arange(0, _LANES), total)


@triton.jit
def _fold(totals, seed, checksums):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(seed).to(tl.uint64, bitcast=True)
    for lane in tl.static_range(_LANES):
        value = _mix(value ^ tl.load(totals + row * _LANES + lane).to(tl.uint64, bitcast=True))
    tl.store(checksums + row, value.to(tl.int64, bitcast=True))
