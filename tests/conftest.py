"""Shared by all tests: the repository root is importable, torch is quiet about cores."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def one_thread():
    """Torch on one thread: tests share their machine, and bits then do not depend on its cores."""
    import torch

    torch.set_num_threads(1)
