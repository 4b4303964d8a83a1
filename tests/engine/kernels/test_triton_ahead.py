"""Every Triton kernel compiled ahead of time, without a GPU, within written limits of a multiprocessor."""

from __future__ import annotations

import ast
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
    for usage in compiled(SHAPES[name], getattr(torch, sys.argv[1]), int(sys.argv[2])):
        print(dataclasses.asdict(usage) | {"shape": name})
"""
REGISTERS = 65536  #: of a multiprocessor
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  #: that one program may take
#: Programs that fit a multiprocessor side by side, of heads less wide: what hides the time that memory takes.
AT_ONCE = {"attend_splits": 2, "attend_chunks": 1, "merge_splits": 4, "write": 16}
SPILLED_BYTES = 32  #: of each thread, where heads are as wide as DeepSeek's; elsewhere none
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
        is_wide = usage["shape"] == "DeepSeek V3, absorbed"
        assert usage["spilled_bytes"] <= (SPILLED_BYTES if is_wide else 0), usage
        at_once = 1 if is_wide else AT_ONCE[usage["kernel"]]
        assert usage["registers"] * usage["num_threads"] * at_once <= REGISTERS, usage
        assert usage["shared_bytes"] * at_once <= SHARED_BYTES[usage["capability"]], usage
        if usage["kernel"] == "attend_splits":
            assert usage["is_pipelined"], usage


@pytest.mark.parametrize(("capability", "shapes"), [(80, ALL[:1]), (90, [*ALL[:1], *ALL[2:3], *ALL[6:7]])], ids=str)
def test_kernels_fit_a_multiprocessor(capability, shapes):
    found = usages("bfloat16", capability, shapes)
    assert {usage["kernel"] for usage in found} == set(AT_ONCE)
    assert_within_limits(found)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_of_every_shape_fit_every_multiprocessor(dtype, capability):
    assert_within_limits(usages(dtype, capability, ALL))
