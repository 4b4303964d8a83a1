"""The scripts of benchmarks/gpu/ run dry here: the same code, interpreted and in tiny."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def test_attention_on_a_gpu_runs_dry():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "benchmarks/gpu/attention.py", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("dry run: every result is torch's\n")


def test_blocks_between_devices_and_the_host_run_dry():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/transfer.py", "--dry-run"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("dry run: every block came whole\n")
