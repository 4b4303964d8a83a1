"""Huge pages change nothing but speed; freed buffers come back without page faults."""

import resource
import sys

import pytest
import torch

from engine.kernels.memory import keep_freed_buffers, use_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's memory")


def test_what_lies_in_huge_pages_keeps_its_place_and_content():
    weights = torch.arange(16 << 20, dtype=torch.int32)  # 64 MiB
    want, address = weights.clone(), weights.data_ptr()
    use_huge_pages()
    assert weights.data_ptr() == address
    assert torch.equal(weights, want)


def test_a_buffer_that_was_freed_is_reused_without_page_faults():
    if not keep_freed_buffers():
        pytest.skip("not with this libc")
    num_bytes = 24 << 20
    torch.empty(num_bytes, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(num_bytes, dtype=torch.uint8).fill_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < num_bytes // resource.getpagesize()  # not even one round's worth in ten
