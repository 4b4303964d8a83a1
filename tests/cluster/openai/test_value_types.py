"""Texts of arguments in the types that a tool's schema wants."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.openai.value_types import ToolSchema, fitted, json_of, typed

ANY = ("null", "integer", "number", "boolean", "object", "array", "string")


def value(text, schema, **definitions):
    tool = ToolSchema({"properties": {"a": schema}, "$defs": definitions})
    return typed(text, tool.types(tool.parameter("a")))


@pytest.mark.parametrize(
    ("text", "schema", "wanted"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("+5 ", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, 5.5),
        ("five", {"type": "integer"}, "five"),
        ("5", {"type": "number"}, 5),
        ("5.0", {"type": "number"}, 5),
        ("5e-1", {"type": "number"}, 0.5),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("True", {"type": "boolean"}, True),
        ("0", {"type": "boolean"}, False),
        ("maybe", {"type": "boolean"}, "maybe"),
        ("null", {"type": "null"}, None),
        ("null", {"type": "string"}, "null"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string", "nullable": True}, None),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ("7", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, 7),
        ("x", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, "x"),
        ('{"b": [1]}', {"type": "object"}, {"b": [1]}),
        ("{'b': [True, None]}", {"type": "object"}, {"b": [True, None]}),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("[1, 2]", {"type": "object"}, [1, 2]),
        ("[1, 2]", {"type": "string"}, "[1, 2]"),
        ("not [1", {"type": "array"}, "not [1"),
        ("[1e999]", {"type": "array"}, "[1e999]"),
        ('["\\ud800"]', {"type": "array"}, ["\ufffd"]),
        ("2", {"enum": [1, 2]}, 2),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("3", {"const": 3}, 3),
        ('{"b": 1}', {"properties": {"b": {}}}, {"b": 1}),
        ("[1]", {"items": {}}, [1]),
        ("7", {"type": "int"}, 7),
        ("7", {"type": "str"}, "7"),
        ("7", {"description": "anything"}, "7"),
        ("7", {}, "7"),
        ("7", True, "7"),
        ("7", {"$ref": "#/$defs/Number"}, 7),
        ("7", {"allOf": [{"$ref": "#/$defs/Number"}]}, 7),
        ("7", {"$ref": "#/$defs/Missing"}, "7"),
        ("7", {"$ref": "#/$defs/Loop"}, "7"),
        ("7", {"anyOf": [{"$ref": "#/$defs/Nested"}]}, "7"),
    ],
)
def test_a_text_is_what_the_schema_wants_where_it_can_be(text, schema, wanted):
    found = value(
        text,
        schema,
        Number={"type": "integer"},
        Loop={"$ref": "#/$defs/Loop"},
        Nested={"anyOf": [{"$ref": "#/$defs/Nested"}]},
    )
    assert (type(found), found) == (type(wanted), wanted)


def test_parameters_that_the_schema_does_not_tell_of_are_texts():
    assert ToolSchema(None).types(ToolSchema(None).parameter("a")) == frozenset()
    assert ToolSchema({"properties": []}).parameter("a") is None
    tool = ToolSchema({"properties": {}, "additionalProperties": {"type": "integer"}})
    assert tool.types(tool.parameter("a")) == {"integer"}


def test_parameters_may_stand_behind_references_and_alternatives():
    tool = ToolSchema(
        {"allOf": [{"$ref": "#/$defs/One"}], "$defs": {"One": {"properties": {"a": {"type": "integer"}}}}}
    )
    assert tool.types(tool.parameter("a")) == {"integer"}


def test_alternatives_that_go_in_circles_are_looked_at_once():
    again = {"$ref": "#/$defs/Again"}
    tool = ToolSchema({"properties": {"a": again}, "$defs": {"Again": {"anyOf": [again, {"type": "null"}, again]}}})
    assert tool.types(tool.parameter("a")) == {"null"}
    assert tool.property_of(tool.parameter("a"), "b") is None
    assert tool.items_of(tool.parameter("a")) is None


@given(st.text(max_size=20), st.sets(st.sampled_from(ANY)))
def test_whatever_the_text_it_gives_a_value_that_can_be_sent(text, types):
    json.dumps(typed(text, frozenset(types)), allow_nan=False, ensure_ascii=False).encode()


def test_values_of_other_syntaxes_are_fitted_where_they_are_not_in_a_type_that_is_wanted():
    tool = ToolSchema(
        {
            "properties": {
                "name": {"type": "string"},
                "at": {"type": "object", "properties": {"hour": {"type": "string"}}},
                "all": {"type": "array", "items": {"type": "integer"}},
            }
        }
    )
    assert fitted(7, tool.parameter("name"), tool) == "7"
    assert fitted({"x": 1}, tool.parameter("name"), tool) == '{"x": 1}'
    assert fitted([1], tool.parameter("name"), tool) == "[1]"
    assert fitted({"hour": 7, "more": 8}, tool.parameter("at"), tool) == {"hour": "7", "more": 8}
    assert fitted(["1", 2], tool.parameter("all"), tool) == [1, 2]
    assert fitted(True, tool.parameter("unknown"), tool) is True


def test_what_is_neither_json_nor_a_literal_is_none():
    assert json_of("x y") is None
    assert json_of("[" * 100_000) is None
    assert json_of('{"a": 1}') == {"a": 1}
