"""Gather and scatter of whole blocks, interpreted on this CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interpreted import triton_kernels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def blocks():
    triton_kernels()
    from engine.memory import triton_blocks

    return triton_blocks


@settings(max_examples=8, deadline=None)
@given(
    block_bytes=st.sampled_from([1, 6, 36, 4096, 16384, 16392, 50000]),
    ids=st.lists(st.integers(0, 8), unique=True, max_size=6),
    num_programs=st.integers(1, 9),
)
def test_blocks_come_out_and_go_in_as_torch_indexes_them(blocks, block_bytes, ids, num_programs):
    pool = torch.randint(256, (9, block_bytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    index = torch.tensor(ids, dtype=torch.int64)
    out = torch.zeros(len(ids), block_bytes, dtype=torch.uint8)
    blocks.gather_blocks(pool, index, out, num_programs)
    assert torch.equal(out, pool[index])
    wanted, target = torch.zeros_like(pool), torch.zeros_like(pool)
    wanted[index] = out
    blocks.scatter_blocks(target, index, out, num_programs)
    assert torch.equal(target, wanted)
