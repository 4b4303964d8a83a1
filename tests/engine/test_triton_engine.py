"""The whole engine on Triton's kernels, interpreted: token for token what the CPU's kernels give."""

from __future__ import annotations

import dataclasses
import random

import pytest

from engine.model.load import load_model
from tests.engine.model.test_families import FAMILIES
from tests.interpreted import triton_kernels
from tests.models import VOCAB_SIZE, make_tiny_model
from tests.steps import Bench

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NUM_OUTPUT = 5
#: With a window and sinks, and with keys wider than values; the others are tried by `make test-long`.
SOME = ("gpt_oss, sinks", "deepseek_v3, MLA")
CASES = [case if case in SOME else pytest.param(case, marks=pytest.mark.long) for case in FAMILIES]


def answers(loaded, prompts):
    """Tokens of three prompts packed with chunked prefill, then of one that goes on from what the first left."""
    bench = Bench(loaded, num_blocks=64)
    sequences = [bench.add(str(number), prompt) for number, prompt in enumerate(prompts)]
    first = bench.run(sequences, NUM_OUTPUT, max_step_tokens=24)
    again = bench.add("again", [*sequences[0].token_ids, 7, 8, 9], held=sequences[0])
    return [*first, *bench.run([again], NUM_OUTPUT)]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_cpu_path(tmp_path, case):
    kernels = triton_kernels()
    family, overrides = FAMILIES[case]
    loaded = load_model(make_tiny_model(tmp_path, family, eos_token_id=None, **overrides), dtype="float32")
    rng = random.Random(case)
    prompts = [[rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in (41, 5, 18)]
    ours = dataclasses.replace(loaded, kernels=(kernels,) * len(loaded.kernels))
    assert all(kernels.supports(layer, loaded.dtype, loaded.device) for layer in loaded.layers)
    assert answers(ours, prompts) == answers(loaded, prompts)
