"""KV in float8: by torch's operators on this CPU, as far from exact KV as it is said to be, and never taken for it."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch

from engine.core import Engine, EngineOptions
from engine.kernels.protocol import KvScales
from engine.kernels.reference import TORCH_KERNELS
from engine.model.float8 import FLOAT8, scales_of
from engine.model.load import load_model
from messages.errors import ConfigError
from tests.engine.model.test_families import FAMILIES
from tests.models import VOCAB_SIZE, make_tiny_model
from tests.steps import Bench

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("largest", "scale"), [(1.0, 2.0**-5), (32.0, 1.0), (32.5, 2.0), (448.0, 16.0), (1e-4, 2.0**-18), (0.0, 1.0)]
)
def test_the_largest_number_of_a_trial_is_brought_to_32_or_less_by_a_power_of_two(largest, scale):
    numbers = torch.tensor([[[0.0, -largest]], [[largest / 3, 0.0]]])
    assert scales_of([numbers], [numbers * 0]) == [KvScales(scale, 1.0)]
    assert 16.0 < largest / scale <= 32.0 or largest == 0.0


def test_what_is_no_number_gives_no_scale():
    assert scales_of([torch.tensor([float("inf")])], [torch.tensor([float("nan")])]) == [KvScales(1.0, 1.0)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), eos_token_id=None)


def prompts():
    rng = random.Random(0)
    return [[rng.randrange(4, VOCAB_SIZE) for _ in range(length)] for length in (41, 5, 18)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_says_how_far_float8_is_from_exact_kv_and_shares_no_block_with_it(directory, dtype):
    lines = []
    exact = load_model(directory, dtype=dtype)
    loaded = load_model(directory, dtype=dtype, kv_cache_dtype="fp8", on_progress=lines.append)
    assert (exact.kv_dtype, loaded.kv_dtype) == (exact.dtype, FLOAT8)
    assert loaded.fingerprint != exact.fingerprint
    assert loaded.fingerprint == load_model(directory, dtype=dtype, kv_cache_dtype="fp8").fingerprint
    assert loaded.kernels == (TORCH_KERNELS,) * 4
    assert "kv-fp8" in loaded.kernel_path.split("/")
    said, slow = (line for line in lines if line.startswith("KV in float8"))
    found = re.search(rf"logits are (\S+) of their size from eager attention's, (\S+) with KV in {dtype}$", said)
    assert found is not None
    assert 1e-4 < float(found[1]) < 0.1
    assert float(found[2]) < float(found[1])
    assert "on a CPU" in slow


@pytest.mark.slow
def test_tokens_over_float8_do_not_depend_on_the_batch_the_cut_or_what_is_reused(directory):
    loaded = load_model(directory, dtype="float32", kv_cache_dtype="fp8")
    bench = Bench(loaded, num_blocks=64)
    sequences = [bench.add(str(number), prompt) for number, prompt in enumerate(prompts())]
    together = bench.run(sequences, 12, max_step_tokens=24)
    for number, prompt in enumerate(prompts()):
        other = Bench(loaded, num_blocks=64, is_reversed=True)
        assert other.run([other.add("alone", prompt)], 12) == [together[number]]
    again = bench.add("again", prompts()[0], held=sequences[0])
    assert again.num_computed == 32
    assert bench.run([again], 12) == [together[0]]
    away = Bench(loaded, num_blocks=64)
    moved = away.receive(sequences[0], bench)
    assert away.run([moved], 20)[0][:12] == together[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["deepseek_v3, MLA", "gpt_oss, sinks"])
def test_keys_wider_than_values_windows_and_sinks_go_with_float8(tmp_path, case):
    family, overrides = FAMILIES[case]
    loaded = load_model(make_tiny_model(tmp_path, family, **overrides), dtype="float32", kv_cache_dtype="fp8")
    bench = Bench(loaded, num_blocks=16)
    assert len(bench.run([bench.add("one", prompts()[0])], 4)[0]) == 4


@pytest.mark.slow
def test_an_engine_has_twice_the_blocks_in_the_same_memory(directory):
    found = {}
    for kept in ("auto", "fp8"):
        loaded = load_model(directory, dtype="bfloat16", kv_cache_dtype=kept)
        engine = Engine.build(loaded, EngineOptions(kv_cache_bytes=2**20))
        engine.warm_up()
        found[kept] = (engine.layout.num_blocks, engine.layout.block_bytes)
        engine.close()
    assert found == {"auto": (128, 8192), "fp8": (256, 4096)}


def test_a_scale_that_is_far_off_fails_the_trial(directory, monkeypatch):
    monkeypatch.setattr("engine.model.load.scales_of", lambda keys, _: [KvScales(1e4, 1e4)] * len(keys))
    with pytest.raises(ConfigError, match=r"logits through the paged pool differ .* at most 0\.75 is rounding"):
        load_model(directory, dtype="float32", kv_cache_dtype="fp8")


def test_an_unknown_kv_dtype_is_refused(directory):
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int4', wanted auto or fp8"):
        load_model(directory, kv_cache_dtype="int4")


def test_kernels_for_cpus_do_not_take_float8(directory):
    loaded = load_model(directory, dtype="float32")
    layer = dataclasses.replace(loaded.layers[0], scales=KvScales(1.0, 1.0))
    native = loaded.kernels[0]
    if native is TORCH_KERNELS:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    assert native.supports(loaded.layers[0], loaded.dtype, loaded.device)
    assert not native.supports(layer, loaded.dtype, loaded.device)
