"""Every keyword of JSON Schema 2020-12: followed, or refused under its name; what only describes is left out."""

from __future__ import annotations

import functools
import json
import time

import jsonschema
import pytest

from messages.errors import RequestError
from tests.text.masked_walk import MaskedWalk, byte_tokenizer
from text.json_schema.translation import followable


@functools.cache
def masked_walk() -> MaskedWalk:
    return MaskedWalk(byte_tokenizer())


TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value"],
    "additionalProperties": False,
}
TAGGED = {
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    "discriminator": {"propertyName": "kind"},
    "$defs": {
        "Cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
        "Dog": {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]},
    },
}

FOLLOWED = [
    {"uniqueItems": False, "type": "array"},
    {"uniqueItems": True, "type": "array", "maxItems": 1},
    {"uniqueItems": True, "type": "array", "items": {"enum": ["a", "b", 3]}, "minItems": 2},
    {"uniqueItems": True, "type": ["array", "null"], "items": {"type": "boolean"}},
    {"nullable": True, "deprecated": True, "x-order": 3, "readOnly": True, "$comment": "c", "examples": [1]},
    {"type": "string", "format": "path", "contentEncoding": "base64", "writeOnly": True},
    {"type": "string", "format": "binary", "minLength": 2.0, "maxLength": 2**40},
    {"type": "string", "pattern": "^[a-z&&[^b]+$"},
    {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
    {"type": "string", "pattern": "^abc$", "format": "email"},
    {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 5},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "integer", "minimum": -(10**30), "maximum": 10**30},
    {"type": "integer", "exclusiveMinimum": 2**53, "exclusiveMaximum": 2**64},
    {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3.5, "multipleOf": 2},
    {"type": "number", "minimum": -1e300, "maximum": 1e300},
    {"type": "number", "minimum": -(10**400), "maximum": 10**400},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"const": 2**53},
    {"const": {"$ref": "#/nowhere", "$id": 3, "a": [1.0, None, "\n"]}},
    {"enum": [{"$ref": "x"}, "a", 1e22, True]},
    {"type": ["string", "null"], "enum": ["a", None, 3]},
    TAGGED,
    TREE,
    {"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "null"}}]},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    },
    {"$ref": "#here", "$defs": {"A": {"$anchor": "here", "type": "boolean"}}},
    {"$id": "http://a.example/b", "$ref": "c", "$defs": {"A": {"$id": "c", "type": "boolean"}}},
    {"$id": "http://a.example/b", "$ref": "http://a.example/b#/$defs/A", "$defs": {"A": {"type": "null"}}},
    {"$ref": "#/properties/a", "properties": {"a": {"type": "integer"}}},
    {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "integer"}}},
    {"allOf": [{"properties": {"a": {"type": "integer"}}}], "type": "object", "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}, "properties": {"a": {"type": "string"}}},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}},
    {"type": "object", "propertyNames": {"$ref": "#/$defs/E"}, "$defs": {"E": {"enum": ["r"]}}, "minProperties": 1},
    {"propertyNames": {"$ref": "#/$defs/E", "title": "of the key"}, "$defs": {"E": {"enum": ["r"]}}, "type": "object"},
    {"type": "object", "propertyNames": {"type": "integer"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": True, "b": {"type": "null"}}},
    {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}, "properties": {"a": True, "b": False}},
    {"type": "object", "minProperties": 1, "maxProperties": 3},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "minProperties": 1,
     "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}}, "unevaluatedProperties": False},
    {"type": "array", "contains": {"type": "null"}, "minContains": 2, "items": {"type": ["null", "integer"]}},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False, "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "integer"}], "unevaluatedItems": False},
    {"not": {"type": ["object", "array", "number"]}},
    {"not": {"required": ["a"]}, "properties": {"b": {"type": "null"}}},
    {"properties": {"a": {"not": {}}, "b": {"anyOf": [{"not": {}}, {"type": "string"}]}}, "required": ["b"],
     "type": "object", "additionalProperties": False},
    {"if": {"type": "null"}},
    {"then": False, "minContains": 3},
    {"x-guidance": {"lenient": True}, "type": "boolean"},
    {"$ref": "#/definitions/Root", "$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"Root": {
        "type": "object", "properties": {
            "pair": {"type": "array", "minItems": 1, "items": [{"type": "string"}], "additionalItems": False},
            "above": {"anyOf": [{"$ref": "#/definitions/Root"}, {"type": "null"}], "nullable": True},
            "level": {"type": "number", "exclusiveMinimum": 0},
        }, "required": ["pair", "above", "level"], "additionalProperties": False}}},
    {"$schema": "http://json-schema.org/draft-04/schema#", "id": "a", "type": "number", "minimum": 0,
     "exclusiveMinimum": True},
    {"$schema": "https://json-schema.org/draft/2019-09/schema#", "type": "object", "properties": {
        "set": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}, "uniqueItems": True},
        "map": {"type": "object", "additionalProperties": {"type": "string"}, "propertyNames": {"enum": ["x", "y"]}},
     }, "required": ["set", "map"], "additionalProperties": False},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")  # of Python's, for patterns that it reads otherwise
