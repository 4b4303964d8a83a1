"""The first candidates of a row, by whichever way they are selected: always those that sorting everything gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.candidates import Candidates, all_in_order, argmax, at_least, leading, leading_by_topk

INF, NAN = math.inf, math.nan
WAYS = pytest.mark.parametrize("select", [leading, leading_by_topk])


def sorted_plainly(row: list[float]) -> list[tuple[float, int]]:
    """Logit downwards, then id upwards."""
    return sorted(((value, token) for token, value in enumerate(row)), key=lambda item: (-item[0], item[1]))


def of(found: Candidates, row: int = 0) -> list[tuple[float, int]]:
    return list(zip(found.values[row].tolist(), found.ids[row].tolist(), strict=True))


def sure(found: Candidates, row: int = 0) -> list[tuple[float, int]]:
    return of(found, row)[: found.num_sure[row]]


# Few different values, so that they tie; -0.0 and 0.0 tie too. All are float32 numbers.
VALUES = st.sampled_from([-INF, -INF, -3.5, -0.0, 0.0, 2.0**-100, 1.0, 1.0, 2.0**127])
ROWS = st.lists(VALUES, min_size=1, max_size=24)


@pytest.mark.slow
@WAYS
@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=st.integers(1, 16))
def test_what_is_sure_is_what_sorting_everything_gives(select, data, width):
    table = data.draw(st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=1, max_size=3))
    k = data.draw(st.integers(1, width))
    found = select(torch.tensor(table), k)
    assert found.values.shape == found.ids.shape == (len(table), k)
    for row, plain in enumerate(map(sorted_plainly, table)):
        num_sure = found.num_sure[row]
        assert sure(found, row) == plain[:num_sure]
        assert found.values[row].tolist() == [value for value, _ in plain[:k]], "only which of the tied ones is open"
        num_possible = sum(value > -INF for value, _ in plain)
        assert num_sure <= num_possible
        assert found.is_all[row] == (k == width or num_possible < k)
        if found.is_all[row]:
            assert num_sure == num_possible
        elif select is leading:
            assert num_sure == k, "of a row by itself all that were asked for are sure"


@pytest.mark.slow
@given(row=ROWS)
@settings(max_examples=150, deadline=None)
def test_all_in_order_is_all_in_order(row):
    found = all_in_order(torch.tensor([row]))
    assert of(found) == sorted_plainly(row)
    assert (found.is_all[0], found.num_sure[0]) == (True, sum(value > -INF for value in row))


@given(row=ROWS, least=st.sampled_from([-INF, -3.5, 0.0, 1.0, 4.0]))
@settings(max_examples=150, deadline=None)
def test_at_least_is_everything_from_that_logit_up_itself_included(row, least):
    found = at_least(torch.tensor([row]), least)
    assert of(found) == [item for item in sorted_plainly(row) if item[0] >= least]
    assert found.num_sure[0] == len(found.ids[0])
    assert found.is_all[0] == (min(row) >= least)


def test_of_those_that_tie_with_the_last_the_lowest_ids_are_taken_and_one_call_for_all_rows_says_what_it_cannot_know():
    row = torch.tensor([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0]])
    assert of(leading(row, 3)) == [(3.0, 4), (2.0, 1), (1.0, 0)]
    assert leading(row, 3).num_sure[0] == 3
    assert leading_by_topk(row, 3).num_sure[0] == 2
    assert leading_by_topk(row, 6).num_sure[0] == 6, "nothing is left that could tie"


@WAYS
def test_masked_tokens_are_never_sure_and_a_row_with_room_to_spare_says_that_it_is_whole(select):
    found = select(torch.tensor([[-INF, 5.0, -INF, 4.0]]), 3)
    assert sure(found) == [(5.0, 1), (4.0, 3)]
    assert found.is_all[0]
    full = select(torch.tensor([[-INF, 5.0, -INF, 4.0]]), 2)
    assert not full.is_all[0], "both places are taken: there might be more"


@WAYS
def test_a_row_of_nothing_has_no_candidate(select):
    found = select(torch.full((1, 4), -INF), 2)
    assert (found.num_sure[0], found.tops[0]) == (0, -INF)
    assert found.is_all[0]


@WAYS
@pytest.mark.parametrize("row", [[NAN, 1.0, 2.0], [1.0, 2.0, NAN], [-NAN, INF, 0.0], [NAN, NAN, NAN]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_nan_shows_at_the_top_of_its_own_row_only(select, row, k):
    found = select(torch.tensor([row, [0.0, 1.0, 2.0]]), k)
    assert math.isnan(found.tops[0])
    assert of(found, 1) == [(2.0, 2), (1.0, 1), (0.0, 0)][:k]


@WAYS
def test_an_infinite_logit_comes_first(select):
    assert of(select(torch.tensor([[1.0, INF, 2.0**127]]), 2)) == [(INF, 1), (2.0**127, 2)]


@WAYS
def test_the_logits_are_left_as_they_were(select):
    logits = torch.tensor([[1.0, -0.0, 0.0, -INF]])
    before = logits.clone()
    for call in (lambda: select(logits, 2), lambda: all_in_order(logits), lambda: at_least(logits, 0.0)):
        call()
        assert torch.equal(logits.view(torch.int32), before.view(torch.int32))


def test_argmax_is_the_first_of_the_largest_and_a_nan_is_the_largest():
    ids, values = argmax(torch.tensor([[1.0, 3.0, 3.0], [-INF, -INF, -INF], [5.0, NAN, NAN]]))
    assert ids == [1, 0, 1]
    assert values[:2] == [3.0, -INF]
    assert math.isnan(values[2])


def test_parts_are_joined_row_by_row():
    rows = torch.tensor([[1.0, 2.0, 0.0], [0.0, -INF, -INF]])
    joined = Candidates.joined([leading_by_topk(rows[:1], 2), leading_by_topk(rows[1:], 2)])
    whole = leading_by_topk(rows, 2)
    for name in ("values", "ids", "num_sure", "is_all", "tops"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.tops.flags.c_contiguous
    assert Candidates.joined([whole]) is whole
