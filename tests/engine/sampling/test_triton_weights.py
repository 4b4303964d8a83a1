"""The kernels, interpreted, weigh what torch's operators weigh; with them a device samples what the reference does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import device_draw
from engine.sampling.device_order import keys_of
from engine.sampling.device_weights import TorchWeights
from engine.scheduling.plan import Sampled
from tests.engine.sampling.test_device_sampler import LOGITS, ROWS, check, mixed_rows, rows_of, some_logits

pytest.importorskip("triton", reason="triton is not installed")

from engine.sampling.triton_weights import TritonWeights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture
def by_kernels(monkeypatch):
    monkeypatch.setattr(device_draw, "_weights_kind", lambda device: TritonWeights)


@pytest.mark.parametrize("grain", [0.0, 0.25])
@pytest.mark.parametrize("vocab_size", [17, 2_048, 5_001])
def test_each_question_is_answered_as_by_torch(vocab_size, grain):
    wide = torch.stack([some_logits(vocab_size + 3, i, 2.0, grain, 5, [-0.0, 0.0]) for i in range(3)])
    logits = wide[:, :vocab_size]  # rows that do not lie one behind the other
    tops, temperature = logits.amax(1), torch.tensor([1.0, 0.7, 5.0])
    ours, theirs = (kind(logits, tops, temperature) for kind in (TritonWeights, TorchWeights))
    min_p = torch.tensor([0.0, 0.02, 1.0], dtype=torch.float64)
    for name, found, expected in zip(ours.sums(min_p)._fields, ours.sums(min_p), theirs.sums(min_p), strict=True):
        tolerance = {"num_present": 0, "mass": 1e-6}.get(name, 1e-11)
        assert np.allclose(found, expected, rtol=tolerance, atol=0), name
    keys = keys_of(logits)
    some = keys[:, 7]
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        prefix = some >> (shift + width)
        assert torch.equal(ours.present(prefix, shift, width), theirs.present(prefix, shift, width))
        assert (ours.units(prefix, shift, width) - theirs.units(prefix, shift, width)).abs().max() <= vocab_size
    for found, expected in zip(ours.units_from(some), theirs.units_from(some), strict=True):
        assert (found - expected).abs().max() <= vocab_size


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("grain", [0.0, 0.25])
def test_wide_rows_of_every_kind_give_the_references_tokens(grain):
    rows = mixed_rows(7)
    logits = torch.stack([some_logits(9_001, i, 2.0, grain, 0, []) for i in range(len(rows))])
    assert all(isinstance(outcome, Sampled) for outcome in check(logits, rows))


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(vocab_size=st.sampled_from([17, 257, 3_001]), drawn=ROWS, data=st.data())
def test_every_outcome_is_the_references_to_the_bit(vocab_size, drawn, data):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(device_draw, "_weights_kind", lambda device: TritonWeights)
        logits = torch.stack([some_logits(vocab_size, *data.draw(LOGITS)) for _ in drawn])
        check(logits, rows_of(drawn))


PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.sampling import triton_weights as kernels
types = {"logits": "*fp32", "tops": "*fp32", "temperatures": "*fp32", "min_p": "*fp64", "prefixes": "*i64",
         "keys": "*i64", "found": "*i64", "row_stride": "i32", "vocab_size": "i32"}
spread = [{"SHIFT": 21, "WIDTH": 11, "COUNTS": False}, {"SHIFT": 0, "WIDTH": 10, "COUNTS": True}]
for name, constants in [("_sum_up", {}), *(("_spread", each) for each in spread), ("_sum_from", {})]:
    kernel = getattr(kernels, name)
    constants = {**constants, "BLOCK": kernels.BLOCK}
    signature = {each: types.get(each, "constexpr") for each in kernel.arg_names}
    for capability in (80, 90, 100):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
        found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        print([name, capability, found.metadata.shared, "atom" in found.asm["ptx"] or "red." in found.asm["ptx"]])
"""


def test_the_kernels_are_compiled_for_every_device_without_one():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert len(found) == 12
    assert all(shared <= 48 * 1024 and adds for _, _, shared, adds in found)
