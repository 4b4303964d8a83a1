"""Attention as a GPU's torch computes it, on a CPU: lengths are read on the device, so that steps can be captured."""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.protocol import AttentionOptions
from engine.kernels.reference import TorchKernels, _decode_padded


class PaddedKernels(TorchKernels):
    """Keeps what `AttentionKernels.is_capturable` promises, by operators of torch alone."""

    name = "padded"
    is_capturable = True

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_ids: torch.Tensor,
        offsets: torch.Tensor,
        *_: object,
    ) -> None:
        """Padding writes what is in block 0 there; it comes last in a step, so it is stored first."""
        is_there = (block_ids >= 0)[:, None, None]
        at = block_ids.clamp(min=0), offsets
        for new, view in ((key, k_view), (value, v_view)):
            tokens = view.transpose(1, 2)
            rows = torch.where(is_there, new, tokens[at])
            tokens.index_put_((at[0].flip(0), at[1].flip(0)), rows.flip(0))

    def decode_attention(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_tables: torch.Tensor,
        slots: torch.Tensor,
        kv_lens: torch.Tensor,
        max_kv_len: int,
        options: AttentionOptions,
    ) -> torch.Tensor:
        rows: tuple[Any, ...] = (query, k_view, v_view, block_tables, slots, kv_lens, max_kv_len, options)
        return torch.nan_to_num(_decode_padded(*rows))
