"""The scripts of benchmarks/gpu/ run dry here: the same code, interpreted and in tiny."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("script", ["attention", "operators"])
def test_scripts_for_a_gpu_run_dry(script):
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, f"benchmarks/gpu/{script}.py", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("dry run: every result is torch's\n")
