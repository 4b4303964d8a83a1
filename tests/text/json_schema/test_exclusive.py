"""Which alternatives have no value in common, and what would keep two apart."""

from __future__ import annotations

import pytest

from text.json_schema.exclusive import exclusions, types_of
from text.json_schema.places import Place

A = {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}
B = {"type": "object", "properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]}


def found(options: list, around: dict | None = None, definitions: dict | None = None) -> list[set[str]] | None:
    place = Place.root({"oneOf": options, "$defs": definitions or {}})
    return exclusions([place.below("oneOf", index) for index in range(len(options))], types_of(around or {}))


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "string"}, {"type": "integer"}, {"type": "null"}],
        [{"const": 1}, {"const": 2}, {"enum": ["1", 3.5]}],
        [A, B],
        [{"allOf": [A, True]}, {"anyOf": [B, {"type": "null"}]}],
        [{**A, "additionalProperties": False}, {"type": "object", "required": ["k", "other"]}],
        [
            {"type": "object", "properties": {"in": A}, "required": ["in"]},
            {"type": "object", "properties": {"in": B}, "required": ["in"]},
        ],
        [False, True],
        [True],
    ],
)
def test_these_are_apart(options):
    assert found(options) == [set() for _ in options]


def test_references_are_followed():
    assert found([{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], definitions={"A": A, "B": B}) == [set(), set()]


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [A, A],
        [True, {"type": "null"}],
        [{"required": ["a"]}, {"required": ["b"]}],
        [{"type": "string", "minLength": 3}, {"type": "string"}],
        [{"$ref": "#/$defs/Loop"}, {"type": "null"}],
    ],
)
def test_these_may_not_be(options):
    assert found(options, definitions={"Loop": {"$ref": "#/$defs/Loop"}}) is None


def test_a_property_that_one_requires_keeps_two_apart_where_it_is_forbidden():
    one, other = {"required": ["a"]}, {"required": ["a", "b"]}
    assert found([one, other], {"type": "object"}) == [{"b"}, set()]
    assert found([{"required": ["a"]}, {"required": ["b"]}], {"type": "object"}) == [{"b"}, set()]
