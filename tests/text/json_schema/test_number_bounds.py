"""Bounds are drawn inwards: never a number outside, and few lost inside."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages.errors import RequestError
from text.json_schema.number_bounds import bounded
from text.json_schema.places import Place

WIDE = st.one_of(st.integers(-(2**70), 2**70), st.integers(-(2**53) - 9, 2**53 + 9), st.floats(-1e40, 1e40))
NAMES = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def holds(value: Fraction, bounds: dict) -> bool:
    return (
        ("minimum" not in bounds or value >= Fraction(bounds["minimum"]))
        and ("maximum" not in bounds or value <= Fraction(bounds["maximum"]))
        and ("exclusiveMinimum" not in bounds or value > Fraction(bounds["exclusiveMinimum"]))
        and ("exclusiveMaximum" not in bounds or value < Fraction(bounds["exclusiveMaximum"]))
    )


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(bounds=st.dictionaries(st.sampled_from(NAMES), WIDE, min_size=1), is_integer=st.booleans())
def test_what_lies_within_lay_within_before(bounds, is_integer):
    try:
        written = bounded(Place.root(bounds), is_integer=is_integer)
    except RequestError:
        return
    ends = [Fraction(value) for value in written.values()]
    near = [Fraction(2) ** -40, Fraction(1), Fraction(1024)]
    for value in {end + sign * step for end in ends for step in [*near, Fraction(0)] for sign in (-1, 1)}:
        if holds(value, written) and (not is_integer or value.denominator == 1):
            assert holds(value, bounds)
    if is_integer:
        assert all(abs(value) < 2**63 and value == int(value) for value in written.values())
    else:
        assert all(abs(value) <= 2**53 for value in written.values())


def test_small_bounds_stay_as_they_are():
    bounds = {"minimum": -5, "maximum": 10, "multipleOf": 5}
    assert bounded(Place.root(bounds), is_integer=True) == bounds
    assert bounded(Place.root({"exclusiveMinimum": 0, "maximum": 1.5}), is_integer=False) == {
        "exclusiveMinimum": 0,
        "maximum": 1.5,
    }
    assert bounded(Place.root({"minimum": 3, "exclusiveMinimum": True}), is_integer=True) == {"minimum": 4}


@pytest.mark.parametrize("bounds", [{"minimum": 2, "maximum": 1}, {"minimum": 1.2, "maximum": 1.8}, {"multipleOf": 0}])
def test_where_no_integer_is_within_it_is_refused(bounds):
    with pytest.raises(RequestError):
        bounded(Place.root(bounds), is_integer=True)
