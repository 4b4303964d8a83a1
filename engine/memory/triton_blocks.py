"""Whole blocks gathered out of a pool on a GPU, and scattered into it: one launch, no number read back to the host.

Torch's index_select and index_copy_ would do the same; they take as much of the GPU as there is, an element of a thread
at a time. Here a bounded number of programs goes over all pieces, so that most multiprocessors stay free for the step
that runs beside: what is staged leaves by PCIe or a link, which a few of them fill.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Programs that share out the pieces, each of four warps: more than a link to the host takes in.
NUM_PROGRAMS = 32
#: Words of a piece: 16 KiB of 8 bytes each, 16 of a thread.
_PIECE_WORDS = 2048
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def gather_blocks(
    pool_rows: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor, num_programs: int = NUM_PROGRAMS
) -> None:
    """Copy `pool_rows[block_ids]` to `out`, on the current stream.

    Args:
        pool_rows: `[num_blocks, block_bytes]` uint8, contiguous.
        block_ids: `[n]` int64 on the same device.
        out: `[n, block_bytes]` uint8, contiguous, on the same device.
        num_programs: how many share the work out.
    """
    _copy(pool_rows, block_ids, out, num_programs, is_gather=True)


def scatter_blocks(
    pool_rows: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor, num_programs: int = NUM_PROGRAMS
) -> None:
    """Copy `blocks` `[n, block_bytes]` to `pool_rows[block_ids]`, no id twice; all else is as in `gather_blocks`."""
    _copy(pool_rows, block_ids, blocks, num_programs, is_gather=False)


def _copy(
    pool_rows: torch.Tensor, block_ids: torch.Tensor, rows: torch.Tensor, num_programs: int, *, is_gather: bool
) -> None:
    if not len(block_ids):
        return
    word = next(word for word in _WORDS if pool_rows.shape[1] % word.itemsize == 0)
    pool, rows = pool_rows.view(word), rows.view(word)
    num_pieces = len(block_ids) * triton.cdiv(pool.shape[1], _PIECE_WORDS)
    copying: Any = _copy_pieces  # Triton's decorator leaves no types
    copying[(min(num_programs, num_pieces),)](
        pool, block_ids, rows, len(block_ids), pool.shape[1], PIECE=_PIECE_WORDS, IS_GATHER=is_gather, num_warps=4
    )


# Triton compiles this from its source, and takes no annotations but its own.
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _copy_pieces(  # type: ignore[no-untyped-def]  # noqa: ANN202
    pool,  # noqa: ANN001
    block_ids,  # noqa: ANN001
    rows,  # noqa: ANN001
    num_rows,  # noqa: ANN001
    row_words,  # noqa: ANN001
    PIECE: tl.constexpr,  # noqa: N803
    IS_GATHER: tl.constexpr,  # noqa: N803
):
    pieces_of_row = (row_words + PIECE - 1) // PIECE
    piece = tl.program_id(0)
    while piece < num_rows * pieces_of_row:
        row = (piece // pieces_of_row).to(tl.int64)
        word = piece % pieces_of_row * PIECE + tl.arange(0, PIECE)
        in_pool = pool + tl.load(block_ids + row) * row_words + word
        in_rows = rows + row * row_words + word
        if IS_GATHER:
            tl.store(in_rows, tl.load(in_pool, mask=word < row_words), mask=word < row_words)
        else:
            tl.store(in_pool, tl.load(in_rows, mask=word < row_words), mask=word < row_words)
        piece += tl.num_programs(0)
