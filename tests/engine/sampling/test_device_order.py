"""The order of candidates by integers, without a sort: what sorting everything gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.device_order import (
    first_ids,
    first_key_beyond,
    histogram_of,
    keys_of,
    logits_of,
    nth_place,
    places_with_key,
)

INF, NAN = math.inf, math.nan
# Few different values, so that they tie; -0.0 and 0.0 tie too. All are float32 numbers.
VALUES = st.sampled_from([-INF, -INF, -(2.0**127), -3.5, -0.0, 0.0, 2.0**-149, 2.0**-100, 1.0, 1.0, 2.0**127, INF])
TABLES = st.integers(1, 16).flatmap(
    lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=1, max_size=3)
)


def in_order(row: list[float]) -> list[int]:
    """Ids: logit downwards, then id upwards."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


@pytest.mark.slow
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
@settings(max_examples=200, deadline=None)
def test_keys_are_ordered_as_their_logits_are_and_give_them_back(values):
    logits = torch.tensor(values)
    keys = keys_of(logits)
    assert keys.min() >= 0
    assert keys.max() < 2**32
    assert torch.equal(keys.unsqueeze(0) < keys.unsqueeze(1), logits.unsqueeze(0) < logits.unsqueeze(1))
    assert logits_of(keys).tolist() == values


@pytest.mark.parametrize("nan", [NAN, -NAN])
def test_a_nan_has_the_largest_key_whatever_its_sign(nan):
    keys = keys_of(torch.tensor([INF, math.copysign(NAN, nan), 0.0]))
    assert keys.argmax() == 1
    assert logits_of(keys)[1].isnan()


@pytest.mark.slow
@given(table=TABLES, data=st.data())
@settings(max_examples=200, deadline=None)
def test_weights_added_up_in_order_exceed_the_target_at_the_key_that_is_found(table, data):
    width = len(table[0])
    counts = st.lists(st.sampled_from([0, 1, 2, 5, 2**40]), min_size=width, max_size=width).filter(any)
    weights = [data.draw(counts) for _ in table]
    for row, values in zip(weights, table, strict=True):  # equal logits weigh the same
        for token, value in enumerate(values):
            row[token] = row[values.index(value)]
    totals = [sum(row) for row in weights]
    targets = [data.draw(st.integers(0, max(0, total - 1))) for total in totals]
    keys = keys_of(torch.tensor(table))
    found = first_key_beyond(histogram_of(keys, torch.tensor(weights)), torch.tensor(targets))
    places = places_with_key(torch.tensor(table), found.key)
    each = found.here // places[:, -1].clamp(min=1)
    ids = nth_place(places, (torch.tensor(targets) - found.before) // each.clamp(min=1))
    for index, values in enumerate(table):
        if totals[index] == 0:
            continue
        passed, wanted = 0, None
        for token in in_order(values):
            passed += weights[index][token]
            if passed > targets[index]:
                wanted = token
                break
        assert ids[index] == wanted
        larger = [weight for value, weight in zip(values, weights[index], strict=True) if value > values[wanted]]
        assert found.before[index] == sum(larger)
        assert found.here[index] == weights[index][wanted] * values.count(values[wanted])


def test_what_the_target_exceeds_gives_some_token_of_the_row():
    logits = torch.tensor([[1.0, 2.0], [NAN, NAN]])
    histogram = histogram_of(keys_of(logits), torch.tensor([[1, 1], [0, 0]]))
    found = first_key_beyond(histogram, torch.tensor([9, 0]))
    ids = nth_place(places_with_key(logits, found.key), torch.tensor([9, 0]) - found.before)
    assert ((ids >= 0) & (ids < 2)).all()


@pytest.mark.slow
@given(table=TABLES, data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_first_ids_are_the_first_in_order_those_that_tie_with_the_last_included(table, data):
    k = data.draw(st.integers(0, len(table[0])))
    keys, ids = first_ids(keys_of(torch.tensor(table)), k)
    assert ids.shape == (len(table), k)
    for row, values in enumerate(table):
        assert ids[row].tolist() == in_order(values)[:k]
        assert logits_of(keys[row]).tolist() == [values[token] for token in in_order(values)[:k]]
