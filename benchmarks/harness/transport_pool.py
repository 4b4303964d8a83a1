"""Where the two processes of benchmarks/transport.py start: a pool's bytes, and a path that has the rooms."""

from __future__ import annotations

import os

import numpy as np

from harness.report import ROOT
from transport.memory import Memory


def filled(num_bytes: int, seed: int) -> Memory:
    """Make host memory with bytes that depend on nothing but the seed; every page is touched."""
    memory = Memory.allocate(num_bytes)
    words = np.frombuffer(memory.view, np.uint64)  # [num_bytes / 8]
    rng = np.random.default_rng(seed)
    for first in range(0, len(words), 1 << 20):
        part = words[first : first + (1 << 20)]
        part[:] = rng.integers(0, 1 << 64, len(part), dtype=np.uint64)
    return memory


def python_path() -> str:
    """Return a PYTHONPATH with the rooms first: benchmarks has modules of the same names."""
    return os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
