"""Values of arguments that a model wrote as plain text, in the types that the tool's schema wants."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from cluster.openai.literals import NotALiteralError, read_literal

STRING: Final = frozenset({"string"})
_ALL: Final = frozenset({"null", "integer", "number", "boolean", "object", "array", "string"})
#: names for types that clients use and JSON Schema does not know
_ALIASES: Final = {
    **dict.fromkeys(("str", "text", "char", "varchar", "enum"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "uint", "uint32", "uint64", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("float", "float32", "float64", "double"), "number"),
    **dict.fromkeys(("dict", "map"), "object"),
    **dict.fromkeys(("list", "arr", "tuple", "sequence"), "array"),
    "bool": "boolean",
    "none": "null",
}
_INTEGER: Final = re.compile(r"\s*([+-]?[0-9]{1,4000})\s*")
_MAX_HOPS = 32  #: of references to references


class ToolSchema:
    """The parameters of one tool; of an unknown one those of an empty schema."""

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        self._root: Mapping[str, Any] = schema or {}

    @property
    def names(self) -> list[str]:
        """The parameters' names, in order."""
        properties = self._resolved(self._root).get("properties")
        return list(properties) if isinstance(properties, Mapping) else []

    def property_of(self, schema: Any, key: str) -> Any:
        """Return the schema of an object's property; None where nothing is known of it."""
        parts = self._parts(schema)
        for part in parts:
            properties = part.get("properties")
            if isinstance(properties, Mapping) and key in properties:
                return properties[key]
        others = (part.get("additionalProperties") for part in parts)
        return next((other for other in others if isinstance(other, Mapping)), None)

    def parameter(self, key: str) -> Any:
        """Return the schema of a parameter; None where the tool has none of that name."""
        return self.property_of(self._root, key)

    def items_of(self, schema: Any) -> Any:
        """Return the schema of an array's items; None where nothing is known of them."""
        items = (part.get("items") for part in self._parts(schema))
        return next((each for each in items if isinstance(each, Mapping)), None)

    def types(self, schema: Any) -> frozenset[str]:
        """Return the names of the types that `schema` allows; none where it tells of none."""
        return frozenset().union(*map(_own_types, self._parts(schema))) & _ALL

    def _parts(self, schema: Any) -> list[Mapping[str, Any]]:
        """Return a schema and its alternatives, theirs too, without references; each once, if they go in circles."""
        parts: dict[int, Mapping[str, Any]] = {}
        waiting = [schema]
        while waiting:
            part = self._resolved(waiting.pop())
            if id(part) not in parts:
                parts[id(part)] = part
                several = [part[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(part.get(key), list)]
                waiting += reversed([each for alternatives in several for each in alternatives])
        return list(parts.values())

    def _resolved(self, schema: Any) -> Mapping[str, Any]:
        """Follow references within the schema."""
        for _ in range(_MAX_HOPS):
            if not isinstance(schema, Mapping):
                return {}
            place = schema.get("$ref")
            if not isinstance(place, str) or not place.startswith("#"):
                return schema
            schema = self._root
            for step in place[1:].split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                schema = schema.get(step) if isinstance(schema, Mapping) else None
        return {}


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    """Return the names of types that a schema itself tells of, whatever its alternatives do."""
    named = schema.get("type")
    names = named if isinstance(named, list) else [named]
    found = {_ALIASES.get(name.strip().lower(), name.strip().lower()) for name in names if isinstance(name, str)}
    values = schema["enum"] if isinstance(schema.get("enum"), list) else []
    found |= {_type_of(value) for value in [*values, *([schema["const"]] if "const" in schema else [])]}
    if schema.get("nullable") is True:
        found.add("null")
    if not found and isinstance(schema.get("properties"), Mapping):
        found.add("object")
    if not found and isinstance(schema.get("items"), Mapping):
        found.add("array")
    return found


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "object")


def typed(text: str, types: frozenset[str]) -> Any:
    """Return the value that `text` stands for, of the first of `types` that it can be; the text itself where of none.

    The order is null, integer, number, boolean, object, array, string. No types at all: it is a string.
    """
    stripped = text.strip()
    if "null" in types and stripped.lower() in ("null", "none"):
        return None
    if "integer" in types and (match := _INTEGER.fullmatch(text)):
        return int(match[1])
    if "number" in types and (number := _number(stripped)) is not None:
        return number
    if "boolean" in types and stripped.lower() in ("true", "false", "1", "0"):
        return stripped.lower() in ("true", "1")
    if types & {"object", "array"}:
        value = json_of(text)
        if (isinstance(value, dict) and "object" in types) or (isinstance(value, list) and "array" in types):
            return value
    if not types or "string" in types:
        return text
    value = json_of(text)
    return text if value is None and stripped != "null" else value


def _number(text: str) -> float | int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value) or "_" in text:
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def json_of(text: str) -> Any:
    """Return what `text` says in JSON or as a Python literal; None where it is neither, or cannot be sent in JSON."""
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        try:
            return read_literal(text)
        except NotALiteralError:
            return None
    return value


def fitted(value: Any, schema: Any, tool: ToolSchema) -> Any:
    """Return `value`, read by a syntax that has types of its own, in the types of `schema`."""
    if isinstance(value, dict):
        if tool.types(schema) == STRING:
            return json.dumps(value, ensure_ascii=False)
        return {key: fitted(item, tool.property_of(schema, key), tool) for key, item in value.items()}
    if isinstance(value, list):
        if tool.types(schema) == STRING:
            return json.dumps(value, ensure_ascii=False)
        return [fitted(item, tool.items_of(schema), tool) for item in value]
    types = tool.types(schema)
    if not types or _type_of(value) in types or (_type_of(value) == "integer" and "number" in types):
        return value
    return typed(value if isinstance(value, str) else json.dumps(value), types)
