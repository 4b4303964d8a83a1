"""Marks in a text that comes piece by piece."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.openai.marks import Buffer

MARKS = ("ab", "abba", "b", "cc")


def test_a_mark_waits_for_what_may_be_a_longer_one():
    buffer = Buffer()
    buffer.push("xab")
    assert buffer.find(("ab", "abba")) is None
    assert buffer.clean == 1
    buffer.push("c")
    assert buffer.find(("ab", "abba")) == (1, "ab")


def test_at_the_end_nothing_waits():
    buffer = Buffer()
    buffer.push("xab")
    buffer.is_final = True
    assert buffer.find(("ab", "abba")) == (1, "ab")
    assert buffer.find(("abba",)) is None
    assert buffer.clean == 3


@pytest.mark.parametrize(
    ("text", "found"), [("", None), ("a", None), ("ab", None), ("abc", "ab"), ("abba", "abba"), ("x", "")]
)
def test_a_beginning_is_decided_when_nothing_longer_can_come(text, found):
    buffer = Buffer()
    buffer.push(text)
    assert buffer.starts(("ab", "abba")) == found


@given(st.text("abc", max_size=30), st.lists(st.integers(0, 30), max_size=6))
def test_the_way_a_text_is_split_changes_no_mark(text, cuts):
    def marks(pieces):
        buffer, found = Buffer(), []
        for piece in [*pieces, None]:
            buffer.is_final = piece is None
            buffer.push(piece or "")
            while (hit := buffer.find(MARKS)) is not None:
                at, mark = hit
                found.append((buffer.take(at), mark))
                buffer.take(len(mark))
        return found, buffer.text

    points = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    assert marks([text[a:b] for a, b in itertools.pairwise(points)]) == marks([text])
