"""Whole blocks gathered out of a pool and scattered into it, on whatever device it lies; nothing waits for it."""

from __future__ import annotations

import torch

from engine.memory.device_checksum import has_triton


def gather(rows: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
    """Launch `out[:] = rows[block_ids]`, by Triton where it is there, by torch's operators anywhere.

    Args:
        rows: the pool, `[num_blocks, block_bytes]` uint8, contiguous.
        block_ids: `[n]` int64 on the same device.
        out: `[n, block_bytes]` uint8, contiguous, on the same device.
    """
    if rows.is_cuda and has_triton():
        from engine.memory.triton_blocks import gather_blocks

        gather_blocks(rows, block_ids, out)
    else:
        torch.index_select(_words(rows), 0, block_ids, out=_words(out))


def scatter(rows: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor) -> None:
    """Launch `rows[block_ids] = blocks`, no id twice; all else is as in `gather`."""
    if rows.is_cuda and has_triton():
        from engine.memory.triton_blocks import scatter_blocks

        scatter_blocks(rows, block_ids, blocks)
    else:
        _words(rows).index_copy_(0, block_ids, _words(blocks))


def _words(rows: torch.Tensor) -> torch.Tensor:
    """View rows of bytes as whole words, where they are: an eighth as many numbers to move."""
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows
