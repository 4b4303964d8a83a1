"""Checksums of the blocks of one pool: `transport.checksum`, computed where the blocks lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.memory.device_checksum import device_checksums
from engine.memory.kv_pool import KvPool
from kvcache.pool import BlockPool
from transport.checksum import checksum, copy_all_checked
from transport.protocol import Copy


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

    def known(self, block_id: int) -> int | None:
        """Return the checksum that a block was published with; None where it was not."""
        generation, value = self._known.get(block_id, (None, 0))
        return value if generation == self._pool.generation(block_id) else None

    def copy_out(self, block_ids: Sequence[int], target: memoryview, offsets: Sequence[int]) -> list[int]:
        """Copy blocks to these offsets of `target`; return the checksums of what was copied, in order. Any thread."""
        rows, numbers = self._host_rows, block_ids
        if rows is None:
            rows, numbers = self._rows[list(block_ids)].cpu().numpy(), range(len(block_ids))
        size = rows.shape[1]
        copies = [Copy(number * size, offset, size) for number, offset in zip(numbers, offsets, strict=True)]
        return copy_all_checked(target, rows.reshape(-1), copies)

    def compute(self, block_ids: Sequence[int]) -> list[int]:
        """Compute the checksums of what these blocks hold now. Any thread."""
        if self._host_rows is not None:
            return [checksum(self._host_rows[block_id]) for block_id in block_ids]
        return device_checksums(self._rows, block_ids)
