"""What attention kernels do: the one interface that `engine.kernels.reference`, `cpu` and whatever comes implement.

A kernel's order of summation may depend on a row's own position and on the keys and values that it sees, never on the
rest of the batch nor on how a prompt was cut into chunks: the same token computed twice then gives the same bits.
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


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How a layer attends. Of two limits on what a position sees both hold."""

    scaling: float  #: factor on scores
    window: int | None = None  #: position i sees j with `i - j < window`
    softcap: float | None = None  #: scores become `tanh(s / softcap) * softcap`
    sinks: torch.Tensor | None = None  #: `[num_heads]`, one more score per head in the softmax's sum
    chunk: int | None = None  #: position i sees j with `i // chunk == j // chunk`


class AttentionKernels(Protocol):
    """One implementation of the three operations. Chosen once per layer, at load.

    Views are the pool's: `k_view [num_blocks, num_kv_heads, block_size, k_dim]`, `v_view` the same with v_dim, each
    head's `[block_size, dim]` contiguous, block strides beyond 2^31 elements possible. Query head h reads KV head
    `h // (num_heads // num_kv_heads)`. `query`, `key` and `value` may be strided views; their last dimension is
    contiguous.
    """

    @property
    def name(self) -> str:
        """Name of the kernels, for people; block names go by the bits that come out (`engine/model/bits.py`)."""
        ...

    def supports(self, layer: LayerUse, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether all three operations serve such a layer."""
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
        """Store the keys and values of T tokens in the pool.

        Args:
            key: `[T, num_kv_heads, k_dim]`, of the pool's dtype.
            value: `[T, num_kv_heads, v_dim]`, of the pool's dtype.
            k_view: the layer's keys, written in place.
            v_view: the layer's values, written in place.
            block_ids: `[T]` int64, the block that each token goes to.
            offsets: `[T]` int64, its place within that block.
        """
        ...

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
        """Attend with n decode rows: row i is a token of one sequence, and sees keys `[0, kv_lens[i])` of it.

        Args:
            query: `[n, num_heads, k_dim]`.
            k_view: the layer's keys.
            v_view: the layer's values.
            block_tables: `[num_slots, max_blocks]` int32; what follows a sequence's last block is any block's id.
            slots: `[n]` int64, the table that each row reads. Rows may share tables, and tables blocks.
            kv_lens: `[n]` int32.
            max_kv_len: largest of `kv_lens`, on the host.
            options: how the layer attends.

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
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attend with one chunk of one sequence: row i is position `kv_len - T + i`, and sees keys up to itself.

        `query` is `[T, num_heads, k_dim]`, `block_table` `[num_blocks]` int32 and covers `kv_len` tokens; the others
        are as in `decode_attention`.

        Returns:
            `[T, num_heads, v_dim]`, dtype of the query.
        """
        ...
