"""What the reader of tool calls gives when, and what becomes of calls that are cut off or forced."""

from __future__ import annotations

import json

import pytest

from cluster.openai.call_formats import FORMATS
from cluster.openai.tool_calls import CallDelta, ForcedCallParser, ToolCallParser
from cluster.openai.value_types import ToolSchema

SCHEMA = {"properties": {"path": {"type": "string"}, "size": {"type": "integer"}}}
TOOLS = {"add": ToolSchema(SCHEMA), "get_weather": ToolSchema(None)}
LIST = '[{"name": "add", "parameters": {"a": 1}}, {"name": "get_weather", "parameters": {"b": [2]}}]'


def reader(kind: str, allowed: frozenset[str] | None = None) -> ToolCallParser:
    return ToolCallParser(FORMATS[kind], TOOLS, allowed)


def test_arguments_in_json_stream_as_they_come():
    parser = reader("hermes")
    assert parser.push('<tool_call>{"name": "add", "argu') == []
    assert parser.push('ments": {"a') == [CallDelta(0, "add", '{"a')]
    assert parser.push('": 1}') == [CallDelta(0, None, '": 1}')]
    assert parser.push("}</tool_call>") == []


def test_a_string_between_tags_streams_as_it_comes():
    parser = reader("qwen3_xml")
    assert parser.push("<tool_call>\n<function=add>") == [CallDelta(0, "add", "")]
    assert parser.push("\n<parameter=path>\nli") == [CallDelta(0, None, '{"path": "li')]
    assert parser.push('ne "1"\n') == [CallDelta(0, None, 'ne \\"1\\"')]
    assert parser.push("line 2\n</param") == [CallDelta(0, None, "\\nline 2")]
    assert parser.push("eter><parameter=size>1") == [CallDelta(0, None, '", "size": ')]
    assert parser.push("2</parameter></function>") == [CallDelta(0, None, "12}")]


def test_text_streams_but_for_what_may_begin_a_call():
    parser = reader("llama3_json")
    assert parser.push("Hello, wor") == ["Hello, wor"]
    assert parser.push("ld {") == ["ld"]
    assert parser.push("x}") == [" {x}"]
    assert parser.push(' {"title":') == [' {"title":']


def test_a_call_cut_short_keeps_what_was_given():
    for kind, text in (
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1'),
        ("qwen3_xml", "<function=add><parameter=path>a"),
    ):
        parser = reader(kind)
        assert parser.push(text)
        assert parser.flush(is_cut=True) == []


def test_a_call_that_the_model_ended_is_closed():
    parser = reader("qwen3_xml")
    parser.push("<function=add><parameter=path>a")
    assert parser.flush(is_cut=False) == [CallDelta(0, None, '"}')]
    parser = reader("glm45")
    parser.push("<tool_call>add\n<arg_key>size</arg_key><arg_value>5")
    assert parser.flush(is_cut=False) == [CallDelta(0, None, "5}")]


def test_an_object_that_breaks_after_its_arguments_is_the_same_call_however_it_came():
    text = '<tool_call>{"name": "add", "arguments": {"a": 1} x'
    for pieces in ([text], list(text)):
        parser = reader("hermes")
        out = [piece for text in pieces for piece in parser.push(text)] + parser.flush(is_cut=False)
        assert "".join(piece.arguments for piece in out if isinstance(piece, CallDelta)) == '{"a": 1}'
        assert [piece for piece in out if isinstance(piece, str)] == ["x"]


def test_arguments_that_were_to_come_in_one_object_and_did_not_are_none():
    for end in ("", "<|close|>call<|sep|>", "x"):
        parser = reader("kimi_k3")
        out = parser.push(f'<|open|>call tool="add"<|sep|><|open|>json type="object"<|sep|>{end}')
        out += parser.flush(is_cut=False)
        assert "".join(piece.arguments for piece in out if isinstance(piece, CallDelta)) == "{}"


def test_a_name_without_an_end_is_content():
    text = "<|tool_call_start|>" + "x" * 300
    parser = reader("lfm2")
    assert parser.push(text) == [text]


def test_a_call_that_had_no_name_yet_is_content():
    for kind, text in (
        ("hermes", '<tool_call>{"name": "ad'),
        ("kimi_k2", "<|tool_call_begin|>functions.ad"),
        ("pythonic", "[add(path='x'"),
        ("gemma4", '<|tool_call>call:add{path:<|"|>x'),
    ):
        parser = reader(kind)
        assert [*parser.push(text), *parser.flush(is_cut=True)] == [text]


def test_names_alone_make_a_bare_object_a_call_and_limits_any_other():
    text = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'
    assert [delta.name for delta in reader("hermes").push(text)] == ["other"]
    for kind, said in (
        ("hermes", text),
        ("qwen3_xml", "<function=other>x</function>"),
        ("lfm2", "<|tool_call_start|>[other(a=1)]<|tool_call_end|>"),
    ):
        parser = reader(kind, frozenset({"add"}))
        assert [*parser.push(said), *parser.flush(is_cut=False)] == [said]


def test_forced_calls_are_given_when_they_are_whole():
    parser = ForcedCallParser(None)
    assert parser.push(LIST[:40]) == [CallDelta(0, "add", '{"a": 1}')]
    assert parser.push(LIST[40:-3]) == []
    assert parser.push(LIST[-3:]) == [CallDelta(1, "get_weather", '{"b": [2]}')]
    assert parser.flush(is_cut=False) == []


@pytest.mark.parametrize("size", range(len(LIST)))
def test_of_forced_calls_that_are_cut_off_only_whole_ones_are_given(size):
    for pieces in ([LIST[:size]], list(LIST[:size])):
        parser = ForcedCallParser(None)
        out = [delta for piece in pieces for delta in parser.push(piece)] + parser.flush(is_cut=True)
        assert all(isinstance(delta, CallDelta) and json.loads(delta.arguments) for delta in out)
        assert len(out) == (size >= 40) + (size >= len(LIST) - 1)


def test_a_named_call_is_all_arguments_or_none():
    parser = ForcedCallParser("add")
    assert parser.push('{"a"') == parser.push(": 1}") == []
    assert parser.flush(is_cut=True) == [CallDelta(0, "add", '{"a": 1}')], "it was whole when the tokens ran out"
    parser = ForcedCallParser("add")
    parser.push('{"a": ')
    assert parser.flush(is_cut=True) == []
