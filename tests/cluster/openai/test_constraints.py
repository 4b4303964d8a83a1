"""Which structure a request asks for, under which of its names, and what is refused before a worker sees it."""

from __future__ import annotations

import json

import pytest

from cluster.openai.chat import _beside_tools
from cluster.openai.constraints import constraint_of, json_grammar
from cluster.openai.protocol import JsonSchemaFormat, ResponseFormat, SharedFields, StructuredOutputs
from cluster.openai.tools import ToolPlan
from messages.errors import RequestError
from messages.request import Grammar

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {}}, "title": "é"}
SCHEMA_FORMAT = ResponseFormat("json_schema", JsonSchemaFormat("n", SCHEMA))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": ResponseFormat("text")},
        {"response_format": ResponseFormat("text", JsonSchemaFormat("n", SCHEMA))},
        {"structured_outputs": StructuredOutputs()},
        {"structured_outputs": StructuredOutputs(json_object=False)},
    ],
)
def test_free_text_has_no_structure(fields):
    assert constraint_of(SharedFields(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "param", "kind"),
    [
        ({"response_format": SCHEMA_FORMAT}, "response_format.json_schema.schema", "json_schema"),
        ({"structured_outputs": StructuredOutputs(json_=SCHEMA)}, "structured_outputs.json", "json_schema"),
        ({"guided_json": SCHEMA}, "guided_json", "json_schema"),
        ({"guided_json": json.dumps(SCHEMA)}, "guided_json", "json_schema"),
        ({"response_format": ResponseFormat("json_object")}, "response_format", "json_object"),
        (
            {"structured_outputs": StructuredOutputs(json_object=True)},
            "structured_outputs.json_object",
            "json_object",
        ),
    ],
)
def test_all_spellings_of_a_schema_mean_one_grammar_and_keep_their_name(fields, param, kind):
    found = constraint_of(SharedFields(**fields))
    assert found is not None
    assert (found[0], found[1].kind) == (param, kind)
    if kind == "json_schema":
        assert list(json.loads(found[1].spec)["properties"]) == ["z", "a"], (
            "the order of its properties is the client's"
        )
        assert json.loads(found[1].spec) == SCHEMA


@pytest.mark.parametrize("prefix", ["guided_", "structured_outputs."])
@pytest.mark.parametrize(
    ("name", "value", "grammar"),
    [
        ("regex", "", Grammar(kind="regex", spec="")),
        ("grammar", "start: x", Grammar(kind="lark", spec="start: x")),
        ("choice", ["b", "a"], Grammar(kind="choice", spec='["b","a"]')),
    ],
)
def test_both_of_vllms_spellings_are_read(prefix, name, value, grammar):
    if prefix == "guided_":
        fields = SharedFields(**{f"guided_{name}": value})
    else:
        fields = SharedFields(structured_outputs=StructuredOutputs(**{name: value}))
    assert constraint_of(fields) == (prefix + name, grammar)


def test_of_two_structures_the_second_is_at_fault_and_both_are_named():
    fields = SharedFields(
        response_format=ResponseFormat("json_object"), structured_outputs=StructuredOutputs(regex="a"), guided_regex="b"
    )
    with pytest.raises(RequestError, match=r"got response_format and structured_outputs\.regex and guided_regex") as e:
        constraint_of(fields)
    assert e.value.param == "structured_outputs.regex"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        (ResponseFormat("yaml"), "response_format.type", "invalid_value"),
        (ResponseFormat("json_schema"), "response_format.json_schema.schema", "missing_required_field"),
        (
            ResponseFormat("json_schema", JsonSchemaFormat("n")),
            "response_format.json_schema.schema",
            "missing_required_field",
        ),
    ],
)
def test_a_response_format_that_says_too_little_is_refused(fields, param, code):
    with pytest.raises(RequestError) as caught:
        constraint_of(SharedFields(response_format=fields))
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("schema", ["{", "[]", '"x"', [], 1, True, pytest.param("[" * 50_000, id="deep")])
def test_what_is_no_schema_is_refused_under_its_name(schema):
    with pytest.raises(RequestError, match="want a JSON schema") as caught:
        json_grammar("the_field", schema)
    assert caught.value.param == "the_field"


