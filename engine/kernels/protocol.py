"""What attention kernels do: the one interface that `engine.kernels.reference`, `cpu` and whatever comes implement.

A kernel's reduction order may depend on the sequence's own length and position only, never on the rest of the batch:
the same token computed twice then gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.memory.kv_pool import LayerSpec


@dataclass(frozen=True, slots=True)
class LayerUse:
    """How one layer uses attention, as measured by a probe: kernels decide by it whether they serve the layer."""

    spec: LayerSpec
    num_heads: int
    window: int | None = None  #: sliding window, tokens
    chunk: int | None = None  #: attends within aligned chunks of this many tokens (llama4)
    softcap: float | None = None
    has_sinks: bool = False


class AttentionKernels(Protocol):
    """One implementation of the three operations. Chosen once per layer, at load.

    Views are the pool's: `k_view [num_blocks, num_kv_heads, block_size, k_dim]`, `v_view` likewise with v_dim, each
    head's `[block_size, dim]` contiguous, block strides beyond 2^31 elements possible. Query head h reads KV head
    `h // (num_heads // num_kv_heads)`. `query`, `key` and `value` may be strided views; their last dimension is
    contiguous.
    `window`: position i sees j with `i - j < window`. `chunk`: with `i // chunk == j // chunk`. `softcap`: scores
    become `tanh(s / softcap) * softcap`. `sinks [num_heads]`: one more score per head in the softmax's sum.
    """

    @property
    def name(self) -> str:
        """Enters block names: the same name must mean the same bits."""
        ...

    def supports(self, layer: LayerUse, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether all three operations serve such a layer."""
        ...

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_ids: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Store `key [T, num_kv_heads, k_dim]`, `value` at `(block_ids[t], offsets[t])`, both `[T]` int64."""
        ...

    def decode_attention(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_tables: torch.Tensor,
        slots: torch.Tensor,
        kv_lens: torch.Tensor,
        *,
        max_kv_len: int,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        chunk: int | None,
    ) -> torch.Tensor:
        """Each row is a token of one sequence, which sees keys `[0, kv_lens[i])` of it.

        Args:
            query: `[n, num_heads, k_dim]`.
            k_view: the layer's keys.
            v_view: the layer's values.
            block_tables: `[num_slots, max_blocks]` int32; what follows a sequence's last block is any block's id.
            slots: `[n]` int64, the table that each row reads. Rows may share tables, and tables blocks.
            kv_lens: `[n]` int32.
            max_kv_len: largest of `kv_lens`, on the host.
            scaling: factor on scores.
            window: see the class.
            softcap: see the class.
            sinks: see the class.
            chunk: see the class.

        Returns:
            `[n, num_heads, v_dim]`, dtype of the query.
        """
        ...

    def prefill_attention(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_table: torch.Tensor,
        kv_len: int,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        chunk: int | None,
    ) -> torch.Tensor:
        """One chunk of one sequence; query row i is position `kv_len - T + i` and sees keys up to itself.

        Args: as in `decode_attention`, with `query [T, num_heads, k_dim]` and `block_table [num_blocks]` int32
            covering `kv_len` tokens.

        Returns:
            `[T, num_heads, v_dim]`, dtype of the query.
        """
        ...
