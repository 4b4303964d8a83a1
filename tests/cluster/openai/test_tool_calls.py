"""Tool calls parsed back from text, however it is split."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.openai.tool_calls import CallDelta, NamedCallParser, ToolCallParser, format_of_text

NAMES = ("get_weather", "add")

CASES = [
    # kind, text, content, calls
    ("hermes", "Just text.", "Just text.", []),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "I look.",
        [("get_weather", {"city": "Oslo"})],
    ),
    (
        "hermes",
        '<tool_call>{"name":"add","arguments":{"a":[1,{"b":"}]\\""}]}}</tool_call>\n<tool_call>{"name":"add",'
        '"arguments":{}}</tool_call>',
        "",
        [("add", {"a": [1, {"b": '}]"'}]}), ("add", {})],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call> done', " done", [("add", {})]),
    ("hermes", '<tool_call>{"id": 7, "ok": true, "name": "add", "arguments": null}</tool_call>', "", [("add", {})]),
    ("hermes", "a < b and <tool_cal", "a < b and <tool_cal", []),
    ("hermes", "<tool_call>none</tool_call>", "<tool_call>none</tool_call>", []),
    ("hermes", '<tool_call>{"title": "add"}</tool_call>', '<tool_call>{"title": "add"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    ("hermes", '<tool_call>{"name": "naïve\\u0301", "arguments": {"猫": "🙂"}}', "", [("naïve\u0301", {"猫": "🙂"})]),
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Oslo"}}', "", [("get_weather", {"city": "Oslo"})]),
    ("llama3", '<|python_tag|>{"name": "add", "parameters": {}}', "", [("add", {})]),
    (
        "llama3",
        '\n{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}',
        "",
        [("add", {"a": 1}), ("add", {"a": 2})],
    ),
    ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3", '{"name": "Bob", "parameters": {"x": 1}} is', '{"name": "Bob", "parameters": {"x": 1}} is', []),
    ("llama3", '{"title": [1, 2]} is JSON', '{"title": [1, 2]} is JSON', []),
    ("llama3", "The answer is {4}.", "The answer is {4}.", []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]',
        "",
        [("add", {"a": 1}), ("get_weather", {})],
    ),
    (
        "mistral",
        'Well. [TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{"city": "Rome"}',
        "Well.",
        [("add", {"a": 1}), ("get_weather", {"city": "Rome"})],
    ),
    ("mistral", "[TOOL_CALLS]add{}", "", [("add", {})]),
    ("mistral", "[1, 2, 3]", "[1, 2, 3]", []),
    ("mistral", "[TOOL_CALLS]!", "[TOOL_CALLS]!", []),
    (
        "list",
        '[{"name": "add", "parameters": {"a": 1}}, {"name": "add", "parameters": {"a": 2}}]',
        "",
        [("add", {"a": 1}), ("add", {"a": 2})],
    ),
]


def collect(parser, pieces):
    """Content and calls of a text that comes in `pieces`."""
    content, names, arguments = "", [], []
    for out in [*map(parser.push, pieces), parser.flush()]:
        for piece in out:
            if isinstance(piece, str):
                content += piece
                continue
            if piece.name is not None:
                assert piece.index == len(names)
                names.append(piece.name)
                arguments.append("")
            arguments[piece.index] += piece.arguments
    return content, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CASES)
def test_formats_are_read_whole_and_character_by_character(kind, text, content, calls):
    assert collect(ToolCallParser(kind, NAMES), [text]) == (content, calls)
    assert collect(ToolCallParser(kind, NAMES), list(text)) == (content, calls)


@settings(max_examples=200, deadline=None)
@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 120), max_size=8))
def test_the_way_a_text_is_split_changes_nothing(case, cuts):
    kind, text, content, calls = case
    points = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(points)]
    assert collect(ToolCallParser(kind, NAMES), pieces) == (content, calls)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["hermes", "llama3", "mistral"]),
    pieces=st.lists(
        st.one_of(
            st.text(max_size=5),
            st.sampled_from(
                [
                    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", '{"name": "add"'),
                    *(
                        ", ",
                        "}",
                        '"arguments": ',
                        '"parameters": ',
                        '{"a": 1',
                        "[",
                        "]",
                        "add",
                        "\\",
                        '"',
                        ";",
                        "<tool",
                    ),
                ]
            ),
        ),
        max_size=12,
    ),
)
def test_no_text_whatsoever_breaks_a_parser(kind, pieces):
    parser = ToolCallParser(kind, NAMES)
    out = [piece for text in pieces for piece in parser.push(text)] + parser.flush()
    named = [p.index for p in out if isinstance(p, CallDelta) and p.name is not None]
    assert named == list(range(len(named)))
    assert all(p.index in named for p in out if isinstance(p, CallDelta))


def test_arguments_stream_as_they_come():
    parser = ToolCallParser("hermes", NAMES)
    assert parser.push('<tool_call>{"name": "add", "argu') == []
    assert parser.push('ments": {"a') == [CallDelta(0, "add", '{"a')]
    assert parser.push('": 1}') == [CallDelta(0, None, '": 1}')]
    assert parser.push("}</tool_call>") == []


def test_a_call_cut_short_keeps_what_was_given():
    parser = ToolCallParser("hermes", NAMES)
    parser.push('<tool_call>{"name": "add", "arguments": {"a": 1')
    assert parser.flush() == []


def test_a_named_call_is_all_arguments():
    parser = NamedCallParser("add")
    assert parser.push('{"a"') == [CallDelta(0, "add", '{"a"')]
    assert parser.push(": 1}") == [CallDelta(0, None, ": 1}")]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"key": "value"}}\n</tool_call>', "hermes"),
        ('<tool_call>{"arguments": 1, "name": "f"}</tool_call>', "hermes"),
        ('{"name": "f", "parameters": {"key": "value"}}', "llama3"),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"key": "value"}}]', "mistral"),
        ('[TOOL_CALLS][{"arguments": 0, "name": "f", "id": "a"}]', "mistral"),
        ('[TOOL_CALLS]f[ARGS]{"key": "value"}', "mistral"),
        ("<tool_call>\n<function=f>\n</function></tool_call>", None),
        ("the tools: f", None),
    ],
)
def test_formats_are_recognised_from_how_a_past_call_is_shown(text, kind):
    assert format_of_text(text, "f") == kind
