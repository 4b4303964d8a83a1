"""Schemas drawn at random from all of JSON Schema 2020-12's keywords, sensible and not."""

from __future__ import annotations

import random
from typing import Any

Schema = Any

_PATTERNS = ["^a+$", "^[a-z]{2,5}$", "b", r"^\d{3}-\d{2}$", r"^(x|yy)*$", "^(?=.*[0-9]).{3,}$", "^(?!a)b", r"\.txt$"]
_FORMATS = [
    "date",
    "time",
    "date-time",
    "email",
    "uuid",
    "ipv4",
    "ipv6",
    "uri",
    "hostname",
    "duration",
    "path",
    "binary",
]
_NAMES = ["a", "b", "name", "kind", "x y", 'q"', "$ref", "é"]
_VALUES = [None, True, False, 0, 1, -3, 2**53, 2**64, 1.5, 1e300, "", "a", "cat", "\n", [], [1, "a"], {}, {"$ref": "#"}]


class SchemaDraw:
    """Draws schemas; `names` of definitions may be referred to."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._definitions = [f"D{index}" for index in range(self._rng.randrange(4))]

    def document(self) -> dict[str, Any]:
        schema = self._schema(3)
        while not isinstance(schema, dict):
            schema = self._schema(3)
        if self._definitions:
            schema = {**schema, "$defs": {name: self._schema(2) for name in self._definitions}}
        return schema

    def _schema(self, depth: int) -> Schema:
        rng = self._rng
        if depth <= 0:
            return rng.choice(
                [{"type": "integer"}, {"type": "string"}, {"enum": ["u", "v", 3]}, {"type": "boolean"}, {}]
            )
        kind = rng.choice(
            ["typed"] * 25
            + ["typed"] * 5
            + ["anyOf", "oneOf", "allOf", "ref", "values"] * 3
            + ["values", "anyOf", "oneOf", "allOf", "ref", "ref", "boolean", "mixed", "not", "if"]
        )
        match kind:
            case "values":
                values = rng.sample(_VALUES, rng.randrange(1, 5))
                return {"const": values[0]} if rng.random() < 0.4 else {"enum": values}
            case "anyOf" | "oneOf" | "allOf":
                options = [self._schema(depth - 1) for _ in range(rng.randrange(1, 4))]
                extra = self._typed(depth - 1) if rng.random() < 0.2 else {}
                return {**extra, kind: options}
            case "ref" if self._definitions:
                return {"$ref": f"#/$defs/{rng.choice(self._definitions)}", "description": "a reference"}
            case "boolean":
                return rng.choice([True, True, False])
            case "mixed":
                return {**self._typed(depth), **self._typed(depth)}
            case "not":
                return {"not": self._schema(depth - 1)}
            case "if":
                return {"if": self._schema(0), "then": self._schema(depth - 1)}
            case _:
                return self._typed(depth)

    def _typed(self, depth: int) -> dict[str, Any]:
        rng = self._rng
        kind = rng.choice(
            ["object"] * 3 + ["array", "array", "string", "string", "integer", "number", "null", "boolean"]
        )
        schema: dict[str, Any] = {"type": kind, "title": "T", "x-note": {"type": "nothing"}}
        if rng.random() < 0.1:
            schema["type"] = [kind, "null"] if kind != "null" else ["null", "string"]
        if rng.random() < 0.05:
            del schema["type"]
        schema.update(getattr(self, f"_{kind}", dict)() if kind in ("string", "integer", "number") else {})
        if kind == "object":
            schema.update(self._object(depth))
        if kind == "array":
            schema.update(self._array(depth))
        return schema

    def _some(self, of: dict[str, Any], share: float = 0.3) -> dict[str, Any]:
        return {keyword: value for keyword, value in of.items() if self._rng.random() < share}

    def _string(self) -> dict[str, Any]:
        rng = self._rng
        return self._some(
            {
                "minLength": rng.choice([0, 1, 3, 2.0]),
                "maxLength": rng.choice([2, 5, 30, 2**40]),
                "pattern": rng.choice(_PATTERNS),
                "format": rng.choice(_FORMATS),
            }
        )

    def _integer(self) -> dict[str, Any]:
        rng = self._rng
        return self._some(
            {
                "minimum": rng.choice([0, -5, 2.5, 2**53 + 1, -(2**63), -(10**30)]),
                "maximum": rng.choice([10, 100, 7.5, 2**53 + 1, 2**63 - 1, 2**64, 10**30]),
                "exclusiveMinimum": rng.choice([0, -1, 3.5]),
                "exclusiveMaximum": rng.choice([9, 1000, 2**53 + 2]),
                "multipleOf": rng.choice([1, 3, 7, 0]),
            }
        )

    def _number(self) -> dict[str, Any]:
        rng = self._rng
        return self._some(
            {
                "minimum": rng.choice([0, -0.5, -1e300, 1e-9]),
                "maximum": rng.choice([1, 3.25, 1e300, 2**70]),
                "exclusiveMinimum": rng.choice([0, 0.1]),
                "exclusiveMaximum": rng.choice([5, 1e6]),
                "multipleOf": rng.choice([0.5, 2, 0.25]),
            }
        )

    def _object(self, depth: int) -> dict[str, Any]:
        rng = self._rng
        names = rng.sample(_NAMES, rng.randrange(4))
        some = {
            "additionalProperties": rng.choice([True, False, False, self._schema(depth - 1)]),
            "required": rng.sample(names, rng.randrange(len(names) + 1)) + (["zz"] if rng.random() < 0.1 else []),
        }
        schema = {"properties": {name: self._schema(depth - 1) for name in names}, **self._some(some, 0.6)}
        rare = {
            "patternProperties": {rng.choice(["^p", "^[0-9]+$"]): self._schema(depth - 1)},
            "minProperties": rng.choice([0, 1, 2]),
            "maxProperties": rng.choice([1, 3, 10]),
            "propertyNames": rng.choice(
                [{"pattern": "^[a-z]+$"}, {"enum": ["a", "k"]}, {"type": "string"}, {"maxLength": 3}]
            ),
            "dependentRequired": {"a": ["b"]},
            "dependentSchemas": {"a": self._schema(0)},
            "unevaluatedProperties": rng.choice([True, False]),
        }
        return {**schema, **self._some(rare, 0.08)}

    def _array(self, depth: int) -> dict[str, Any]:
        rng = self._rng
        common = {
            "items": self._schema(depth - 1),
            "minItems": rng.choice([0, 1, 2]),
            "maxItems": rng.choice([1, 3, 2**40]),
        }
        rare = {
            "prefixItems": [self._schema(depth - 1) for _ in range(rng.randrange(1, 3))],
            "uniqueItems": rng.choice([True, False, False]),
            "contains": self._schema(0),
            "minContains": rng.choice([0, 2]),
            "maxContains": 3,
            "unevaluatedItems": False,
        }
        return {**self._some(common, 0.6), **self._some(rare, 0.1)}
