"""Checksums of blocks: against accidents on the way, not against attackers (they travel over the encrypted channel).

xxh3_64 for pools in host memory: 40 GB/s from the cache and 12 to 15 from memory where it was measured (docs/LOG.md),
the fastest that was tried. For pools on an accelerator a weighted sum, which torch computes there, and anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
import xxhash

from engine.memory.kv_pool import KvPool
from kvcache.pool import BlockPool

Algorithm: TypeAlias = Literal["xxh3_64", "sum64"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

_WORD_BYTES = 8
_MASK = (1 << 64) - 1
_ODD = -7046029254386353131  # 2^64 over the golden ratio, as a signed number: spreads bits (Knuth, TAOCP 6.4)
_ODD_PLACE = -4942790177534074879  # 2^64 times sqrt(3) - 1, about; signed, odd


class BlockChecksums:
    """Checksums of the blocks of one pool; those to be published are remembered until the block is reused."""

    def __init__(self, pool: BlockPool, kv_pool: KvPool) -> None:
        self._pool = pool
        self._rows = kv_pool.data.view(torch.uint8)  # [num_blocks, block_bytes]
        self._host_rows = self._rows.numpy() if kv_pool.device.type == "cpu" else np.empty((0, 0), np.uint8)
        self._known: dict[int, tuple[int, int]] = {}  # block id -> (generation, checksum)
        #: of the checksums that are published
        self.algorithm: Algorithm = "xxh3_64" if kv_pool.device.type == "cpu" else "sum64"

    def published(self, block_ids: Sequence[int]) -> list[int]:
        """Return the checksums of written blocks, in order. Any thread; nobody may write these blocks meanwhile."""
        generation = self._pool.generation
        lacking = [b for b in block_ids if self._known.get(b, (None, 0))[0] != generation(b)]
        for block_id, checksum in zip(lacking, self.compute(lacking, self.algorithm), strict=True):
            self._known[block_id] = (generation(block_id), checksum)
        return [self._known[block_id][1] for block_id in block_ids]

    def compute(self, block_ids: Sequence[int], algorithm: Algorithm) -> list[int]:
        """Compute the checksums of what these blocks hold now, not negative, below 2^64. Any thread."""
        if not block_ids:
            return []
        if algorithm == "sum64":
            return sum64(self._rows[torch.tensor(block_ids, device=self._rows.device)])
        if self._rows.device.type == "cpu":
            return [self.hash_block(block_id) for block_id in block_ids]
        copied = self._rows[torch.tensor(block_ids, device=self._rows.device)].cpu().numpy()
        return [xxhash.xxh3_64_intdigest(row) for row in copied]

    def hash_block(self, block_id: int) -> int:
        """Compute xxh3_64 of one block in host memory: about a microsecond besides the hashing itself. Any thread."""
        return xxhash.xxh3_64_intdigest(self._host_rows[block_id])


def sum64(rows: torch.Tensor) -> list[int]:
    """Compute a 64-bit checksum of each row: its mixed words times odd weights, and its length, summed modulo 2^64.

    Args:
        rows: `[num_rows, num_bytes]` uint8, contiguous, on any device; padded with zeros to whole words of 8 bytes.
    """
    lacking = -rows.shape[1] % _WORD_BYTES
    if lacking:
        rows = torch.nn.functional.pad(rows, (0, lacking))
    words = rows.view(torch.int64)  # arithmetic wraps
    # Positions are mixed with another constant than words, or a value at a place would count as a place at a value.
    weights = _mixed(torch.arange(1, words.shape[1] + 1, dtype=torch.int64, device=words.device), _ODD_PLACE) | 1
    sums = _mixed((_mixed(words) * weights).sum(dim=1) + (words.shape[1] + 1))
    return [int(value) & _MASK for value in sums.tolist()]


def _mixed(words: torch.Tensor, factor: int = _ODD) -> torch.Tensor:
    """Mix words by a bijection in which every bit reaches many: xor with the upper bits, multiply, xor again."""
    words = words ^ ((words >> 32) & 0xFFFFFFFF)
    words = words * factor
    return words ^ ((words >> 29) & ((1 << 35) - 1))
