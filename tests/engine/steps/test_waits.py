"""No step waits for the device: on torch's meta device, where nothing has a value, all that asks for one raises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from engine.kernels.reference import TORCH_KERNELS
from engine.model.families import probe_layers
from engine.model.load import LoadedModel
from engine.runner import Accelerator
from messages.request import SamplingParams
from tests.engine.model.test_families import FAMILIES
from tests.models import tiny_config
from tests.steps import Bench

pytestmark = pytest.mark.slow

META = torch.device("meta")
#: With experts, a window and sinks, and with keys wider than values; the others are tried by `make test-long`.
SOME = ("qwen3_moe", "gpt_oss, sinks", "deepseek_v3, MLA")
CASES = [case if case in SOME else pytest.param(case, marks=pytest.mark.long) for case in FAMILIES]


class MetaEvent:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class MetaDevice:
    device = META

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.empty(num_words, dtype=torch.int64)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def event(self) -> MetaEvent:
        return MetaEvent()


class NothingReadBack:
    """Stands for what comes back from the device, which has no values here."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device == META
        self._shape = tensor.shape

    def wait(self) -> NDArray[np.int64]:
        return np.zeros(self._shape, np.int64)


@pytest.fixture(autouse=True)
def nothing_comes_back(monkeypatch):
    monkeypatch.setattr("engine.sampling.device_sampler.Readback", NothingReadBack)
    monkeypatch.setattr("engine.sampling.device_logprobs.Readback", NothingReadBack)


def bench_on_meta(case: str) -> Bench:
    family, overrides = FAMILIES[case]
    config = tiny_config(family, **{"eos_token_id": None, **overrides})
    with META:  # experts are multiplied in bfloat16 alone there
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16).eval()
    layers, vocab_size = probe_layers(model, family)
    loaded = LoadedModel(
        model=model,
        family=family,
        layers=tuple(layers),
        kernels=(TORCH_KERNELS,) * len(layers),
        dtype=torch.bfloat16,
        device=META,
        vocab_size=vocab_size,
        num_embeddings=vocab_size,
        max_model_len=1024,
        eos_token_ids=(),
        fingerprint=b"",
        num_parameters=0,
        kernel_path="",
    )
    return Bench(loaded, num_blocks=32, accelerator=Accelerator(MetaDevice(), 4))


@pytest.mark.parametrize("case", CASES)
def test_no_family_s_step_waits_for_the_device(case):
    bench = bench_on_meta(case)
    sequences = [bench.add(str(number), range(4, 4 + length)) for number, length in enumerate((40, 5))]
    bench.run(sequences, 4, max_step_tokens=24)  # mixed steps, then such of decode rows, with new blocks


def test_what_waits_would_be_noticed(monkeypatch):
    bench = bench_on_meta("llama")
    forward = bench.runner._forward
    monkeypatch.setattr(
        bench.runner, "_forward", lambda inputs, *those: forward(inputs, *those) + int(inputs.positions.max())
    )
    params = SamplingParams(max_tokens=1, temperature=0.0)
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        bench.run_parts([(sequence := bench.add("s", [5, 6]), bench.part(sequence, 2, params=params))])
