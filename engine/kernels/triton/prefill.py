"""Prefill attention: all chunks of a step in one launch, over cached prefix and new tokens alike.

Each program takes one tile of one chunk's rows and one query head, and goes over the keys that these see in tiles that
are fixed by position: a row's bits do not depend on where its chunk was cut. Tiles that all of the rows see as a whole,
most of a long prompt's, are taken without a mask. The longest work comes first.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from engine.kernels.protocol import AttentionOptions, PrefillSpans
from engine.kernels.triton.shapes import compute_dtype, head_shape, prefill_tiling
from engine.kernels.triton.tiles import LOG2_E, UNLIMITED, first_visible, score_factor, take_in, tile_scores

#: How many chunks there may be is part of the kernel: nearly all steps take the one that this makes.
MIN_SPANS: Final = 256


def prefill_attention(
    query: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_tables: torch.Tensor,
    spans: PrefillSpans,
    options: AttentionOptions,
) -> torch.Tensor:
    """Implement `AttentionKernels.prefill_attention`; `spans.table` lies on the query's device."""
    _, num_heads, k_dim = query.shape
    num_kv_heads, block_size, v_dim = k_view.shape[1], k_view.shape[2], v_view.shape[3]
    shape = head_shape(num_heads, num_kv_heads, k_dim, v_dim)
    tiling = prefill_tiling(shape, query.dtype)
    out = query.new_empty(query.shape[0], num_heads, v_dim)
    num_tiles = sum(-(-(span.end - span.begin) // tiling.rows) for span in spans.spans)
    _attend_chunks[(num_tiles, num_heads)](
        query,
        k_view,
        v_view,
        block_tables,
        spans.table,
        options.sinks if options.sinks is not None else query,
        out,
        len(spans.spans),
        options.scaling,
        score_factor(options),
        options.softcap or 0.0,
        options.value_scale,
        options.window or UNLIMITED,
        options.chunk or UNLIMITED,
        query.stride(0),
        query.stride(1),
        *k_view.stride(),
        *v_view.stride(),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        SPANS=max(MIN_SPANS, triton.next_power_of_2(len(spans.spans))),
        GROUP=shape.group,
        K_DIM=k_dim,
        K_MAIN=shape.k_main,
        K_REST=shape.k_rest,
        V_DIM=v_dim,
        V_MAIN=shape.v_main,
        V_REST=shape.v_rest,
        BLOCK_SIZE=block_size,
        ROWS=tiling.rows,
        TILE=tiling.keys,
        HAS_LIMITS=options.window is not None or options.chunk is not None,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_SINKS=options.sinks is not None,
        COMPUTE=compute_dtype(query.dtype),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        enable_fp_fusion=True,
    )
    return out


# Triton compiles these from their source, and takes no annotations but its own. How many chunks there are is not
# specialised on: another step would want the kernel compiled anew.
@triton.jit(do_not_specialize=["num_spans"], do_not_specialize_on_alignment=["spans"])
def _attend_chunks(
    query,
    k_pool,
    v_pool,
    block_tables,
    spans,
    sinks,
    out,
    num_spans,
    scaling,
    factor,
    softcap,
    value_scale,
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
    out_row_stride,
    out_head_stride,
    SPANS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    # Which chunk this tile is of: spans are rows (begin, end, kv_len, slot).
    tile_id, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    span_ids = tl.arange(0, SPANS)
    is_span = span_ids < num_spans
    begins = tl.load(spans + span_ids * 4, mask=is_span, other=0)
    ends = tl.load(spans + span_ids * 4 + 1, mask=is_span, other=0)
    tile_ends = tl.cumsum((ends - begins + ROWS - 1) // ROWS, 0)
    span = tl.sum((tile_ends <= tile_id).to(tl.int32), 0)
    within = tile_id - tl.max(tl.where(tile_ends <= tile_id, tile_ends, 0), 0)
    begin, end = tl.load(spans + span * 4), tl.load(spans + span * 4 + 1)
    kv_len, slot = tl.load(spans + span * 4 + 2), tl.load(spans + span * 4 + 3)
    table = block_tables + slot.to(tl.int64) * table_stride

    row = begin + within * ROWS + tl.arange(0, ROWS)
    is_row = row < end
    position = kv_len - end + row  # of the last row: kv_len - 1
    k_main = tl.arange(0, K_MAIN)
    rows_at = query + row.to(tl.int64)[:, None] * query_row_stride + head * query_head_stride
    q_main = tl.load(rows_at + k_main[None, :], mask=is_row[:, None] & (k_main < K_DIM)[None, :], other=0.0)
    q_main = q_main.to(COMPUTE)
    q_rest = q_main
    if K_REST > 0:
        k_rest = K_MAIN + tl.arange(0, K_REST)
        q_rest = tl.load(rows_at + k_rest[None, :], mask=is_row[:, None] & (k_rest < K_DIM)[None, :], other=0.0)
        q_rest = q_rest.to(COMPUTE)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_main = tl.zeros([ROWS, V_MAIN], tl.float32)
    sum_rest = tl.zeros([ROWS, max(V_REST, 1)], tl.float32)
    kv_head = head // GROUP
    keys, values = k_pool + kv_head * k_head_stride, v_pool + kv_head * v_head_stride
    first = kv_len - end + begin + within * ROWS  # the first row's position
    key_end = tl.minimum(first + ROWS, kv_len)
    # Tiles from where the last row begins to see to where the first one ends are seen by all rows, as a whole.
    key_begin = first_visible(first, window, chunk) // TILE * TILE
    whole_begin = key_begin
    whole_end = tl.maximum((first + 1) // TILE * TILE, key_begin)
    if HAS_LIMITS:
        whole_begin = (first_visible(first + ROWS - 1, window, chunk) + TILE - 1) // TILE * TILE
        whole_begin = tl.minimum(whole_begin, (key_end + TILE - 1) // TILE * TILE)
        whole_end = tl.maximum(whole_end, whole_begin)
    for part in tl.static_range(0 if HAS_LIMITS else 1, 3):
        largest, total, sum_main, sum_rest = _take_tiles(
            key_begin if part == 0 else whole_begin if part == 1 else whole_end,
            whole_begin if part == 0 else whole_end if part == 1 else key_end,
            key_end,
            table,
            position,
            q_main,
            q_rest,
            largest,
            total,
            sum_main,
            sum_rest,
            keys,
            values,
            scaling,
            factor,
            softcap,
            window,
            chunk,
            k_block_stride,
            k_token_stride,
            k_dim_stride,
            v_block_stride,
            v_token_stride,
            v_dim_stride,
            K_DIM,
            K_MAIN,
            K_REST,
            V_DIM,
            V_MAIN,
            V_REST,
            BLOCK_SIZE,
            TILE,
            HAS_LIMITS,
            HAS_SOFTCAP,
            part != 1,
            COMPUTE,
        )
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        with_sink = tl.maximum(largest, sink)
        kept = tl.exp2(largest - with_sink)
        total = total * kept + tl.exp2(sink - with_sink)
        sum_main = sum_main * kept[:, None]
        if V_REST > 0:
            sum_rest = sum_rest * kept[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    v_main = tl.arange(0, V_MAIN)
    out_at = out + row.to(tl.int64)[:, None] * out_row_stride + head * out_head_stride
    is_out = is_row[:, None] & (v_main < V_DIM)[None, :]
    tl.store(out_at + v_main[None, :], (sum_main / total[:, None] * value_scale).to(out.dtype.element_ty), mask=is_out)
    if V_REST > 0:
        v_rest = V_MAIN + tl.arange(0, V_REST)
        is_out = is_row[:, None] & (v_rest < V_DIM)[None, :]
        tl.store(
            out_at + v_rest[None, :], (sum_rest / total[:, None] * value_scale).to(out.dtype.element_ty), mask=is_out
        )


@triton.jit
def _take_tiles(
    begin,
    end,
    key_end,
    table,
    position,
    q_main,
    q_rest,
    largest,
    total,
    sum_main,
    sum_rest,
    keys,
    values,
    scaling,
    factor,
    softcap,
    window,
    chunk,
    k_block_stride,
    k_token_stride,
    k_dim_stride,
    v_block_stride,
    v_token_stride,
    v_dim_stride,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Take in the tiles of keys in [begin, end), of which those below `key_end` are there."""
    for tile in tl.range(begin, end, TILE):
        token = tile + tl.arange(0, TILE)
        is_key = token < key_end
        is_seen = token[None, :] <= position[:, None]
        if HAS_LIMITS:
            is_seen = is_seen & (position[:, None] - token[None, :] < window)
            is_seen = is_seen & (position[:, None] // chunk == token[None, :] // chunk)
        if IS_MASKED:
            block = tl.load(table + token // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        else:
            block = tl.load(table + token // BLOCK_SIZE).to(tl.int64)
        at = token % BLOCK_SIZE
        scores = tile_scores(
            q_main,
            q_rest,
            keys,
            k_dim_stride,
            block * k_block_stride + at * k_token_stride,
            is_key,
            is_seen,
            scaling,
            softcap,
            K_DIM,
            K_MAIN,
            K_REST,
            HAS_SOFTCAP,
            IS_MASKED,
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
            is_key,
            V_DIM,
            V_MAIN,
            V_REST,
            IS_MASKED,
            COMPUTE,
        )
    return largest, total, sum_main, sum_rest
