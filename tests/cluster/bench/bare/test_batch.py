from __future__ import annotations

import itertools

import pytest

from cluster.bench.bare.batch import Batch, Workload


def workload(**fields: int) -> Workload:
    return Workload(**{"batch_size": 2, "input_len": 5, "output_len": 4, "vocab_size": 50} | fields)


def test_no_two_batches_have_the_same_prompts_and_a_seed_gives_them_again():
    parts = list(itertools.product((-1, 0, 1), ("prefill", "whole")))
    drawn = [workload(input_len=12).prompts(*part) for part in parts]
    assert len({str(prompts) for prompts in drawn}) == len(parts)
    assert drawn == [workload(input_len=12).prompts(*part) for part in parts]
    assert drawn[0] != workload(input_len=12, seed=1).prompts(*parts[0])
    assert [len(prompt) for prompt in drawn[0]] == [12, 12]
    assert all(0 <= token < 50 for prompts in drawn for prompt in prompts for token in prompt)


@pytest.fixture
def batch() -> Batch:
    """Two sequences; the second one's prompt is computed while the first one decodes."""
    return Batch(begun_s=10.0, token_times_s=[[11.0, 12.0, 13.0, 14.0], [12.0, 13.0, 14.0, 15.0]])


def test_times_are_from_when_all_prompts_were_there(batch):
    assert batch.seconds == 5.0
    assert batch.ttft_s == [1.0, 2.0]
    assert batch.gaps_s == [1.0] * 6


def test_decode_begins_with_the_last_first_token_and_ends_with_the_first_last_one(batch):
    window = batch.decode
    assert (window.begin_s, window.end_s) == (12.0, 14.0)
    assert window.indexes == [range(2, 4), range(1, 3)]
    assert (window.num_tokens, window.num_steps, window.seconds) == (4, 2, 2.0)


def test_a_decoded_token_is_computed_where_the_one_before_it_stands(batch):
    # of 5 prompt tokens, 0 to 4: token 1 of the output follows token 0, which stands at 5
    assert list(batch.decode.positions(5)) == [6, 7, 5, 6]


def test_sequences_that_end_before_the_last_prompt_is_computed_leave_nothing_to_tell():
    assert Batch(0.0, [[1.0, 2.0], [3.0, 4.0]]).decode is None
    assert Batch(0.0, [[1.0], [1.0]]).decode is None
