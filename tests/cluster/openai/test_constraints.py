"""Which structure a request asks for, under which of its names, and what is refused before a worker sees it."""

from __future__ import annotations

import json

import pytest

from cluster.openai.constraints import constraint_of, json_grammar
from cluster.openai.protocol import JsonSchemaFormat, ResponseFormat, SharedFields, StructuredOutputs
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
