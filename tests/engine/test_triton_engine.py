"""The whole engine on Triton's kernels, interpreted: token for token what the CPU's kernels give."""

from __future__ import annotations

import dataclasses
import random

import pytest

from engine.model.fused import fuse_modules
from engine.model.fused_layer import fuse_layers
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


def prompts_of(case):
    rng = random.Random(case)
    return [[rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in (41, 5, 18)]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_cpu_path(tmp_path, case):
    kernels = triton_kernels()
    family, overrides = FAMILIES[case]
    loaded = load_model(make_tiny_model(tmp_path, family, eos_token_id=None, **overrides), dtype="float32")
    prompts = prompts_of(case)
    ours = dataclasses.replace(loaded, kernels=(kernels,) * len(loaded.kernels))
    assert all(kernels.supports(layer, loaded.dtype, loaded.device) for layer in loaded.layers)
    assert answers(ours, prompts) == answers(loaded, prompts)


#: What is fused of four layers: norms, gates, attentions, whole layers.
FUSED = {
    "llama": (9, 4, 4, 4),
    "qwen3": (17, 4, 4, 4),
    "gemma3_text": (25, 4, 4, 0),
    "deepseek_v3, MLA": (17, 4, 0, 0),
    "phi3": (9, 0, 0, 0),
}


def test_tokens_of_fused_modules_over_float8_are_those_of_plain_ones(tmp_path):
    kernels = triton_kernels()
    from engine.kernels.triton.operators import TRITON_OPERATORS

    directory = make_tiny_model(tmp_path, eos_token_id=None, num_hidden_layers=2)
    how = {"dtype": "float32", "kv_cache_dtype": "fp8", "use_kernels": False}
    plain, loaded = load_model(directory, **how), load_model(directory, **how)
    assert fuse_modules(loaded.model, TRITON_OPERATORS).attentions == fuse_layers(loaded.model) == 2
    ours = dataclasses.replace(loaded, kernels=(kernels,) * 2)
    tokens = []
    for one in (plain, ours):
        bench = Bench(one, num_blocks=8)
        tokens.append(bench.run([bench.add(str(n), prompt[:12]) for n, prompt in enumerate(prompts_of("two"))], 3, 20))
    assert tokens[0] == tokens[1]


@pytest.mark.long
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("case", FUSED)
def test_tokens_of_fused_modules_are_those_of_plain_ones(tmp_path, case, kv_cache_dtype):
    kernels = triton_kernels()
    from engine.kernels.triton.operators import TRITON_OPERATORS

    family, overrides = FAMILIES[case]
    directory = make_tiny_model(tmp_path, family, eos_token_id=None, **overrides)
    how = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype, "use_kernels": False}
    wanted = answers(load_model(directory, **how), prompts_of(case))
    loaded = load_model(directory, **how)
    found = fuse_modules(loaded.model, TRITON_OPERATORS)
    assert (found.norms, found.gates, found.attentions, fuse_layers(loaded.model)) == FUSED[case]
    ours = dataclasses.replace(loaded, kernels=(kernels,) * len(loaded.kernels))
    assert answers(ours, prompts_of(case)) == wanted
