"""The checksum of blocks in an accelerator's memory, computed there: the bits that `transport.checksum` defines."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from transport.checksum import LEAF_BYTES, LEAF_LINES, LEAF_WORDS, LINE_BYTES, MIX, NUM_LANES, keys

_LOWER = (1 << 32) - 1
_ABOVE = 1 << 32
_WORD_MASK = (1 << 64) - 1
_GROUP_BYTES = 64 << 20  # of blocks at a time: intermediate results take several times as much


def checksum_words(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Launch the checksum of some blocks, by Triton where it is there, by torch anywhere. Waits for nothing.

    Args:
        rows: the pool, `[num_blocks, block_bytes]` uint8, contiguous, on any device.
        wanted: ids of blocks, `[n]` int64, not empty, on the same device.

    Returns:
        `[n]` int64, on the device: the checksums' bits, see `unsigned`.
    """
    if rows.is_cuda and rows.shape[1] % 8 == 0 and has_triton():
        from engine.memory.triton_checksum import block_checksums, lane_totals

        totals = lane_totals(rows, wanted, device_keys(0, LEAF_WORDS, rows.device))
        return block_checksums(totals, device_keys(rows.shape[1], 1, rows.device))
    group = max(1, _GROUP_BYTES // rows.shape[1])
    totals = torch.cat([_lane_totals(rows[some]) for some in torch.split(wanted, group)])
    value = device_keys(rows.shape[1], 1, rows.device)
    for lane in range(NUM_LANES):
        value = mixed(value ^ totals[:, lane])
    return value


def unsigned(words: Sequence[int]) -> list[int]:
    """Return the numbers in [0, 2^64) with the bits of these."""
    return [word & _WORD_MASK for word in words]


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton is there with what it needs to start a kernel: a C compiler and Python's headers."""
    has_compiler = any(shutil.which(tool) is not None for tool in ("gcc", "clang"))
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return has_compiler and headers.exists() and importlib.util.find_spec("triton") is not None


def mixed(words: torch.Tensor) -> torch.Tensor:
    """Apply `mix` to each word, int64: its arithmetic wraps, its shifts are made logical."""
    for shift, factor in MIX:
        words = (words ^ ((words >> shift) & (_WORD_MASK >> shift))) * _signed(factor)
    return words


def _signed(word: int) -> int:
    """Return the number in [-2^63, 2^63) with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


@functools.cache
def device_keys(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return `key(first)` and following, int64, kept on that device."""
    return torch.from_numpy(keys(first, count).view("<i8")).to(device)


def _lane_totals(rows: torch.Tensor) -> torch.Tensor:
    """Compute each lane's total of each row, `[num_rows, NUM_LANES]` int64, of `[num_rows, num_bytes]` uint8."""
    num_rows, num_bytes = rows.shape
    rows = torch.nn.functional.pad(rows, (0, -num_bytes % LINE_BYTES))
    num_leaves, rest = divmod(rows.shape[1], LEAF_BYTES)
    words = rows.view(torch.int64)
    leaf_keys = device_keys(LEAF_WORDS, num_leaves + 1, rows.device)
    whole = _leaf_sums(words[:, : num_leaves * LEAF_WORDS].reshape(num_rows, num_leaves, LEAF_LINES, NUM_LANES))
    totals = mixed(whole ^ leaf_keys[:num_leaves, None]).sum(dim=1)
    if rest:
        last = _leaf_sums(words[:, num_leaves * LEAF_WORDS :].reshape(num_rows, 1, -1, NUM_LANES))
        totals += mixed(last[:, 0] ^ leaf_keys[num_leaves])
    return totals


def _leaf_sums(leaves: torch.Tensor) -> torch.Tensor:
    """Sum up `[num_rows, num_leaves, num_lines, lanes]` over the lines."""
    line_keys = device_keys(0, LEAF_WORDS, leaves.device).view(LEAF_LINES, NUM_LANES)
    words = leaves ^ line_keys[: leaves.shape[2]]
    return (((words & _LOWER) | _ABOVE) * (((words >> 32) & _LOWER) | _ABOVE)).sum(dim=2)
