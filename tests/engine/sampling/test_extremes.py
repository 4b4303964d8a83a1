"""What a request may ask for at its bounds gives a token; what leaves no number is that request's fault alone."""

from __future__ import annotations

import math

import pytest
import torch

from engine.sampling.row import SamplingRow
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import Sampled
from messages.errors import RequestError
from messages.request import MIN_REPETITION_PENALTY, SamplingParams

VOCAB = 64


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"repetition_penalty": 1e-38}, "make the largest logit inf"),
        ({"repetition_penalty": 5e-324}, "make the largest logit"),
        ({"logit_bias": {3: math.inf}}, "make the largest logit inf"),
        ({"logit_bias": dict.fromkeys(range(VOCAB), -math.inf)}, "allow no token"),
    ],
)
def test_parameters_that_leave_no_number_are_the_requests_fault_alone(params, words, temperature):
    logits = torch.arange(2 * VOCAB, dtype=torch.float32).view(2, VOCAB) / 7
    rows = [
        SamplingRow(name, SamplingParams(max_tokens=9, temperature=temperature, **each), list(range(VOCAB)), VOCAB)
        for name, each in (("bad", params), ("good", {}))
    ]
    error, sampled = Sampler(VOCAB, None).sample(logits, rows)
    assert isinstance(error, RequestError)
    assert words in error.message
    assert isinstance(sampled, Sampled)


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 100.0])
@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": MIN_REPETITION_PENALTY},
        {"repetition_penalty": 100.0},
        {"repetition_penalty": MIN_REPETITION_PENALTY, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"min_p": 5e-324, "top_p": 5e-324},
        {"top_p": 1 - 2**-53, "top_k": 2**63 - 1},
        {"logit_bias": dict.fromkeys(range(VOCAB), -100.0), "seed": 2**64 - 1},
    ],
)
def test_a_token_comes_of_whatever_a_request_may_ask_for(params, temperature):
    for scale in (0.0, 1.0, 1e4):
        logits = torch.linspace(-scale, scale, VOCAB).unsqueeze(0)
        row = SamplingRow("r", SamplingParams(max_tokens=9, temperature=temperature, **params), list(range(VOCAB)), 3)
        (sampled,) = Sampler(VOCAB, None).sample(logits, [row])
        assert isinstance(sampled, Sampled), sampled
