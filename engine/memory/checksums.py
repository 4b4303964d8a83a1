"""Checksums of the blocks of one pool: `transport.checksum`, computed where the blocks lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.memory.device_checksum import device_checksums
from engine.memory.kv_pool import KvPool
from kvcache.pool import BlockPool
from transport.checksum import checksum, copy_checked


class BlockChecksums:
    """Checksums of the blocks of one pool; those to be published are remembered until the block is reused."""

    def __init__(self, pool: BlockPool, kv_pool: KvPool) -> None:
        self._pool = pool
        self._rows = kv_pool.data.view(torch.uint8)  # [num_blocks, block_bytes]
        self._host_rows = self._rows.numpy() if kv_pool.device.type == "cpu" else None
        self._known: dict[int, tuple[int, int]] = {}  # block id -> (generation, checksum)

    def published(self, block_ids: Sequence[int]) -> list[int]:
        """Return the checksums of written blocks, in order. Any thread; nobody may write these blocks meanwhile."""
        generation = self._pool.generation
        lacking = [b for b in block_ids if self._known.get(b, (None, 0))[0] != generation(b)]
        for block_id, value in zip(lacking, self.compute(lacking), strict=True):
            self._known[block_id] = (generation(block_id), value)
        return [self._known[block_id][1] for block_id in block_ids]

    def copy_out(self, block_id: int, target: memoryview, offset: int) -> int:
        """Copy a block to `offset` of `target`, and return the checksum of what was copied. Any thread."""
        num_bytes = self._rows.shape[1]
        if self._host_rows is not None:
            return copy_checked(target[offset : offset + num_bytes], self._host_rows[block_id])
        return copy_checked(target[offset : offset + num_bytes], self._rows[block_id].cpu().numpy())

    def compute(self, block_ids: Sequence[int]) -> list[int]:
        """Compute the checksums of what these blocks hold now. Any thread."""
        if self._host_rows is not None:
            return [checksum(self._host_rows[block_id]) for block_id in block_ids]
        return device_checksums(self._rows, block_ids)