@pytest.mark.parametrize(("choices", "is_fine"), [(1, True), (4096, True), (0, False), (4097, False)])
def test_so_many_choices_can_be_given(choices, is_fine):
    fields = SharedFields(guided_choice=["x"] * choices)
    if is_fine:
        assert constraint_of(fields) is not None
        return
    with pytest.raises(RequestError, match="1 to 4096 strings"):
        constraint_of(fields)


CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("fields", "whitespace"),
    [
        ({"guided_json": SCHEMA}, "W"),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " "}, " "),
        ({"structured_outputs": StructuredOutputs(json_=SCHEMA, whitespace_pattern="\\n?")}, "\\n?"),
        ({"structured_outputs": StructuredOutputs(json_object=True, disable_any_whitespace=True)}, ""),
        ({"structured_outputs": StructuredOutputs(json_object=True, disable_any_whitespace=False)}, "W"),
        ({"guided_regex": "a"}, ""),
    ],
)
def test_white_space_is_the_requests_or_the_servers(fields, whitespace):
    found = constraint_of(SharedFields(**fields), "W")
    assert found is not None
    assert found[1].whitespace == whitespace


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"json_schema": {}}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "response_format"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"regex": "a+"}, "regex"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"echo": True}, "echo"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"logits_processors": ["x"]}, "logits_processors"),
    ],
)
def test_what_would_change_the_output_and_is_not_served_is_refused(server, fields, param):
    reply = server.post(CHAT, {"messages": USER, **fields})
    assert reply.status_code == 400
    assert param in reply.json()["error"]["message"]
    assert server.backend.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": [], "functions": None, "use_beam_search": False, "length_penalty": 1.0, "echo": False},
        {"guided_decoding_backend": "auto", "function_call": "auto", "vllm_xargs": {}, "unheard_of": 3},
    ],
)
def test_what_changes_nothing_is_not(server, fields):
    assert server.post(CHAT, {"messages": USER, **fields}).status_code == 200


def test_a_schema_that_cannot_be_followed_is_refused_by_keyword(server):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    error = server.post(CHAT, {"messages": USER, "response_format": wanted}).json()["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert "uniqueItems at #/properties/a" in error["message"]
    tools = [TOOL, {"type": "function", "function": {"name": "bad", "parameters": schema}}]
    error = server.post(CHAT, {"messages": USER, "tools": tools, "tool_choice": "required"}).json()["error"]
    assert "uniqueItems at #/$defs/tools[1].function.parameters/properties/a" in error["message"]
    assert server.post(CHAT, {"messages": USER, "tools": tools}).status_code == 200


def test_beside_tools_the_output_is_the_format_or_begins_as_a_call(server):
    fields = {"messages": USER, "tools": [TOOL], "response_format": {"type": "json_object"}}
    assert server.post(CHAT, fields).status_code == 200
    spec = server.backend.requests[-1].params.grammar.spec
    assert "start: @g1 | @g2" in spec
    assert "tool_call" in spec
    assert server.post(CHAT, {**fields, "tool_choice": "none"}).status_code == 200
    assert "@g1" not in server.backend.requests[-1].params.grammar.spec


def test_beside_tools_whose_calls_nobody_knows_a_format_is_refused():
    plan = ToolPlan(template_tools=[TOOL])
    with pytest.raises(RequestError, match=r"guided_regex: got it together with tools, .* not known") as caught:
        _beside_tools(None, ("guided_regex", Grammar(kind="regex", spec="a")), plan)
    assert (caught.value.param, caught.value.status) == ("guided_regex", 400)


@pytest.mark.parametrize("levels", [60, 300, 480, 900, 960, 990, 3000])
def test_a_schema_nested_however_deep_is_followed_or_refused(server, levels):
    schema = '{"items":' * levels + '{"type":"null"}' + "}" * levels
    named = '"tool_choice":{"type":"function","function":{"name":"f"}}'
    for fields in (
        f'"guided_json":{schema}',
        f'"guided_json":{json.dumps(schema)}',
        f'"tools":[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}],"tool_choice":"required"',
        f'"tools":[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}],{named}',
    ):
        body = f'{{"messages":[{{"role":"user","content":"Hi"}}],"max_tokens":2,{fields}}}'
        reply = server.http.post(f"{server.url}{CHAT}", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code in ((200,) if levels == 60 and "tools" not in fields else (200, 400)), reply.text[:300]
