import pytest
from hypothesis import given
from hypothesis import strategies as st

from messages.errors import RequestError
from text.stops import StopMatcher

words = st.text("ab<", max_size=12)
stop_lists = st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4)


def naive(pieces: list[str], stops: list[str], *, include: bool, min_tokens: int) -> tuple[str, str | None]:
    """Character by character: the first end of a stop, the longest stop that ends there."""
    text = ""
    for number, piece in enumerate(pieces, start=1):
        for character in piece:
            text += character
            ending = [stop for stop in stops if number > min_tokens and text.endswith(stop)]
            if ending:
                stop = max(ending, key=len)
                return (text if include else text[: -len(stop)]), stop
    return text, None


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[list[str], str | None]:
    shown, matched = [], None
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown.append(text)
        if matched is not None:
            break
    shown.append(matcher.flush())
    return shown, matched


@given(st.lists(words, max_size=8), stop_lists, st.booleans(), st.integers(0, 3))
def test_any_split_of_the_text_gives_what_a_search_of_the_whole_gives(pieces, stops, include, min_tokens):
    matcher = StopMatcher(stops, include_stop_str=include, min_tokens=min_tokens)
    shown, matched = run(matcher, pieces)
    assert ("".join(shown), matched) == naive(pieces, stops, include=include, min_tokens=min_tokens)


@given(words, stop_lists)
def test_only_a_possible_beginning_of_a_stop_is_held_back(text, stops):
    matcher = StopMatcher(stops)
    shown, matched = matcher.push(text)
    if matched is None:
        held = text[len(shown) :]
        assert shown + held == text
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        rest = [text[i:] for i in range(len(text) - len(held))]
        assert not any(stop.startswith(suffix) for suffix in rest for stop in stops)


def test_a_beginning_that_comes_to_nothing_is_shown_later():
    matcher = StopMatcher(["</end>"])
    assert matcher.push("a </e") == ("a ", None)
    assert matcher.push("f") == ("</ef", None)


def test_what_follows_a_stop_is_dropped():
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == ("a", "b")
    assert matcher.push("d") == ("", "b")
    assert matcher.flush() == ""


def test_the_longer_of_two_stops_with_one_end_is_the_match():
    assert StopMatcher(["b", "ab"]).push("xab") == ("x", "ab")


def test_the_stop_that_is_complete_first_wins_over_one_that_began_earlier():
    assert StopMatcher(["abc", "b"]).push("abc") == ("a", "b")


def test_a_stop_may_begin_before_min_tokens_but_not_end_there():
    matcher = StopMatcher(["ab", "x"], min_tokens=2)
    assert matcher.push("x") == ("x", None)
    assert matcher.push("ya") == ("y", None)
    assert matcher.push("b") == ("", "ab")


def test_several_tokens_may_come_in_one_piece():
    matcher = StopMatcher(["x"], min_tokens=3)
    assert matcher.push("x", num_tokens=3) == ("x", None)
    assert matcher.push("x", num_tokens=1) == ("", "x")


def test_an_empty_stop_is_refused_by_name():
    with pytest.raises(RequestError, match=r"stop\[1\] is empty") as caught:
        StopMatcher(["a", ""])
    assert caught.value.param == "stop"
