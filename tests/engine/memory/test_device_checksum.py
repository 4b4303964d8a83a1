"""What accelerators compute is the same checksum, to the bit: torch's operators and Triton's kernel, on a CPU here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine.memory.device_checksum
from engine.memory.device_checksum import checksum_words, unsigned
from transport.checksum import checksum

WANTED = [4, 0, 2, 2]
BLOCK_BYTES = [1, 7, 8, 30, 64, 72, 4096, 4104, 8192, 12296, 70_000]


def pool(block_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (5, block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def computed(rows: torch.Tensor) -> list[int]:
    return unsigned(checksum_words(rows, torch.tensor(WANTED)).tolist())


def wanted(rows: torch.Tensor) -> list[int]:
    return [checksum(rows[block_id].numpy()) for block_id in WANTED]


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_torchs_operators_give_the_same_bits(block_bytes):
    rows = pool(block_bytes)
    assert computed(rows) == wanted(rows)


def test_blocks_are_taken_in_groups_that_fit_and_come_out_in_order(monkeypatch):
    monkeypatch.setattr(engine.memory.device_checksum, "_GROUP_BYTES", 3 * 4096)
    rows = pool(4096)
    assert computed(rows) == wanted(rows)


@pytest.mark.parametrize("fill", [0, 255])
def test_blocks_of_one_byte_have_the_same_bits_too(fill):
    rows = torch.full((5, 8192), fill, dtype=torch.uint8)
    assert computed(rows) == wanted(rows)


# Whether kernels are interpreted is decided when triton is imported: in a process of its own.
INTERPRETED = """
import torch
from engine.memory import device_checksum
from engine.memory.triton_checksum import block_checksums, lane_totals
from tests.engine.memory.test_device_checksum import BLOCK_BYTES, WANTED, pool, wanted

for block_bytes in BLOCK_BYTES:
    if block_bytes % 8 == 0:
        rows = pool(block_bytes)
        keys = device_checksum.device_keys(0, 512, rows.device)
        found = lane_totals(rows, torch.tensor(WANTED), keys)
        assert torch.equal(found, device_checksum._lane_totals(rows[WANTED])), block_bytes
        words = block_checksums(found, device_checksum.device_keys(block_bytes, 1, rows.device)).tolist()
        assert device_checksum.unsigned(words) == wanted(rows), block_bytes
print("same bits")
"""


@pytest.mark.slow
def test_tritons_kernel_gives_the_same_bits():
    pytest.importorskip("triton", reason="triton is not installed")
    root = Path(__file__).parents[3]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout == "same bits\n", done.stderr[-2000:]
