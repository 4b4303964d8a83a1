"""Huge pages change nothing but speed; freed buffers come back with fewer page faults."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.kernels.cpu.memory import use_huge_pages

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Linux's memory")]

# A step's pattern of buffers, in a thread of its own as the engine's steps are, after a round to warm up.
SCRIPT = """
import resource, sys, threading, torch
from engine.kernels.cpu.memory import keep_freed_buffers
if sys.argv[1] == "keep" and not keep_freed_buffers():
    sys.exit("not with this libc")

def buffer(megabytes):
    return torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)

def steps(count):
    x = buffer(6)
    for _ in range(count):
        attention = buffer(6), buffer(2), buffer(2)
        gate, up = buffer(23), buffer(23)
        x = buffer(6)

def run():
    steps(5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def test_what_lies_in_huge_pages_keeps_its_place_and_content():
    weights = torch.arange(16 << 20, dtype=torch.int32)  # 64 MiB
    want, address = weights.clone(), weights.data_ptr()
    use_huge_pages()
    assert weights.data_ptr() == address
    assert torch.equal(weights, want)


def test_a_buffer_that_was_freed_comes_back_with_fewer_page_faults():
    def faults(mode):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, cwd=Path(__file__).parents[3]
        )
        if "not with this libc" in done.stderr:
            pytest.skip("not with this libc")
        return int(done.stdout)

    assert faults("keep") < faults("leave") / 2
