"""No step waits for the device: on torch's meta device, where nothing has a value, all that asks for one raises."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.kernels.reference import TORCH_KERNELS
from engine.model.families import probe_layers
from engine.model.load import LoadedModel
from engine.runner import Accelerator
from engine.scheduling.plan import Sampled
from messages.request import SamplingParams
from tests.engine.model.test_families import FAMILIES
from tests.models import tiny_config
from tests.steps import Bench

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


class MadeUpSampler:
    """Stands for a sampler, which is told to read back what it gives."""

    def forget(self, seq_id: str) -> None: ...

    def sample(self, logits: torch.Tensor, rows: list) -> list[Sampled]:
        assert logits.device == META
        return [Sampled(7) for _ in rows]


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
    bench = Bench(loaded, num_blocks=32, accelerator=Accelerator(MetaDevice(), 4))
    bench.runner._sampler = MadeUpSampler()
    return bench


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
