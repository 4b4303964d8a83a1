"""What the two processes of transport.py start from: a pool's bytes, and a path on which the rooms are found."""

from __future__ import annotations

import os

import numpy as np

from harness.report import ROOT
from transport.memory import Memory


def filled(num_bytes: int, seed: int) -> Memory:
    """Host memory with bytes that depend on nothing but the seed; every page touched."""
    memory = Memory.allocate(num_bytes)
    words = np.frombuffer(memory.view, np.uint64)  # [num_bytes / 8]
    rng = np.random.default_rng(seed)
    for first in range(0, len(words), 1 << 20):
        part = words[first : first + (1 << 20)]
        part[:] = rng.integers(0, 1 << 64, len(part), dtype=np.uint64)
    return memory


def python_path() -> str:
    """The rooms first: benchmarks has modules of its own."""
    return os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
