"""A whole engine that samples as a device does, all rows at once: token for token what it gives as a CPU does."""

from __future__ import annotations

import json
import random

import pytest
import torch

from engine.core import Engine, EngineOptions
from engine.model.load import LoadedModel, load_model
from engine.sampling.device_sampler import DeviceSampler
from engine.scheduling.plan import EmitTokens, SequenceAdded, SequenceSpec
from messages.request import Grammar, SamplingParams
from tests.models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

KINDS = [
    {"temperature": 0.0, "logprobs": 2},
    {"seed": 1, "prompt_logprobs": 1},
    {"seed": 2, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"seed": 3, "top_k": 7, "min_p": 0.05, "presence_penalty": 0.8, "temperature": 1.7},
    {"temperature": 0.0, "grammar": Grammar(kind="choice", spec=json.dumps(["alpha", "beta"]))},
    {"seed": 4, "logit_bias": {9: 3.0, 10: -100.0}, "min_tokens": 6, "stop_token_ids": (5, 9)},
]


def answers(directory, loaded: LoadedModel, *, on_device: bool, plans_ahead: bool) -> dict[str, list[str]]:
    """All that is emitted for each of some prompts, in words."""
    options = EngineOptions(
        block_size=8, kv_cache_bytes=2**22, max_num_batched_tokens=64, max_num_seqs=5, plans_ahead=plans_ahead
    )
    engine = Engine.build(loaded, options, model_dir=directory)
    sampler = engine.runner._sampler
    if on_device:
        sampler._sampler = DeviceSampler(loaded.vocab_size, sampler._masks, torch.device("cpu"))
    rng = random.Random(7)
    for number in range(12):
        prompt = [rng.randrange(4, 300) for _ in range(rng.choice([1, 9, 50]))]
        params = SamplingParams(max_tokens=9, **KINDS[number % len(KINDS)])
        spec = SequenceSpec(seq_id=str(number), token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
        engine.post(SequenceAdded(spec))
    found: dict[str, list[str]] = {}
    while engine.has_work():
        for emitted in engine.step():
            found.setdefault(emitted.seq_id, []).append(said(emitted))
    engine.close()
    return found


def said(emitted: EmitTokens) -> str:
    assert emitted.error is None, emitted.error
    return repr((emitted.token_ids, emitted.logprobs, emitted.prompt_logprobs, emitted.finish_reason))


@pytest.mark.parametrize("plans_ahead", [False, True])
def test_every_token_and_log_probability_is_the_same(tmp_path, plans_ahead):
    directory = make_tiny_model(tmp_path)
    loaded = load_model(directory)
    expected = answers(directory, loaded, on_device=False, plans_ahead=False)
    assert len(expected) == 12
    assert answers(directory, loaded, on_device=True, plans_ahead=plans_ahead) == expected
