"""Every format: its calls are read back from what its template writes, whole and however the text is split."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.openai.call_formats import FORMATS
from cluster.openai.tool_calls import CallDelta, ToolCallParser
from cluster.openai.value_types import ToolSchema
from tests.cluster.openai.call_templates import MORE_TEMPLATES, TEMPLATES, spoken

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "near": {"type": "array", "items": {"type": "string"}},
        "at": {"type": "object", "properties": {"hour": {"type": "integer"}, "zone": {"type": "string"}}},
    },
}
TOOLS = {"get_weather": ToolSchema(SCHEMA), "add": ToolSchema(SCHEMA)}
CALLS = [
    ("get_weather", {"city": 'Tromsø, "old"\ntown', "days": 3, "near": ["a", "b c"], "at": {"hour": 7, "zone": "CET"}}),
    ("add", {"city": "7"}),
]
#: (the format, a template of it)
KINDS = [*TEMPLATES.items(), *MORE_TEMPLATES]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(KINDS)]


def collect(kind, pieces, *, is_cut=False):
    """Content and calls of a text that comes in `pieces`, and the deltas as they came."""
    parser = ToolCallParser(FORMATS[kind], TOOLS)
    out = [delta for piece in pieces for delta in parser.push(piece)] + parser.flush(is_cut=is_cut)
    content = "".join(piece for piece in out if isinstance(piece, str))
    calls: list[list[str]] = []
    for delta in out:
        if isinstance(delta, CallDelta):
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    return content, [(name, arguments) for name, arguments in calls]


def read(kind, pieces):
    content, calls = collect(kind, pieces)
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "template"), KINDS, ids=IDS)
def test_calls_are_read_back_whole_and_character_by_character(kind, template):
    text = spoken(template, CALLS, "Let me look.")
    assert read(kind, [text]) == ("Let me look.", CALLS)
    assert read(kind, list(text)) == ("Let me look.", CALLS)
    assert read(kind, [spoken(template, CALLS[:1])]) == ("", CALLS[:1])


@pytest.mark.parametrize(("kind", "template"), KINDS, ids=IDS)
def test_a_call_may_have_no_arguments(kind, template):
    text = spoken(template, [("add", {}), ("get_weather", {})])
    assert read(kind, [text]) == read(kind, list(text)) == ("", [("add", {}), ("get_weather", {})])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("text", ["Just text.", " a < b [1] {x} ``` <tool", '{"title": [1]}\n', "[[[", "", "\n"])
def test_text_without_calls_stays_as_it_is(kind, text):
    assert read(kind, [text]) == read(kind, list(text)) == (text, [])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from(KINDS),
    cuts=st.lists(st.integers(0, 600), max_size=12),
    end=st.integers(0, 600),
    is_cut=st.booleans(),
)
def test_the_way_a_text_is_split_changes_nothing_wherever_it_ends(case, cuts, end, is_cut):
    kind, template = case
    text = spoken(template, CALLS, "Let me look.")[:end] if end else spoken(template, CALLS) + "\nDone."
    points = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[begin:finish] for begin, finish in itertools.pairwise(points)]
    assert collect(kind, pieces, is_cut=is_cut) == collect(kind, [text], is_cut=is_cut)


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abcxyz_", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([name for name, kind in FORMATS.items() if kind.arguments in ("object", "json", "python")]),
    arguments=st.dictionaries(st.text("abcxyz_", min_size=1, max_size=5), JSON_VALUES, max_size=3),
)
def test_any_json_comes_back_in_formats_that_write_it(kind, arguments):
    if kind not in TEMPLATES:
        return
    text = spoken(TEMPLATES[kind], [("add", arguments)])
    assert read(kind, [text]) == read(kind, list(text)) == ("", [("add", arguments)])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(
        [name for name, kind in FORMATS.items() if kind.arguments not in ("object", "json", "python")]
    ),
    city=st.text(st.characters(blacklist_characters="<", blacklist_categories=("Cs",)), max_size=30),
    days=st.integers(-(10**9), 10**9),
)
def test_any_text_comes_back_in_formats_that_have_it_between_marks(kind, city, days):
    if kind not in TEMPLATES:
        return
    text = spoken(TEMPLATES[kind], [("add", {"city": city, "days": days})])
    assert read(kind, [text]) == read(kind, list(text)) == ("", [("add", {"city": city, "days": days})])


def test_every_format_has_a_template_here_or_is_one_that_has():
    shown = {FORMATS[name] for name in TEMPLATES}
    assert [name for name, kind in FORMATS.items() if kind not in shown] == ["mimo"]


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        ("hermes", '<tool_call>{"name": "add"}</tool_call> done', " done", [("add", {})]),
        ("hermes", '<tool_call>{"id": 7, "ok": true, "name": "add", "arguments": null}</tool_call>', "", [("add", {})]),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", {"a": 1})]),
        ("hermes", "<tool_call>none</tool_call>", "<tool_call>none</tool_call>", []),
        ("hermes", '<tool_call>{"title": "add"}</tool_call>', '<tool_call>{"title": "add"}</tool_call>', []),
        (
            "hermes",
            '<tool_call>{"name": oops}</tool_call><tool_call>{"name": "add"}</tool_call>',
            '<tool_call>{"name": oops}</tool_call>',
            [("add", {})],
        ),
        ("granite", '<tool_call>[{"name": "add", "arguments": {}}]', "", [("add", {})]),
        ("ernie45", "<response>\nHi.\n</response>\n", "\nHi.\n\n", []),
        ("cohere_command3", "<|START_RESPONSE|>Hi.<|END_RESPONSE|>", "Hi.", []),
        ("llama3_json", '<|python_tag|>{"name": "other", "parameters": {}}', "", [("other", {})]),
        ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("llama3_json", 'I call {x}: {"name": "add", "parameters": {}}', "I call {x}:", [("add", {})]),
        ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama3_json", '{"name": "Bob", "parameters": {"x": 1}} is', '{"name": "Bob", "parameters": {"x": 1}} is', []),
        ("xlam", 'So:\n```json\n[{"name": "add", "arguments": {}}]\n```\nDone', "So:\nDone", [("add", {})]),
        ("xlam", "So:\n```json\n[1]\n``` [2]", "So:\n```json\n[1]\n``` [2]", []),
        (
            "pythonic",
            "[add(city='x'), get_weather(days=0x10)]",
            "",
            [("add", {"city": "x"}), ("get_weather", {"days": 16})],
        ),
        ("pythonic", "[add] and [other(1)] and [", "[add] and [other(1)] and [", []),
        ("pythonic", "[add(", "[add(", []),
        ("pythonic", "[add(1 + 1)]", "[add(1 + 1)]", []),
        (
            "lfm2",
            "<|tool_call_start|>[other('a', days=2)]<|tool_call_end|> ok",
            "<|tool_call_start|>[other('a', days=2)]<|tool_call_end|> ok",
            [],
        ),
        (
            "lfm2",
            "<|tool_call_start|>[add('a', days=2)]<|tool_call_end|> ok",
            " ok",
            [("add", {"city": "a", "days": 2})],
        ),
        ("lfm2", '<|tool_call_start|>[{"name": "add", "arguments": {}}]<|tool_call_end|>', "", [("add", {})]),
        ("mistral", "[TOOL_CALLS]add{}", "", [("add", {})]),
        ("mistral", "[TOOL_CALLS]!", "[TOOL_CALLS]!", []),
        # a close tag that is missing: the next thing ends the value, and the end the call
        (
            "qwen3_xml",
            "<function=add>\n<parameter=city>\nOslo\n<parameter=days>\n2\n</parameter>\n",
            "",
            [("add", {"city": "Oslo", "days": 2})],
        ),
        ("qwen3_xml", "<tool_call>\n<function=add>\n<parameter=city>\nOslo\n", "", [("add", {"city": "Oslo"})]),
        ("qwen3_xml", "<tool_call>\n<function=add>\n<parameter=days>\n2", "", [("add", {"days": 2})]),
        ("qwen3_xml", "<tool_call>\nplain text\n</tool_call>", "<tool_call>\nplain text\n</tool_call>", []),
        (
            "mimo",
            "<tool_call><function=add><parameter=city>\nOslo\n</parameter></function></tool_call>",
            "",
            [("add", {"city": "\nOslo\n"})],
        ),
        ("glm45", "<tool_call>add</tool_call>", "", [("add", {})]),
        ("gemma4", '<|tool_call>call:add{city:<|"|>a,b}<|"|>}<tool_call|>', "", [("add", {"city": "a,b}"})]),
        ("gemma4", "<|tool_call>call:add{city:7}", "", [("add", {"city": "7"})]),
        ("gemma4", "<|tool_call>call:add{city}<tool_call|>", "<|tool_call>call:add{city}<tool_call|>", []),
        (
            "minicpm5",
            '<function name="add"><param name="city">plain</param></function>',
            "",
            [("add", {"city": "plain"})],
        ),
        ("k2_horizon", '<ifm|tool_call>{"name": "add", "arguments": {}}</ifm|tool_call>', "", [("add", {})]),
        (
            "kimi_k3",
            '<|open|>tools<|sep|><|open|>call tool="add" index="1"<|sep|><|open|>json'
            ' type="object"<|sep|>{"a": 1}<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
            "",
            [("add", {"a": 1})],
        ),
        (
            "kimi_k2",
            "<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|><|tool_call_end|>",
            "",
            [("add", {})],
        ),
        (
            "openai",
            "<|channel|>commentary<|message|>First.<|end|><|start|>assistant"
            " to=functions.add<|channel|>commentary json<|message|>{}<|call|>",
            "First.",
            [("add", {})],
        ),
        ("openai", " to=functions.add<|channel|>commentary json<|message|>{}", "", [("add", {})]),
        ("openai", "<|channel|>final<|message|>Hi.<|return|>", "Hi.", []),
        (
            "gigachat3",
            'Hm.<|message_sep|>\n\nfunction call<|role_sep|>\n{"name": "add", "arguments": {}}<|message_sep|>',
            "Hm.",
            [("add", {})],
        ),
        ("muse_glimmer", " to=user<|message|>Hi.", "Hi.", []),
        (
            "minimax_m3",
            ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="add">oops]<]minimax[>[</invoke>',
            ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="add">oops]<]minimax[>[</invoke>',
            [],
        ),
    ],
)
def test_what_models_write_besides(kind, text, content, calls):
    assert read(kind, [text]) == (content, calls)
    assert read(kind, list(text)) == (content, calls)


def test_a_suffix_is_part_of_every_tag():
    kind = FORMATS["hy_v3"].with_suffix(":v1")
    parser = ToolCallParser(kind, TOOLS)
    text = spoken(TEMPLATES["hy_v3"], CALLS[1:])
    for tag in ("tool_calls", "tool_call", "tool_sep", "arg_key", "arg_value"):
        text = text.replace(f"{tag}>", f"{tag}:v1>")
    deltas = [*parser.push(text), *parser.flush(is_cut=False)]
    assert "".join(delta.arguments for delta in deltas if isinstance(delta, CallDelta)) == '{"city": "7"}'


def test_the_model_s_own_id_of_a_call_is_kept():
    parser = ToolCallParser(FORMATS["kimi_k2"], TOOLS)
    text = spoken(TEMPLATES["kimi_k2"], CALLS)
    assert [delta.id for delta in parser.push(text) if isinstance(delta, CallDelta)] == [
        "functions.get_weather:0",
        "functions.add:1",
    ]
