"""benchmarks/gpu/invariance.py runs dry here: the same code, interpreted and in tiny."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[3]


def test_invariance_on_a_gpu_runs_dry():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "benchmarks/gpu/invariance.py", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("the same bits in 3 of 3 sizes") == 3
    assert done.stdout.endswith("dry run: every way was compared\n")
