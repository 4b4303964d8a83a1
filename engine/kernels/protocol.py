"""What attention kernels do: the one interface that `engine.kernels.reference`, `cpu` and whatever comes implement.

A kernel's order of summation may depend on a row's own position and on the keys and values that it sees, never on the
rest of the batch nor on how a prompt was cut into chunks: the same token computed twice then gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class PrefillSpan(NamedTuple):
    """One chunk of one sequence: rows `[begin, end)` of a query, the last of them at position `kv_len - 1`."""

    begin: int
    end: int
    kv_len: int
    slot: int  #: whose row of the block tables is the sequence's

    def blocks_of(self, block_tables: torch.Tensor, block_size: int) -> torch.Tensor:
        """Return the sequence's blocks, `[num_blocks]` int32, as far as `kv_len` reaches."""
        return block_tables[self.slot, : -(-self.kv_len // block_size)]


@dataclass(frozen=True, slots=True)
class PrefillSpans:
    """The chunks of one step, on the host and on the device: rows one after the other, without gaps."""

    spans: tuple[PrefillSpan, ...]
    table: torch.Tensor  #: [num_spans, 4] int32, the fields of each

    @classmethod
    def of(cls, spans: Sequence[PrefillSpan], device: torch.device) -> PrefillSpans:
        """Copy `spans` to `device`."""
        table = torch.tensor(spans, dtype=torch.int32).view(-1, len(PrefillSpan._fields))
        return cls(tuple(spans), table.to(device))


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

    @property
    def is_capturable(self) -> bool:
        """Whether `write_kv` and `decode_attention` serve captured steps (`engine/steps/captured.py`).

        They read lengths on the device alone, whatever `max_kv_len` says; tokens whose block id is negative are stored
        nowhere, and rows without keys are 0.
        """
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
        block_tables: torch.Tensor,
        spans: PrefillSpans,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attend with chunks of sequences: row i of a chunk sees keys up to its position, `kv_len - (end - begin) + i`.

        `query` is `[T, num_heads, k_dim]`, all chunks one after the other; the sequences' tables cover their `kv_len`;
        the others are as in `decode_attention`.

        Returns:
            `[T, num_heads, v_dim]`, dtype of the query.
        """
        ...
