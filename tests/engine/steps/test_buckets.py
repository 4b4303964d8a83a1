from __future__ import annotations

import pytest

from engine.scheduling.plan import SequenceStep
from engine.steps.buckets import bucket_of, buckets


def part(num_tokens: int, kind="decode") -> SequenceStep:
    return SequenceStep(seq_id="s", slot=0, kind=kind, start=0, num_tokens=num_tokens, is_sampled=True)


@pytest.mark.parametrize(
    ("max_rows", "wanted"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (30, (1, 2, 4, 8, 16, 24, 30)),
        (176, (*(1, 2, 4, 8), *range(16, 129, 8), 144, 160, 176)),
    ],
)
def test_buckets_double_then_go_by_eights_then_by_an_eighth(max_rows, wanted):
    assert buckets(max_rows) == wanted


def test_their_number_is_bounded_and_little_of_a_step_is_padding():
    assert [len(buckets(1 << power)) for power in (6, 7, 8, 9, 10)] == [11, 19, 27, 35, 43]
    sizes = buckets(1024)
    for num_rows in range(1, 1025):
        size = bucket_of([part(1)] * num_rows, sizes)
        assert size in sizes
        assert num_rows <= size < num_rows + max(8, num_rows / 8)


def test_a_step_runs_in_the_smallest_bucket_that_holds_its_rows():
    sizes = (1, 2, 4, 8)
    assert [bucket_of([part(1)] * count, sizes) for count in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert bucket_of([part(3), part(1), part(1)], sizes) == 8, "a replay is as many rows as it has tokens"


def test_steps_with_prefill_and_longer_ones_are_computed_eagerly():
    assert bucket_of([part(1), part(1, "prefill")], (1, 2, 4)) is None
    assert bucket_of([part(4), part(1)], (1, 2, 4)) is None
