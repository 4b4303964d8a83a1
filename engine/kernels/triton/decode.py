"""Decode attention: a fixed number of programs share out splits of all rows' keys, then another kernel merges them.

Lengths are read on the device alone, so that a captured launch serves every mixture of them:

    rows      0: 700 keys           1: 90         2: none
    splits    0 . . | 1 . . | 2 .   0 .                        of MIN_SPLIT_TOKENS or more, by the row's own length
    items     (row, split, KV head) in this order, item i to program i modulo their number
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.protocol import AttentionOptions
from engine.kernels.triton.shapes import compute_dtype, decode_tiling, head_shape, programs_of
from engine.kernels.triton.tiles import (
    LOG2_E,
    MAX_SPLITS,
    MIN_SPLIT_TOKENS,
    UNLIMITED,
    first_visible,
    num_splits,
    score_factor,
    split_tokens,
    take_in,
    tile_scores,
)

#: Rows of a launch: each program counts the splits of all of them.
MAX_ROWS = 1024
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)


def decode_attention(
    query: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Implement `AttentionKernels.decode_attention`; a row with no keys, as a captured step is filled up with, is 0."""
    out = query.new_empty(query.shape[0], query.shape[1], v_view.shape[3])
    for begin in range(0, query.shape[0], MAX_ROWS):
        some = slice(begin, begin + MAX_ROWS)
        _attend(query[some], k_view, v_view, block_tables, slots[some], kv_lens[some], max_kv_len, options, out[some])
    return out


