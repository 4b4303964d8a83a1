"""Checksums of the blocks of one pool: `transport.checksum`, computed where the blocks lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.memory.device_checksum import device_checksums
from engine.memory.kv_pool import KvPool
from kvcache.pool import BlockPool
from transport.checksum import checksum, copy_all_checked
from transport.protocol import Copy

#: The generation of no block: they begin below 2^62.
_NEVER = (1 << 64) - 1


class BlockChecksums:
    """Checksums of the blocks of one pool; those to be published are remembered until the block is reused."""

    def __init__(self, pool: BlockPool, kv_pool: KvPool) -> None:
        self._pool = pool
        self._rows = kv_pool.data.view(torch.uint8)  # [num_blocks, block_bytes]
        self._host_rows = self._rows.numpy() if kv_pool.device.type == "cpu" else None
        self._known = np.zeros(kv_pool.num_blocks, np.uint64)  # of each block, when it had that generation
        self._known_generations = np.full(kv_pool.num_blocks, _NEVER, np.uint64)

    def published(self, block_ids: npt.ArrayLike) -> npt.NDArray[np.uint64]:
        """Return the checksums of written blocks, in order. Any thread; nobody may write these blocks meanwhile."""
        ids = np.asarray(block_ids, np.uint32)
        generations = self._pool.generations(ids)
        lacking = self._known_generations[ids] != generations
        if lacking.any():
            numbers = ids[lacking]
            self._known[numbers] = self.compute(numbers.tolist())
            self._known_generations[numbers] = generations[lacking]  # last: another thread may look
        known: npt.NDArray[np.uint64] = self._known[ids]
        return known

    def known(self, block_id: int) -> int | None:
        """Return the checksum that a block was published with; None where it was not."""
        is_known = self._known_generations[block_id] == self._pool.generation(block_id)
        return int(self._known[block_id]) if is_known else None

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
