"""Attention as a GPU's torch computes it, on a CPU: lengths are read on the device, so that steps can be captured."""

from __future__ import annotations

from typing import Any

import torch

from engine.kernels.protocol import AttentionOptions
from engine.kernels.reference import TorchKernels, _decode_padded


class PaddedKernels(TorchKernels):
    """What is to be stored nowhere goes into the pool's last block, which nobody else may have."""

    name = "padded"
    is_capturable = True

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
