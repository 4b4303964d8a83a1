"""New keys and values into their slots, as they are or, in the same pass, with rotary embedding."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from engine.kernels.protocol import KvScales

#: Numbers of a program, about: some heads of one token.
_NUMBERS: Final = 2048
_ONE: Final = KvScales(1.0, 1.0)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
    scales: KvScales | None = None,
) -> None:
    """Implement `AttentionKernels.write_kv`; a token whose block id is negative is stored nowhere."""
    num_tokens, num_kv_heads, k_dim = key.shape
    k_padded, v_padded = triton.next_power_of_2(k_dim), triton.next_power_of_2(value.shape[2])
    heads = heads_of(num_kv_heads, max(k_padded, v_padded))
    scales = scales or _ONE
    _write[(num_tokens, triton.cdiv(num_kv_heads, heads))](
        key,
        value,
        k_view,
        v_view,
        block_ids,
        offsets,
        1.0 / scales.k,
        1.0 / scales.v,
        *key.stride()[:2],
        *value.stride()[:2],
        *k_view.stride(),
        *v_view.stride(),
        KV_HEADS=num_kv_heads,
        HEADS=heads,
        K_DIM=k_dim,
        K_PADDED=k_padded,
        V_DIM=value.shape[2],
        V_PADDED=v_padded,
        IS_FLOAT8=k_view.dtype == torch.float8_e4m3fn,
        num_warps=2,
        enable_fp_fusion=False,
    )


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
    scales: KvScales | None = None,
) -> None:
    """Rotate `query` in place; store `key`, rotated, and `value` as `write_kv` does. `key` itself stays as it is.

    Of each head the elements i and i + r / 2 turn together, i < r / 2, each operation rounded to the query's dtype as
    torch's operators do.

    Args:
        query: `[T, num_heads, k_dim]`, last dimension contiguous.
        key: `[T, num_kv_heads, k_dim]`, likewise.
        value: `[T, num_kv_heads, v_dim]`, likewise.
        cosine: `[T, r]`, r at most k_dim; what is left stays. Contiguous, as `sine` is.
        sine: `[T, r]`.
        k_view: the layer's keys, written in place.
        v_view: the layer's values, written in place.
        block_ids: `[T]` int64.
        offsets: `[T]` int64.
        scales: of a float8 pool.
    """
    num_tokens, num_heads, k_dim = query.shape
    num_kv_heads, v_dim = value.shape[1:]
    half = cosine.shape[-1] // 2
    rest = k_dim - 2 * half
    k_padded = 2 * triton.next_power_of_2(half) + (triton.next_power_of_2(rest) if rest else 0)
    heads = heads_of(max(num_heads, num_kv_heads), max(k_padded, triton.next_power_of_2(v_dim)))
    scales = scales or _ONE
    _rotate_write[(num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads))](
        query,
        key,
        value,
        cosine,
        sine,
        k_view,
        v_view,
        block_ids,
        offsets,
        1.0 / scales.k,
        1.0 / scales.v,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *k_view.stride(),
        *v_view.stride(),
        NUM_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEADS=heads,
        HALF=half,
        HALF_PADDED=triton.next_power_of_2(half),
        REST=rest,
        REST_PADDED=triton.next_power_of_2(max(rest, 1)),
        V_DIM=v_dim,
        V_PADDED=triton.next_power_of_2(v_dim),
        IS_FLOAT8=k_view.dtype == torch.float8_e4m3fn,
        num_warps=2,
        enable_fp_fusion=False,
    )


def heads_of(num_heads: int, padded: int) -> int:
    """Return how many of so many heads, `padded` numbers each, a program takes: a power of two."""
    wanted: int = triton.next_power_of_2(num_heads)
    return min(wanted, max(1, _NUMBERS // padded))


# Triton compiles these from their source, and takes no annotations but its own. Where a step's numbers lie follows from
# how many there are, and is not specialised on.
@triton.jit
def rotated(first, second, cosine, sine, dim, HALF: tl.constexpr):
    """Turn elements `dim` of heads, `first`, together with those HALF behind, `second`; both `[heads, dims]`.

    `cosine` and `sine` are a token's, `[2 * HALF]` in memory.
    """
    kind = first.dtype
    one, other = first.to(tl.float32), second.to(tl.float32)
    is_there = dim < HALF
    cos_first = tl.load(cosine + dim, mask=is_there, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cosine + HALF + dim, mask=is_there, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sine + dim, mask=is_there, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sine + HALF + dim, mask=is_there, other=0.0).to(tl.float32)[None, :]
    turned = (one * cos_first).to(kind).to(tl.float32) - (other * sin_first).to(kind).to(tl.float32)
    turned_second = (other * cos_second).to(kind).to(tl.float32) + (one * sin_second).to(kind).to(tl.float32)
    return turned.to(kind), turned_second.to(kind)


@triton.jit
def _stored(numbers, inverse_scale, IS_FLOAT8: tl.constexpr, POOL: tl.constexpr):
    """Return `numbers` as the pool keeps them: of float8 the nearest number, of two the even one.

    Rounded by hand, so that the conversion itself is exact: the interpreter's rounds wrongly (3.9).
    """
    if IS_FLOAT8:
        scaled = numbers.to(tl.float32) * inverse_scale
        size = tl.abs(scaled)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        tiny = (size + 24576.0) - 24576.0  # of which a float32's last bit is 2**-9
        nearest = tl.minimum(tl.where(size < 0.015625, tiny, normal), 448.0)
        sign = scaled.to(tl.int32, bitcast=True) & -0x80000000  # zeros have one, too
        nearest = (nearest.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        numbers = tl.where(scaled == scaled, nearest, scaled)  # what is no number stays none
    return numbers.to(POOL)


@triton.jit
def _copy_heads(
    rows,
    places,
    inverse_scale,
    dim,
    row_head_stride,
    head_stride,
    dim_stride,
    head,
    is_copied,
    IS_FLOAT8: tl.constexpr,
):
    """Store elements `dim` of heads, which lie at `rows`, at `places`."""
    numbers = tl.load(rows + head[:, None] * row_head_stride + dim[None, :], mask=is_copied, other=0.0)
    at = places + head[:, None] * head_stride + dim[None, :] * dim_stride
    tl.store(at, _stored(numbers, inverse_scale, IS_FLOAT8, places.dtype.element_ty), mask=is_copied)


@triton.jit(do_not_specialize_on_alignment=["block_ids", "offsets"])
def _write(
    key,
    value,
    k_pool,
    v_pool,
    block_ids,
    offsets,
    inverse_k_scale,
    inverse_v_scale,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    k_block_stride,
    k_head_stride,
    k_token_stride,
    k_dim_stride,
    v_block_stride,
    v_head_stride,
    v_token_stride,
    v_dim_stride,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    is_head = (head < KV_HEADS)[:, None]
    block = tl.load(block_ids + token)
    if block >= 0:
        offset = tl.load(offsets + token)
        dim = tl.arange(0, K_PADDED)
        _copy_heads(
            key + token * key_row_stride,
            k_pool + block * k_block_stride + offset * k_token_stride,
            inverse_k_scale,
            dim,
            key_head_stride,
            k_head_stride,
            k_dim_stride,
            head,
            is_head & (dim < K_DIM)[None, :],
            IS_FLOAT8,
        )
        dim = tl.arange(0, V_PADDED)
        _copy_heads(
            value + token * value_row_stride,
            v_pool + block * v_block_stride + offset * v_token_stride,
            inverse_v_scale,
            dim,
            value_head_stride,
            v_head_stride,
            v_dim_stride,
            head,
            is_head & (dim < V_DIM)[None, :],
            IS_FLOAT8,
        )


@triton.jit(do_not_specialize_on_alignment=["block_ids", "offsets"])
def _rotate_write(
    query,
    key,
    value,
    cosine,
    sine,
    k_pool,
    v_pool,
    block_ids,
    offsets,
    inverse_k_scale,
    inverse_v_scale,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    k_block_stride,
    k_head_stride,
    k_token_stride,
    k_dim_stride,
    v_block_stride,
    v_head_stride,
    v_token_stride,
    v_dim_stride,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
):
    # Programs of a token: first those that turn heads of the query, then those that store heads of KV.
    token = tl.program_id(0).to(tl.int64)
    cosine += token * (2 * HALF)
    sine += token * (2 * HALF)
    dim = tl.arange(0, HALF_PADDED)
    query_programs: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    if tl.program_id(1) < query_programs:
        head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        is_turned = (head < NUM_HEADS) & (dim < HALF)[None, :]
        at = query + token * query_row_stride + head * query_head_stride + dim[None, :]
        first, second = tl.load(at, mask=is_turned, other=0.0), tl.load(at + HALF, mask=is_turned, other=0.0)
        first, second = rotated(first, second, cosine, sine, dim, HALF)
        tl.store(at, first, mask=is_turned)
        tl.store(at + HALF, second, mask=is_turned)
    else:
        block = tl.load(block_ids + token)
        if block >= 0:
            offset = tl.load(offsets + token)
            head = ((tl.program_id(1) - query_programs) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
            is_head = (head < KV_HEADS)[:, None]
            is_turned = is_head & (dim < HALF)[None, :]
            keys = key + token * key_row_stride
            at = keys + head[:, None] * key_head_stride + dim[None, :]
            first, second = tl.load(at, mask=is_turned, other=0.0), tl.load(at + HALF, mask=is_turned, other=0.0)
            first, second = rotated(first, second, cosine, sine, dim, HALF)
            kind = k_pool.dtype.element_ty
            places = k_pool + block * k_block_stride + offset * k_token_stride
            at = places + head[:, None] * k_head_stride + dim[None, :] * k_dim_stride
            tl.store(at, _stored(first, inverse_k_scale, IS_FLOAT8, kind), mask=is_turned)
            tl.store(at + HALF * k_dim_stride, _stored(second, inverse_k_scale, IS_FLOAT8, kind), mask=is_turned)
            if REST > 0:
                rest = 2 * HALF + tl.arange(0, REST_PADDED)
                _copy_heads(
                    keys,
                    places,
                    inverse_k_scale,
                    rest,
                    key_head_stride,
                    k_head_stride,
                    k_dim_stride,
                    head,
                    is_head & (rest < 2 * HALF + REST)[None, :],
                    IS_FLOAT8,
                )
            value_dim = tl.arange(0, V_PADDED)
            _copy_heads(
                value + token * value_row_stride,
                v_pool + block * v_block_stride + offset * v_token_stride,
                inverse_v_scale,
                value_dim,
                value_head_stride,
                v_head_stride,
                v_dim_stride,
                head,
                is_head & (value_dim < V_DIM)[None, :],
                IS_FLOAT8,
            )
