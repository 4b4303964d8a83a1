"""New keys and values into their slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Implement `AttentionKernels.write_kv`; a token whose block id is negative is stored nowhere."""
    num_tokens, num_kv_heads, k_dim = key.shape
    v_dim = value.shape[2]
    _write[(num_tokens, num_kv_heads)](
        key,
        value,
        k_view,
        v_view,
        block_ids,
        offsets,
        *key.stride()[:2],
        *value.stride()[:2],
        *k_view.stride(),
        *v_view.stride(),
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_PADDED=triton.next_power_of_2(k_dim),
        V_PADDED=triton.next_power_of_2(v_dim),
        num_warps=1,
    )


# Triton compiles this from its source, and takes no annotations but its own.
@triton.jit
def _write(
    key,
    value,
    k_pool,
    v_pool,
    block_ids,
    offsets,
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
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.load(block_ids + token)
    if block >= 0:
        offset = tl.load(offsets + token)
        dim = tl.arange(0, K_PADDED)
        row = tl.load(key + token * key_row_stride + head * key_head_stride + dim, mask=dim < K_DIM)
        at = k_pool + block * k_block_stride + head * k_head_stride + offset * k_token_stride
        tl.store(at + dim * k_dim_stride, row, mask=dim < K_DIM)
        dim = tl.arange(0, V_PADDED)
        row = tl.load(value + token * value_row_stride + head * value_head_stride + dim, mask=dim < V_DIM)
        at = v_pool + block * v_block_stride + head * v_head_stride + offset * v_token_stride
        tl.store(at + dim * v_dim_stride, row, mask=dim < V_DIM)
