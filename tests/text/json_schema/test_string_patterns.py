"""Patterns without looking ahead match what they were written of; formats are what their readers take."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.json_schema.string_patterns import as_library_reads, pattern_of_format, without_looking_ahead

AHEAD = [
    "^(?=.*a)[a-c]*$",
    "^(?=.*a)(?=.*[bc])[a-c.]{2,4}$",
    "^(?!^[ab]*$)[a-c]*$",
    r"^(?!\.)(?!.*\.\.)[a-c.]*$",
    "^(?!.*ab)[a-c]*$",
    "^(?![ab])",
]


@pytest.mark.parametrize("pattern", AHEAD)
@settings(max_examples=150, deadline=None)
@given(text=st.text("abc.", max_size=6))
def test_patterns_without_looking_ahead_match_the_same_together(pattern, text):
    patterns = without_looking_ahead(pattern)
    assert not any("(?=" in part or "(?!" in part for part in patterns)
    assert all(re.search(part, text) for part in patterns) == bool(re.search(pattern, text))


@pytest.mark.parametrize("pattern", ["(?=a)b", "^(?=a)b|c", "^(?!foo)bar", "^a(?=b)", "^(?=a", "a|b", ""])
def test_what_is_not_understood_stays(pattern):
    assert without_looking_ahead(pattern) == [pattern]


def test_sets_within_classes_are_characters():
    assert as_library_reads(r"[a&&[b~]\[[^&]&~[") == r"[a\&\&\[b\~]\[[^\&]&~["


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("date", ["2024-02-29", "2000-02-29", "0001-12-31"], ["2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31"]),
        ("time", ["23:59:59Z", "00:00:00.5+01:00"], ["23:59:60Z", "24:00:00Z", "10:00:00"]),
        ("date-time", ["2024-02-29T10:00:00Z"], ["2024-02-29", "2023-02-29T10:00:00Z"]),
        ("duration", ["P1D", "PT1H2M", "P2W", "P1Y2M3DT4S"], ["P", "PT", "1D", "P12345D"]),
        ("email", ["a.b@c.de"], ["a@b", ".a@b.de", "a..b@c.de"]),
        ("uuid4", ["01234567-89ab-4def-8123-456789abcdef"], ["01234567-89ab-1def-8123-456789abcdef"]),
        ("base64", ["", "YQ==", "YWI=", "YWJj"], ["Y", "YQ=", "===="]),
    ],
)
def test_formats_are_what_their_readers_take(name, taken, refused):
    pattern = pattern_of_format(name)
    assert pattern is not None
    assert all(re.search(pattern, text) for text in taken)
    assert not any(re.search(pattern, text) for text in refused)


def test_other_formats_have_no_pattern():
    assert pattern_of_format("path") is None
    assert pattern_of_format("ipv4") is None
