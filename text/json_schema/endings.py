"""Which schemas have values that end: a reference that needs itself has none, and its grammar would go on for ever."""

from __future__ import annotations

from typing import Any

from text.json_schema.exclusive import types_of

Written = dict[str, Any] | bool


def finite(definitions: dict[str, Written]) -> dict[str, Written]:
    """Replace by false what only values that never end would satisfy: references that need themselves."""
    ending: set[str] = set()
    while True:
        more = {name for name in definitions.keys() - ending if ends(definitions[name], ending)}
        if not more:
            break
        ending |= more
    if len(ending) == len(definitions):
        return definitions
    return {name: _pruned(schema, ending) if name in ending else False for name, schema in definitions.items()}


def ends(schema: Written, ending: set[str]) -> bool:
    """Tell whether some value of the schema is known to end, by the definitions that do."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in ending:
        return False
    properties = schema.get("properties", {})
    must = [properties.get(name, schema.get("additionalProperties", True)) for name in schema.get("required", [])]
    prefix = schema.get("prefixItems", [])
    num_items = schema.get("minItems", 0)
    must += prefix[:num_items]
    if num_items > len(prefix):
        must.append(schema.get("items", True))
    has_other_type = bool(types_of(schema) - {"object", "array"}) and not {"const", "enum"} & schema.keys()
    return (
        (has_other_type or all(ends(inner, ending) for inner in must))
        and all(ends(inner, ending) for inner in schema.get("allOf", []))
        and ("anyOf" not in schema or any(ends(inner, ending) for inner in schema["anyOf"]))
    )


def _pruned(schema: Any, ending: set[str]) -> Any:
    """Return a schema with false for references to what does not end. What stands in constants stays."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in ending:
        return False
    out: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties"):
            out[keyword] = {name: _pruned(inner, ending) for name, inner in value.items()}
        elif keyword in ("allOf", "anyOf", "prefixItems"):
            out[keyword] = [_pruned(inner, ending) for inner in value]
        elif keyword in ("items", "additionalProperties"):
            out[keyword] = _pruned(value, ending)
        else:
            out[keyword] = value
    return out