@pytest.mark.parametrize("schema", FOLLOWED, ids=lambda schema: json.dumps(schema)[:60])
def test_what_is_followed_is_followed(schema):
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(schema)
    texts = masked_walk().json_texts(schema, 8)
    assert texts
    for text in texts:
        validator.validate(json.loads(text))


REFUSED = [
    ({"uniqueItems": True, "type": "array"}, "uniqueItems"),
    ({"uniqueItems": "yes", "type": "array"}, "uniqueItems"),
    ({"not": {"minimum": 3}}, "not"),
    ({"not": {}}, "not"),
    ({"not": True}, "not"),
    ({"properties": {"a": {"not": {}}}, "required": ["a"]}, "required"),
    ({"if": {"type": "null"}, "then": {"const": None}}, "if"),
    ({"contains": {"type": "null"}, "maxContains": 1}, "maxContains"),
    ({"contains": {"type": "null"}, "prefixItems": [True]}, "contains"),
    ({"$dynamicRef": "#x"}, "$dynamicRef"),
    ({"$recursiveRef": "#"}, "$recursiveRef"),
    ({"$ref": "http://a.example/x"}, "$ref"),
    ({"$ref": "#/$defs/A"}, "$ref"),
    ({"$ref": 3}, "$ref"),
    ({"$ref": "#/x", "x": 3}, "$ref"),
    ({"$ref": "#"}, "$ref"),
    ({**TREE, "required": ["children"], "properties": {"children": {"$ref": "#"}}}, "$ref"),
    ({"$id": 3}, "$id"),
    ({"$id": "http://a.example", "items": {"$id": "http://[x"}}, "$id"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "id": []}, "id"),
    ({"minProperties": 2, "type": "object"}, "minProperties"),
    ({"maxProperties": 2, "type": "object", "properties": {"a": {}}}, "minProperties"),
    ({"minProperties": 3, "maxProperties": 2}, "minProperties"),
    ({"unevaluatedProperties": False, "anyOf": [True]}, "unevaluatedProperties"),
    ({"unevaluatedItems": False, "allOf": [True]}, "unevaluatedItems"),
    ({"propertyNames": {"pattern": "a", "maxLength": 2}}, "propertyNames"),
    ({"propertyNames": {"pattern": "a"}, "patternProperties": {"b": True}}, "propertyNames"),
    ({"propertyNames": {"enum": ["aa", "b"], "pattern": "^b"}}, "propertyNames"),
    ({"propertyNames": {"$ref": "#/$defs/N", "maxLength": 2}, "$defs": {"N": {"pattern": "^a"}}}, "propertyNames"),
    ({"propertyNames": {"$ref": "#/propertyNames"}}, "$ref"),
    ({"propertyNames": {"enum": 5}}, "enum"),
    ({"propertyNames": {"format": []}}, "format"),
    ({"uniqueItems": True, "items": {"$ref": "#/items"}}, "$ref"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"oneOf": [{"type": [["a"]]}, {"type": "string"}]}, "type"),
    ({"oneOf": [{"enum": 5}, {"const": 1}]}, "enum"),
    ({"oneOf": []}, "oneOf"),
    ({"anyOf": {}}, "anyOf"),
    ({"anyOf": [3]}, "anyOf"),
    ({"enum": []}, "enum"),
    ({"type": []}, "type"),
    ({"type": "objekt"}, "type"),
    ({"const": 2**70}, "const"),
    ({"enum": ["\x01"]}, "enum"),
    ({"minLength": -1}, "minLength"),
    ({"minLength": 3, "maxLength": 2}, "minLength"),
    ({"pattern": "("}, "pattern"),
    ({"pattern": "(?<=a)b"}, "pattern"),
    ({"pattern": "^a$", "minLength": 2, "type": "string"}, "pattern"),
    ({"minimum": "1"}, "minimum"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
    ({"type": "integer", "minimum": 10**20}, "minimum"),
    ({"type": "integer", "maximum": -(10**20)}, "maximum"),
    ({"type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 5}, "minimum"),
    ({"multipleOf": 0}, "multipleOf"),
    ({"multipleOf": 1e30}, "multipleOf"),
    ({"multipleOf": 10**400}, "multipleOf"),
    ({"minimum": 10**400}, "minimum"),
    ({"minItems": 10**4000}, "minItems"),
    ({"minItems": 3, "maxItems": 2}, "minItems"),
    ({"items": 3}, "items"),
    ({"properties": []}, "properties"),
    ({"required": "a"}, "required"),
    ({"required": ["b"], "additionalProperties": False, "type": "object"}, "required"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "type"),
    ({"patternProperties": {"^a": True, "b$": {"type": "null"}}}, "patternProperties"),
    ({"dependentRequired": {name: ["z"] for name in "abcdefgh"}}, "dependentRequired"),
]


@pytest.mark.parametrize(("schema", "keyword"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_be_followed_is_refused_under_its_name(schema, keyword):
    with pytest.raises(RequestError) as caught:
        masked_walk().json_texts(schema, 0)
    assert caught.value.status == 400
    assert f"{keyword} " in caught.value.message or f"{keyword}:" in caught.value.message
    assert len(caught.value.message) < 600


def test_the_place_of_what_is_refused_is_told():
    schema = {
        "properties": {"a": {"items": {"$ref": "#/$defs/A"}}},
        "$defs": {"A": {"anyOf": [True, {"not": {"minimum": 3}}]}},
    }
    with pytest.raises(RequestError, match=r"^not at #/\$defs/A/anyOf/1: got \{'minimum': 3\}"):
        followable(schema)


@pytest.mark.parametrize("depth", [30, 100, 400])
def test_schemas_may_be_nested(depth):
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    [text] = masked_walk().json_texts(schema, 1)
    assert text.count("[") == depth


def test_many_references_to_anchors_take_no_longer_than_others():
    names = [f"a{index}" for index in range(1000)]
    anchors = {name: {"$anchor": name, "type": "null"} for name in names}
    by_anchor = {"properties": {name: {"$ref": f"#{name}"} for name in names}, "$defs": anchors}
    by_pointer = {"properties": {name: {"$ref": f"#/$defs/{name}"} for name in names}, "$defs": anchors}
    begun_s = time.process_time()
    plain = followable(by_pointer)
    plain_s = time.process_time() - begun_s
    assert followable(by_anchor) == plain
    assert time.process_time() - begun_s - plain_s < 10 * plain_s + 0.5


def test_what_never_ends_is_left_out_where_there_is_another_way():
    schema = {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"$ref": "#/$defs/Endless"}, {"type": "null"}]},
            "b": {"$ref": "#/$defs/Endless"},
        },
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {
            "Endless": {"type": "object", "properties": {"e": {"$ref": "#/$defs/Endless"}}, "required": ["e"]},
        },
    }
    assert set(masked_walk().json_texts(schema, 5)) == {'{"a":null}'}
