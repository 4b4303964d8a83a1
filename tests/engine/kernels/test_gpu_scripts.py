"""The scripts of benchmarks/gpu/ run dry here: the same code, interpreted and in tiny."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def dry(script: str, *arguments: str) -> str:
    """Run a script dry; return what it prints."""
    command = [sys.executable, f"benchmarks/gpu/{script}", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("script", ["attention.py", pytest.param("operators.py", marks=pytest.mark.long)])
def test_kernels_on_a_gpu_run_dry(script):
    pytest.importorskip("triton", reason="triton is not installed")
    assert dry(script).endswith("dry run: every result is torch's\n")


def test_the_engine_on_a_gpu_runs_dry():
    assert dry("engine.py").endswith("dry run: both give the same tokens\n")


@pytest.mark.long
def test_two_processes_on_a_gpu_run_dry():
    assert dry("two_processes.py").endswith("dry run: the same tokens handed over and in one process\n")


@pytest.mark.long
def test_restoring_on_a_gpu_runs_dry(tmp_path):
    printed = dry("restore.py", "--disk-dir", str(tmp_path))
    assert printed.endswith("dry run: the same tokens from host memory and from disk\n")


@pytest.mark.long
def test_blocks_between_devices_and_the_host_run_dry():
    assert dry("transfer.py").endswith("dry run: every block came whole\n")


@pytest.mark.long
def test_invariance_on_a_gpu_runs_dry():
    pytest.importorskip("triton", reason="triton is not installed")
    printed = dry("invariance.py")
    assert printed.count("the same bits in 2 of 2 sizes") == 2
    assert printed.count("the same bits in 3 of 3 sizes") == 1
    assert printed.endswith("dry run: every way was compared\n")
