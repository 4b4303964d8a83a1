"""Shared by all tests: the repository root is importable, torch is quiet about cores."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def one_thread():
    """Torch on one thread: tests share their machine, and bits then do not depend on its cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logs_as_before():
    """A command line that a test runs logs to that test's streams, which are closed after it."""
    from cluster.logs import ROOMS

    rooms = [logging.getLogger(room) for room in ROOMS]
    before = [(room.handlers[:], room.level, room.propagate) for room in rooms]
    yield
    for room, (handlers, level, propagates) in zip(rooms, before, strict=True):
        room.handlers[:] = handlers
        room.setLevel(level)
        room.propagate = propagates
