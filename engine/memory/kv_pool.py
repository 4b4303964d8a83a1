"""The paged pool's tensors: per-layer K and V views over one buffer of blocks, and how many blocks fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from kvcache.region import BlockNumbers, NumberKind
from messages.errors import ConfigError
from transport.memory import available_bytes

#: Part of every block name: changes whenever the bytes of a block, or their checksum (transport.checksum), mean
#: something else.
LAYOUT_VERSION = 2


_KINDS: Final[dict[torch.dtype, NumberKind]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer keeps per token, after rotary embedding and before heads are repeated for grouped queries."""

    num_kv_heads: int
    k_dim: int
    v_dim: int

    @property
    def token_elements(self) -> int:
        """Numbers kept per token, K and V together."""
        return self.num_kv_heads * (self.k_dim + self.v_dim)


def block_elements(layer_specs: Sequence[LayerSpec], block_size: int) -> int:
    """Return how many numbers are in one block: `block_size` tokens of every layer."""
    return block_size * sum(spec.token_elements for spec in layer_specs)


def block_bytes(layer_specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block: `block_size` tokens of every layer."""
    return block_elements(layer_specs, block_size) * dtype.itemsize


def block_numbers(layer_specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> BlockNumbers:
    """Tell what the bytes of a block are to who has no torch. See KvPool."""
    dims = [dim for spec in layer_specs for dim in [spec.k_dim] * spec.num_kv_heads + [spec.v_dim] * spec.num_kv_heads]
    groups = tuple((len(list(same)), dim) for dim, same in itertools.groupby(dims))
    return BlockNumbers(_KINDS[dtype], block_size, groups)


class KvPool:
    """All blocks of one worker, and each layer's view of them.

    A block is one run of bytes: for each layer in order K `[num_kv_heads, block_size, k_dim]`, then V
    `[num_kv_heads, block_size, v_dim]`. Copying a block's row moves its tokens of all layers.

    Attributes:
        data: `[num_blocks, block_elements]`, dtype.
        k: per layer `[num_blocks, num_kv_heads, block_size, k_dim]`, strided views of `data`.
        v: per layer `[num_blocks, num_kv_heads, block_size, v_dim]`, strided views of `data`.
    """

    def __init__(
        self,
        layer_specs: Sequence[LayerSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        memory: memoryview | None = None,
        num_blocks: int | None = None,
    ) -> None:
        """Lay the pool out in `memory`, or allocate `num_blocks` zeroed blocks on `device`.

        Args:
            layer_specs: one per layer.
            block_size: tokens per block.
            dtype: of K and V.
            device: where the blocks lie.
            memory: writable bytes on a CPU, a whole number of blocks; kept alive, never copied.
            num_blocks: how many, where there is no `memory`.

        Raises:
            ValueError: `memory` is not a whole number of blocks, or not exactly one of the two is given.
        """
        self.layer_specs = tuple(layer_specs)
        self.block_size = block_size
        self.dtype = dtype
        self.block_bytes = block_bytes(layer_specs, block_size, dtype)
        elements = block_elements(layer_specs, block_size)
        if (memory is None) == (num_blocks is None):
            raise ValueError("a pool needs either memory or a number of blocks")
        if memory is not None:
            count, rest = divmod(memory.nbytes, self.block_bytes)
            if rest or count == 0:
                raise ValueError(
                    f"pool memory of {memory.nbytes} bytes is not a whole number of blocks of {self.block_bytes} bytes"
                )
            self.data = torch.frombuffer(memory, dtype=dtype).view(count, elements)
        else:
            self.data = torch.zeros(num_blocks or 0, elements, dtype=dtype, device=device)
        self.num_blocks = self.data.shape[0]
        self.device = self.data.device
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        offset = 0
        for spec in self.layer_specs:
            for views, dim in ((self.k, spec.k_dim), (self.v, spec.v_dim)):
                shape = (self.num_blocks, spec.num_kv_heads, block_size, dim)
                views.append(self.data.as_strided(shape, (elements, block_size * dim, dim, 1), offset))
                offset += spec.num_kv_heads * block_size * dim

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Copy these blocks out of the pool: `[len(block_ids), block_elements]`, the pool's dtype."""
        return self.data[torch.tensor(block_ids, dtype=torch.int64, device=self.device)]

    def write_blocks(self, block_ids: Sequence[int], blocks: torch.Tensor) -> None:
        """Put `blocks` `[len(block_ids), block_elements]` where `read_blocks` would read them."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        self.data.index_copy_(0, index, blocks.to(self.device))


def host_room(*, kv_cache_bytes: int | None, kv_cache_share: float) -> int:
    """Return the bytes that a pool gets in the host's memory: `kv_cache_bytes` if given, else a share of what is free.

    Raises:
        ConfigError: the explicit size exceeds what is free.
    """
    free = available_bytes()
    if kv_cache_bytes is None:
        return int(free * kv_cache_share)
    if kv_cache_bytes > free:
        raise ConfigError(f"a KV pool of {kv_cache_bytes} bytes was asked for and {free} bytes are free")
    return kv_cache_bytes


def plan_num_blocks(
    *, block_bytes: int, block_size: int, max_model_len: int, room_bytes: int, max_blocks: int | None = None
) -> int:
    """Compute how many blocks a pool gets.

    Args:
        block_bytes: of one block.
        block_size: tokens per block.
        max_model_len: longest sequence, tokens; it must fit into the pool alone.
        room_bytes: what the pool may take.
        max_blocks: never more than this.

    Raises:
        ConfigError: one sequence of `max_model_len` tokens does not fit.
    """
    num_blocks = room_bytes // block_bytes
    if max_blocks is not None:
        num_blocks = min(num_blocks, max_blocks)
    needed = -(-max_model_len // block_size)
    if num_blocks < needed:
        shorter = f", or lower max_model_len to {num_blocks * block_size}" if num_blocks else ""
        raise ConfigError(
            f"too little memory for one sequence: {max_model_len} tokens need {needed * block_bytes} bytes "
            f"({needed} blocks of {block_bytes}), the KV pool gets {num_blocks * block_bytes}; "
            f"give the pool more memory{shorter}"
        )
    return num_blocks
