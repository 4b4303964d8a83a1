"""The oracle bends where rounding decides a draw, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from engine.sampling.row import SamplingRow
from messages.request import SamplingParams
from tests.models import VOCAB_SIZE, make_tiny_model
from tests.reference import ROUNDING, Reference

PROMPT = [9, 20, 188]
UPPER, LOWER = 10, 11  #: neighbours in the order of candidates


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return Reference(make_tiny_model(tmp_path_factory.mktemp("model")))


def row_of(temperature: float, seed: int) -> SamplingRow:
    params = SamplingParams(max_tokens=8, temperature=temperature, seed=seed)
    return SamplingRow(seq_id="r", params=params, token_ids=PROMPT, num_prompt_tokens=len(PROMPT))


def logits_with(gap: float) -> torch.Tensor:
    logits = torch.linspace(-1, 0.9, VOCAB_SIZE)[None].clone()
    logits[0, UPPER], logits[0, LOWER] = 1 + gap, 1
    return logits


@pytest.mark.parametrize(
    ("gap", "temperature", "takes_the_other"),
    [(ROUNDING / 4, 1.0, True), (ROUNDING * 50, 1.0, False), (ROUNDING / 4, 0.0, False)],
    ids=["rounding decides", "further apart", "greedy"],
)
def test_the_neighbour_is_taken_only_where_rounding_decides_a_draw(reference, gap, temperature, takes_the_other):
    logits = logits_with(gap)
    seed = next(seed for seed in range(10_000) if reference._choose(logits, row_of(temperature, seed), ()) == UPPER)
    row = row_of(temperature, seed)
    assert reference._choose(logits, row, [LOWER]) == (LOWER if takes_the_other else UPPER)
    assert reference._choose(logits, row, [LOWER + 1]) == UPPER


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_answer_changes_nothing(reference, temperature):
    params = SamplingParams(max_tokens=8, temperature=temperature, seed=3)
    right = reference.generate(PROMPT, params)
    wrong = [(token_id + 1) % VOCAB_SIZE for token_id in right]
    assert reference.generate(PROMPT, params, wrong) == right
