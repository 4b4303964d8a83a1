"""Attention over the paged pool, as transformers' models call it.

A model's attention layers call `paged_attention` (registered with transformers as ATTENTION_NAME). It stores the
step's new K and V in the pool, then computes decode rows and prefill chunks with the layer's `AttentionKernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from engine.kernels.protocol import (
    AttentionKernels,
    AttentionOptions,
    KvScales,
    LayerUse,
    PoolWrite,
    PrefillSpans,
)
from engine.kernels.reference import TORCH_KERNELS

#: Registered as an attention function but *not* as a mask function: transformers then builds no [T, T] mask.
ATTENTION_NAME = "kvray"

_ONE = KvScales(1.0, 1.0)


def choose_kernels(
    layers: Sequence[LayerUse], dtype: torch.dtype, device: torch.device, candidates: Sequence[AttentionKernels] = ()
) -> list[AttentionKernels]:
    """Choose for each layer the first of `candidates` that serves it, else torch's own operators."""
    return [
        next((kernels for kernels in candidates if kernels.supports(layer, dtype, device)), TORCH_KERNELS)
        for layer in layers
    ]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The facts about one layer that `paged_attention` needs."""

    k_view: torch.Tensor
    v_view: torch.Tensor
    kernels: AttentionKernels
    chunk: int | None
    scales: KvScales | None = None  #: of float8 views


@dataclass(frozen=True, slots=True)
class StepAttention:
    """One packed step as attention sees it: rows `[0, num_decode_rows)` decode, the rest prefill chunks."""

    layers: Sequence[LayerAttention]
    block_ids: torch.Tensor  #: [T] int64, where each new token is stored
    offsets: torch.Tensor  #: [T] int64, within its block
    num_decode_rows: int
    block_tables: torch.Tensor  #: [num_slots, max_blocks] int32
    slots: torch.Tensor  #: [num_decode_rows] int64, the table of each decode row
    kv_lens: torch.Tensor  #: [num_decode_rows] int32
    max_kv_len: int
    spans: PrefillSpans | None  #: chunks of the rows behind those that decode; None: there are none
    kept_rows: torch.Tensor | None = None  #: [rows] int64 whose logits are wanted; None: all. Nobody reads the others'
    on_layer: Callable[[], None] | None = None  #: called before each layer is computed


_current_step: ContextVar[StepAttention] = ContextVar("current_step")


@contextmanager
def step_attention(step: StepAttention) -> Iterator[None]:
    """Let attention within this context belong to `step`, also where a model does not pass keywords down to it."""
    token = _current_step.set(step)
    try:
        yield
    finally:
        _current_step.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,  # noqa: ARG001  # None, see ATTENTION_NAME
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  # 0 in inference
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kv_step: StepAttention | None = None,
    pool_write: PoolWrite | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Serve transformers' attention call: store the step's K and V, attend through the pool.

    Args:
        module: the attention layer; `layer_idx` says which.
        query: `[1, num_heads, T, k_dim]`, rotary embedding applied, or with `pool_write` yet to be applied, in place.
        key: `[1, num_kv_heads, T, k_dim]`.
        value: `[1, num_kv_heads, T, v_dim]`.
        attention_mask: None (see ATTENTION_NAME).
        scaling: factor on scores; None: `k_dim ** -0.5`.
        dropout: 0 in inference.
        sliding_window: tokens, None: everything before.
        softcap: as `AttentionOptions` says.
        s_aux: sink scores, `[num_heads]`.
        kv_step: the step, where the model passes keywords down.
        pool_write: what stores K and V; None: the layer's kernels.

    Returns:
        `[1, T, num_heads, v_dim]` and None for the weights.
    """
    step = kv_step if kv_step is not None else _current_step.get()
    if step.on_layer is not None:
        step.on_layer()
    layer_index: Any = module.layer_idx
    layer = step.layers[layer_index]
    kernels, k_view, v_view = layer.kernels, layer.k_view, layer.v_view
    rows = query[0].transpose(0, 1)  # [T, num_heads, k_dim]
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    places = (k_view, v_view, step.block_ids, step.offsets, layer.scales)
    if pool_write is None:
        kernels.write_kv(keys, values, *places)
    else:
        pool_write(rows, keys, values, *places)
    scaling = rows.shape[2] ** -0.5 if scaling is None else scaling
    scales = layer.scales or _ONE
    options = AttentionOptions(scaling * scales.k, sliding_window, softcap, s_aux, layer.chunk, scales.v)
    parts = []
    if step.num_decode_rows:
        parts.append(
            kernels.decode_attention(
                rows[: step.num_decode_rows],
                k_view,
                v_view,
                step.block_tables,
                step.slots,
                step.kv_lens,
                step.max_kv_len,
                options,
            )
        )
    if step.spans is not None:
        chunks = rows[step.num_decode_rows :]
        parts.append(kernels.prefill_attention(chunks, k_view, v_view, step.block_tables, step.spans, options))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
