"""One call's JSON object, read character by character: what it gives out when, and what makes it no call."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.openai.call_scanner import CallScanner, NotACallError


def read(text: str, name: str | None = None) -> CallScanner:
    scanner = CallScanner(name)
    for char in text:
        scanner.feed(char)
    return scanner


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', "f", '{"a": 1}'),
        ('{"name": "f", "parameters": {"a": [{}, "}"]}}', "f", '{"a": [{}, "}"]}'),
        (' \n{ "arguments":{"a":1} , "name":"f" }', "f", '{"a":1}'),
        ('{"id": "x", "name": "f", "arguments": {}, "more": [{"name": "g"}]}', "f", "{}"),
        ('{"name": "f", "arguments": [1, "\\"]"]}', "f", '[1, "\\"]"]'),
        ('{"name": "f", "arguments": 1.5e3}', "f", "1.5e3"),
        ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\"}"}', "f", '{"a": "\\n"}'),  # JSON in a JSON string
        ('{"name": "f", "arguments": null}', "f", "{}"),
        ('{"name": "f"}', "f", "{}"),
        ('{"name": "\\u0066"}', "f", "{}"),
        ('{"name": "f", "arguments": {"name": "g"}}', "f", '{"name": "g"}'),  # a name inside is not the call's
    ],
)
def test_a_call_is_its_name_and_its_arguments(text, name, arguments):
    scanner = read(text)
    assert scanner.is_done
    assert (scanner.name, scanner.take()) == (name, arguments)
    assert "".join(scanner.raw) == text


def test_arguments_are_given_out_as_they_come_and_once():
    scanner = read('{"name": "f", "arguments": {"a')
    assert scanner.take() == '{"a'
    assert scanner.take() == ""
    for char in '": "}':
        scanner.feed(char)
    assert scanner.take() == '": "}'
    assert not scanner.is_done


def test_arguments_wait_for_the_name():
    scanner = read('{"arguments": {"a": 1}')
    assert scanner.take() == ""
    assert not scanner.is_announced
    for char in ', "name": "f"':
        scanner.feed(char)
    assert scanner.is_announced
    assert scanner.take() == '{"a": 1}'


def test_arguments_in_a_string_are_given_out_when_they_are_whole():
    scanner = read('{"name": "f", "arguments": "{\\"a\\": 1}')
    assert scanner.take() == ""
    scanner.feed('"')
    assert scanner.take() == '{"a": 1}'


def test_a_call_is_announced_when_it_is_known_whether_arguments_follow():
    scanner = read('{"name": "f", "other": 1, "arguments":')
    assert not scanner.is_announced
    scanner.feed("{")
    assert scanner.is_announced
    assert read('{"name": "f"}').is_announced


def test_a_name_given_outside_makes_the_object_the_arguments():
    scanner = read(' {"name": "g", "a": "\\"}"}', name="f")
    assert scanner.is_done
    assert scanner.is_announced
    assert (scanner.name, scanner.take()) == ("f", '{"name": "g", "a": "\\"}"}')


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("x", None, "begins with"),
        ("[", None, "begins with"),
        ("[", "f", "begins with"),
        ("{}", None, "has no name"),
        ('{"arguments": {}}', None, "has no name"),
        ('{"name": 1}', None, "has no name"),
        ("{n", None, "where a key was due"),
        ('{"name" "', None, "where a colon was due"),
        ('{"name": "f" "', None, "where a comma was due"),
        ('{"name": "f", "arguments": 1 2', None, "where a comma was due"),
        ('{"name": }', None, "begins no value"),
        ('{"name": "\\x"', None, "escape"),
        # half a surrogate pair is no text that could be sent on
        ('{"name": "\\ud800"', None, "surrogates not allowed"),
        ('{"name": "f", "arguments": "\\udc00"', None, "surrogates not allowed"),
    ],
)
def test_what_cannot_become_a_call_says_so_at_the_character_that_shows_it(text, name, reason):
    scanner = read(text[:-1], name)
    with pytest.raises(NotACallError, match=reason):
        scanner.feed(text[-1])
    assert "".join(scanner.raw) == text, "what was read comes out as text"


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    arguments=st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    others=st.dictionaries(
        st.text(max_size=5).filter(lambda key: key not in ("name", "arguments", "parameters")), VALUES
    ),
    is_named_first=st.booleans(),
    is_escaped=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
def test_any_arguments_come_out_as_they_were_written(arguments, others, is_named_first, is_escaped, indent):
    call = {"name": "f", **others, "arguments": arguments} if is_named_first else {"arguments": arguments, "name": "f"}
    scanner = read(json.dumps(call, ensure_ascii=is_escaped, indent=indent))
    assert scanner.is_done
    assert json.loads(scanner.take()) == arguments