def _attend(
    query: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    options: AttentionOptions,
    out: torch.Tensor,
) -> None:
    num_rows, num_heads, k_dim = query.shape
    num_kv_heads, block_size, v_dim = k_view.shape[1], k_view.shape[2], v_view.shape[3]
    shape = head_shape(num_heads, num_kv_heads, k_dim, v_dim)
    tiling = decode_tiling(shape, query.dtype, is_float8=k_view.dtype == torch.float8_e4m3fn)
    # A split more than keys give: a window may begin within a tile.
    most_splits = min(MAX_SPLITS, -(-max_kv_len // MIN_SPLIT_TOKENS) + 1)
    parts = query.new_empty(num_rows, num_heads, most_splits, v_dim, dtype=torch.float32)
    # Of each split the largest score, and the sum of weights beside it; scores are logarithms to base 2.
    sums = query.new_empty(2, num_rows, num_heads, most_splits, dtype=torch.float32)
    limits = (options.window or UNLIMITED, options.chunk or UNLIMITED)
    _attend_splits[(programs_of(query.device, tiling.programs),)](
        query,
        k_view,
        v_view,
        block_tables,
        slots,
        kv_lens,
        parts,
        sums[0],
        sums[1],
        num_rows,
        most_splits,
        options.scaling,
        score_factor(options),
        options.softcap or 0.0,
        *limits,
        query.stride(0),
        query.stride(1),
        *k_view.stride(),
        *v_view.stride(),
        block_tables.stride(0),
        ROWS=max(16, triton.next_power_of_2(num_rows)),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=shape.group,
        GROUP_PADDED=shape.group_padded,
        K_DIM=k_dim,
        K_MAIN=shape.k_main,
        K_REST=shape.k_rest,
        V_DIM=v_dim,
        V_MAIN=shape.v_main,
        V_REST=shape.v_rest,
        BLOCK_SIZE=block_size,
        TILE=tiling.keys,
        HAS_SOFTCAP=options.softcap is not None,
        COMPUTE=compute_dtype(query.dtype),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        enable_fp_fusion=True,
    )
    _merge_splits[(num_rows, num_heads)](
        parts,
        sums[0],
        sums[1],
        kv_lens,
        options.sinks if options.sinks is not None else sums,
        out,
        most_splits,
        options.value_scale,
        *limits,
        out.stride(0),
        out.stride(1),
        V_DIM=v_dim,
        V_PIECE=min(64, triton.next_power_of_2(v_dim)),
        TILE=tiling.keys,
        HAS_SINKS=options.sinks is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )


# Triton compiles these from their source, and takes no annotations but its own. What follows from the batch is not
# specialised on: another batch would want them compiled anew.
@triton.jit(do_not_specialize=["num_rows", "most_splits"], do_not_specialize_on_alignment=["slots", "kv_lens"])
def _attend_splits(
    query,
    k_pool,
    v_pool,
    block_tables,
    slots,
    kv_lens,
    parts,
    part_max,
    part_sum,
    num_rows,
    most_splits,
    scaling,
    factor,
    softcap,
    window,
    chunk,
    query_row_stride,
    query_head_stride,
    k_block_stride,
    k_head_stride,
    k_token_stride,
    k_dim_stride,
    v_block_stride,
    v_head_stride,
    v_token_stride,
    v_dim_stride,
    table_stride,
    ROWS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row_ids = tl.arange(0, ROWS)
    lens = tl.load(kv_lens + row_ids, mask=row_ids < num_rows, other=0)
    ends = tl.cumsum(num_splits(lens, window, chunk, TILE) * NUM_KV_HEADS, 0)
    num_items = tl.max(ends, 0)
    member = tl.arange(0, GROUP_PADDED)
    is_member = member < GROUP
    k_main = tl.arange(0, K_MAIN)
    item = tl.program_id(0)
    while item < num_items:
        row = tl.sum((ends <= item).to(tl.int32), 0)
        within = item - tl.max(tl.where(ends <= item, ends, 0), 0)
        kv_head, split = within % NUM_KV_HEADS, within // NUM_KV_HEADS
        kv_len = tl.load(kv_lens + row)
        first = first_visible(kv_len - 1, window, chunk)
        begin = first // TILE * TILE
        size = split_tokens(kv_len - begin)
        begin += split * size
        end = tl.minimum(begin + size, kv_len)
        table = block_tables + tl.load(slots + row).to(tl.int64) * table_stride
        heads = kv_head * GROUP + member
        rows_at = query + row.to(tl.int64) * query_row_stride + heads.to(tl.int64)[:, None] * query_head_stride
        q_main = tl.load(rows_at + k_main[None, :], mask=is_member[:, None] & (k_main < K_DIM)[None, :], other=0.0)
        q_main = q_main.to(COMPUTE)
        q_rest = q_main
        if K_REST > 0:
            k_rest = K_MAIN + tl.arange(0, K_REST)
            q_rest = tl.load(rows_at + k_rest[None, :], mask=is_member[:, None] & (k_rest < K_DIM)[None, :], other=0.0)
            q_rest = q_rest.to(COMPUTE)
        largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PADDED], tl.float32)
        sum_main = tl.zeros([GROUP_PADDED, V_MAIN], tl.float32)
        sum_rest = tl.zeros([GROUP_PADDED, max(V_REST, 1)], tl.float32)
        keys, values = k_pool + kv_head * k_head_stride, v_pool + kv_head * v_head_stride
        for tile in tl.range(begin, end, TILE):
            token = tile + tl.arange(0, TILE)
            is_seen = (token >= first) & (token < end)
            block = tl.load(table + token // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
            at = token % BLOCK_SIZE
            scores = tile_scores(
                q_main,
                q_rest,
                keys,
                k_dim_stride,
                block * k_block_stride + at * k_token_stride,
                is_seen,
                is_seen[None, :],
                scaling,
                softcap,
                K_DIM,
                K_MAIN,
                K_REST,
                HAS_SOFTCAP,
                True,
                COMPUTE,
            )
            largest, total, sum_main, sum_rest = take_in(
                scores,
                factor,
                largest,
                total,
                sum_main,
                sum_rest,
                values,
                v_dim_stride,
                block * v_block_stride + at * v_token_stride,
                is_seen,
                V_DIM,
                V_MAIN,
                V_REST,
                True,
                COMPUTE,
            )
        part = (row * (NUM_KV_HEADS * GROUP) + heads).to(tl.int64) * most_splits + split
        tl.store(part_max + part, largest, mask=is_member)
        tl.store(part_sum + part, total, mask=is_member)
        v_main = tl.arange(0, V_MAIN)
        at = parts + part[:, None] * V_DIM
        tl.store(at + v_main[None, :], sum_main, mask=is_member[:, None] & (v_main < V_DIM)[None, :])
        if V_REST > 0:
            v_rest = V_MAIN + tl.arange(0, V_REST)
            tl.store(at + v_rest[None, :], sum_rest, mask=is_member[:, None] & (v_rest < V_DIM)[None, :])
        item += tl.num_programs(0)


@triton.jit(do_not_specialize=["most_splits"], do_not_specialize_on_alignment=["kv_lens"])
def _merge_splits(
    parts,
    part_max,
    part_sum,
    kv_lens,
    sinks,
    out,
    most_splits,
    value_scale,
    window,
    chunk,
    out_row_stride,
    out_head_stride,
    V_DIM: tl.constexpr,
    V_PIECE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    # Always over MAX_SPLITS, those that are not there weighing nothing: the order of the sum is the same for all rows.
    row, head = tl.program_id(0), tl.program_id(1)
    kv_len = tl.load(kv_lens + row)
    split = tl.arange(0, _MAX_SPLITS)
    is_there = split < num_splits(kv_len, window, chunk, TILE)
    part = (row.to(tl.int64) * tl.num_programs(1) + head) * most_splits + split
    largest = tl.load(part_max + part, mask=is_there, other=float("-inf"))
    overall = tl.max(largest, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        overall = tl.maximum(overall, sink)
    overall = tl.where(overall == float("-inf"), 0.0, overall)
    weights = tl.exp2(largest - overall)
    total = tl.sum(weights * tl.load(part_sum + part, mask=is_there, other=0.0), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - overall)
    total = tl.where(total == 0.0, 1.0, total)
    for begin in tl.static_range(0, V_DIM, V_PIECE):
        dim = begin + tl.arange(0, V_PIECE)
        is_read = is_there[:, None] & (dim < V_DIM)[None, :]
        pieces = tl.load(parts + part[:, None] * V_DIM + dim[None, :], mask=is_read, other=0.0)
        result = tl.sum(pieces * weights[:, None], 0) / total * value_scale
        at = out + row.to(tl.int64) * out_row_stride + head * out_head_stride + dim
        tl.store(at, result.to(out.dtype.element_ty), mask=dim < V_DIM)
