"""Shared by all tests: the repository root is importable, torch is quiet about cores."""

import logging
import os
import sys
from pathlib import Path

import pytest

# Triton's kernels run interpreted in tests, which its import decides, whoever imports it first.
os.environ["TRITON_INTERPRET"] = "1"

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


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny model."""
    from tests.models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model_dir):
    """What plain transformers makes of the model at `model_dir`, which may be a module's own."""
    from tests.reference import Reference

    return Reference(model_dir)
