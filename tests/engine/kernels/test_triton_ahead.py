"""Every Triton kernel compiled ahead of time, without a GPU, within written limits of a multiprocessor."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PROGRAM = """
import dataclasses, sys, torch
from engine.kernels.triton.ahead import SHAPES, compiled
for name in sys.argv[3:]:
    kind, _, kept = sys.argv[1].partition("/")
    for usage in compiled(SHAPES[name], getattr(torch, kind), int(sys.argv[2]), is_float8=kept == "float8"):
        print(dataclasses.asdict(usage) | {"shape": name})
"""
REGISTERS = 65536  #: of a multiprocessor
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  #: that one program may take
OF_KV = {"attend_splits", "attend_chunks", "merge_splits", "write", "rotate_write"}
SPILLED_BYTES = 32  #: of each thread, where heads are as wide as DeepSeek's, or the device is a B200; elsewhere none
ALL = [
    "Llama 3 8B",
    "Llama 3.2 1B",
    "Gemma 3",
    "Phi 3",
    "GPT-OSS",
    "DeepSeek V3, expanded",
    "DeepSeek V3, absorbed",
    "StarCoder, one KV head",
]


def usages(dtype, capability, shapes):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", PROGRAM, dtype, str(capability), *shapes]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


def assert_within_limits(found):
    for usage in found:
        may_spill = usage["shape"] == "DeepSeek V3, absorbed" or usage["capability"] == 100
        assert usage["spilled_bytes"] <= (SPILLED_BYTES if may_spill else 0), usage
        registers = -(-usage["registers"] // 8) * 8  # as they are given out
        assert registers * usage["num_threads"] * usage["programs"] <= REGISTERS, usage
        assert usage["shared_bytes"] * usage["programs"] <= SHARED_BYTES[usage["capability"]], usage
        if usage["kernel"] == "attend_splits":
            assert usage["is_pipelined"], usage


@pytest.mark.parametrize(("capability", "shapes"), [(80, ALL[:1]), (90, [*ALL[:1], *ALL[2:3], *ALL[6:7]])], ids=str)
def test_kernels_fit_a_multiprocessor(capability, shapes):
    found = usages("bfloat16", capability, shapes)
    assert {usage["kernel"] for usage in found} == OF_KV | {"rms_norm", "gate"}
    assert_within_limits(found)


def test_kernels_over_float8_fit_a_multiprocessor():
    found = usages("bfloat16/float8", 90, ALL[:1])
    assert {usage["kernel"] for usage in found} == OF_KV
    assert_within_limits(found)


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        *itertools.product(["bfloat16", "float16"], SHARED_BYTES),
        *itertools.product(["bfloat16/float8", "float16/float8"], [90, 100]),
    ],
)
def test_kernels_of_every_shape_fit_every_multiprocessor(dtype, capability):
    assert_within_limits(usages(dtype, capability, ALL))
