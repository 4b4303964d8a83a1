"""A client's JSON schema, written anew with the keywords that the grammar library follows.

What is written allows the same values or fewer, never others. A keyword that cannot be followed is refused by name;
what only describes values (`title`, `default`, formats that nobody has, words that JSON Schema does not know) is left
out, as JSON Schema 2020-12 has it. References lead to definitions of the new document, wherever they led before:
`$id`, `$anchor` and pointers into the middle of a schema are gone.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from decimal import Decimal
from itertools import permutations
from typing import Any, Final

from messages.errors import RequestError
from text.json_schema import number_bounds
from text.json_schema.endings import Written, ends, finite
from text.json_schema.exclusive import exclusions, types_at, types_of
from text.json_schema.places import Place, count, enumerated, flag, format_of, indices, keys, names_of, refused, shown
from text.json_schema.string_patterns import (
    LIBRARY_FORMATS,
    as_library_reads,
    pattern_of_format,
    without_looking_ahead,
)

_MAX_DEPTH: Final = (
    40  #: schemas within each other, before one becomes a definition: the library reads 128 levels of JSON
)
_MAX_CHARS: Final = 2**20  #: of a string: longer than any output
_MAX_ITEMS: Final = 2**30
_MAX_LEADING: Final = 32  #: items that `contains` asks for
_MAX_DISTINCT: Final = 4  #: values whose sets are written one by one
_MAX_DEPENDENT: Final = 6  #: properties on which others depend: each doubles the grammar

_TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")
_APPLICATORS: Final = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "not", "dependentSchemas", "dependencies"})
_NUMBERS: Final = frozenset(number_bounds.KEYWORDS)
_STRINGS: Final = frozenset({"pattern", "format", "minLength", "maxLength"})
_NAMES: Final = _STRINGS | {"const", "enum", "not", "anyOf", "oneOf", "allOf", "if", "$dynamicRef"}
_ARRAYS: Final = frozenset(
    {
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
        *("contains", "minContains", "maxContains", "unevaluatedItems"),
    }
)
_OBJECTS: Final = frozenset(
    {
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "unevaluatedProperties"),
        *("dependentRequired", "dependentSchemas", "dependencies"),
    }
)
_DESCRIBING: Final = frozenset({"title", "description", "$comment", "default", "examples"})

_UNWRITTEN: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


def followable(schema: dict[str, Any]) -> dict[str, Any]:
    """Write `schema` so that the grammar library follows it.

    Takes some milliseconds for a hundred properties; a schema made to take long does, so it wants a bound from outside.

    Raises:
        RequestError: a keyword is malformed or cannot be followed; names it, and its place.
    """
    translation = _Translation()
    root = translation.reference(Place.root(schema))
    translation.finish()
    definitions = finite(translation.definitions)
    if not ends(root, {name for name, written in definitions.items() if written is not False}):
        keyword = "$ref" if '"$ref"' in json.dumps(translation.definitions) else next(iter(schema), "false")
        raise RequestError(f"{keyword}: no value satisfies the schema that ever ends", code="bad_grammar")
    return {**root, "$defs": definitions}


class _Translation:
    def __init__(self) -> None:
        self.definitions: dict[str, Written] = {}
        self._names: dict[int, str] = {}  # by the identity of the schema
        self._waiting: list[tuple[str, Place]] = []

    def reference(self, place: Place) -> dict[str, Any]:
        """Return what refers to a schema, which becomes a definition."""
        key = int(place.node) if isinstance(place.node, bool) else id(place.node)
        if key not in self._names:
            self._names[key] = f"d{len(self._names)}"
            self._waiting.append((self._names[key], place))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def finish(self) -> None:
        """Write all definitions that something refers to."""
        while self._waiting:
            name, place = self._waiting.pop()
            self.definitions[name] = self._written(place)

    def _below(self, place: Place, *keys: str | int) -> Written:
        return self._inner(place.below(*keys))

    def _inner(self, place: Place) -> Written:
        """Write a schema where it stands, or far inside of others as a definition."""
        if place.depth > _MAX_DEPTH:
            return self.reference(replace(place, depth=0))
        return self._written(place)

    def _written(self, place: Place) -> Written:
        node = place.node
        if isinstance(node, bool):
            return node
        types = types_at(place)
        out: dict[str, Any] = {}
        every: list[Written] = []  # schemas that hold as well
        for keyword in node:
            self._value_keyword(place, keyword, out)
            self._applicator(place, keyword, types, every, out)
            if keyword in _NUMBERS and not _NUMBERS & out.keys() and types & {"integer", "fraction"}:
                out |= number_bounds.bounded(place, is_integer="fraction" not in types)
            if keyword in _STRINGS and "string" in types:
                self._string_keyword(place, keyword, out, every)
        if "object" in types and _OBJECTS & node.keys():
            self._object(place, out, every)
        if "array" in types and _ARRAYS & node.keys():
            self._array(place, types, out, every)
        if any(inner is False for inner in every):
            return False
        return {**out, "allOf": every} if every else out

    def _value_keyword(self, place: Place, keyword: str, out: dict[str, Any]) -> None:
        node = place.node
        match keyword:
            case "type":
                out["type"] = node["type"]
            case "const":
                out["const"] = _value(place, "const", node["const"])
            case "enum":
                out["enum"] = [_value(place, "enum", value) for value in enumerated(place)]
            case "$ref":
                out |= self.reference(place.target())
            case "$dynamicRef" | "$recursiveRef":
                raise refused(keyword, place, f"got {shown(node[keyword])}, want $ref")

    def _applicator(
        self, place: Place, keyword: str, types: frozenset[str], every: list[Written], out: dict[str, Any]
    ) -> None:
        node = place.node
        match keyword:
            case "anyOf":
                out["anyOf"] = [self._below(place, keyword, index) for index in indices(place, keyword)]
            case "allOf":
                every += [self._below(place, keyword, index) for index in indices(place, keyword)]
            case "oneOf":
                every.append({"anyOf": self._one_of(place, types)})
            case "not":
                every.append(_negated(place))
            case "if" if "then" in node or "else" in node:
                raise refused("if", place, f"got {shown(node['if'])}, want anyOf in its place")

    def _one_of(self, place: Place, types: frozenset[str]) -> list[Written]:
        options = [place.below("oneOf", index) for index in indices(place, "oneOf")]
        forbidden = exclusions(options, types)
        if forbidden is None:
            raise refused("oneOf", place, "a value may satisfy several of its schemas, want ones that part, or anyOf")
        return [
            {"allOf": [self._inner(option), {"properties": dict.fromkeys(sorted(names), False)}]}
            if names
            else self._inner(option)
            for option, names in zip(options, forbidden, strict=True)
        ]

    # ---------------------------------------------------------------- strings

    def _string_keyword(self, place: Place, keyword: str, out: dict[str, Any], every: list[Written]) -> None:
        value = place.node[keyword]
        match keyword:
            case "minLength":
                out[keyword] = count(place, keyword)
                if out[keyword] > min(count(place, "maxLength", _MAX_CHARS), _MAX_CHARS):
                    raise refused(keyword, place, f"got {value}, want at most maxLength, and at most {_MAX_CHARS}")
            case "maxLength":
                if count(place, keyword) <= _MAX_CHARS:
                    out[keyword] = count(place, keyword)
            case "pattern":
                if not isinstance(value, str):
                    raise refused(keyword, place, f"got {shown(value)}, want a regular expression")
                *ahead, out[keyword] = without_looking_ahead(as_library_reads(value))
                every += [{"pattern": pattern} for pattern in ahead]
            case _:
                pattern = pattern_of_format(format_of(place))
                if "pattern" in place.node:
                    pass  # which says it already: a format holds nobody to anything, in JSON Schema's words
                elif pattern is not None:
                    every.append({"pattern": pattern})
                elif value in LIBRARY_FORMATS:
                    out[keyword] = value

    # ---------------------------------------------------------------- objects

    def _object(self, place: Place, out: dict[str, Any], every: list[Written]) -> None:
        node = place.node
        properties = {name: self._below(place, "properties", name) for name in keys(place, "properties")}
        patterns = {
            as_library_reads(name): self._below(place, "patternProperties", name)
            for name in keys(place, "patternProperties")
        }
        required = names_of(place, "required", node.get("required", []))
        others: Written = True
        if "additionalProperties" in node:
            others = self._below(place, "additionalProperties")
        elif _is_unevaluated(place, "unevaluatedProperties"):
            others = self._below(place, "unevaluatedProperties")
        elif patterns and not properties:
            others = False  # a map by patterns: what else there may be, nobody means
        if "propertyNames" in node:
            others = self._property_names(place, properties, patterns, others)
        required = self._dependencies(place, required, every)
        for name in required:
            if not patterns and properties.get(name, others) is False:
                raise refused("required", place, f"the property {shown(name)} is wanted, and never allowed")
        if properties:
            out["properties"] = properties
        if patterns:
            out["patternProperties"] = patterns
        if others is not True:
            out["additionalProperties"] = others
        if required:
            out["required"] = required
        _count_properties(place, out)

    def _property_names(
        self, place: Place, properties: dict[str, Written], patterns: dict[str, Written], others: Written
    ) -> Written:
        """Write `propertyNames` as properties, or as a pattern of them. Returns what all others must be."""
        names, keywords = _names(place)
        said = names.node if isinstance(names.node, dict) else {}
        if patterns and keywords:
            raise refused("propertyNames", place, "got it together with patternProperties, want one of the two")
        if keywords in ({"const"}, {"enum"}, {"false"}):
            values = [said["const"]] if "const" in said else enumerated(names) if "enum" in said else []
            allowed = [value for value in values if isinstance(value, str)]
            for name in properties.keys() - set(allowed):
                properties[name] = False
            if others is not False:
                for name in allowed:
                    properties.setdefault(name, others)
            return False
        if not keywords or (others is False and not properties):
            return others
        if properties or len(keywords & {"pattern", "format"}) + bool(keywords & {"minLength", "maxLength"}) > 1:
            raise refused("propertyNames", place, f"got {shown(said)}, want one pattern, and no properties beside it")
        if keywords == {"pattern"} and isinstance(said["pattern"], str):
            patterns[as_library_reads(said["pattern"])] = others
        elif keywords <= {"minLength", "maxLength"}:
            most = count(names, "maxLength") if "maxLength" in said else ""
            patterns[f"^(?s:.){{{count(names, 'minLength', 0)},{most}}}$"] = others
        else:
            raise refused("propertyNames", place, f"got {shown(said)}, want a pattern, lengths or a list of names")
        return False

    def _dependencies(self, place: Place, required: list[str], every: list[Written]) -> list[str]:
        """Write what some properties ask for where they are there. Returns the properties that must be there."""
        node = place.node
        needed: dict[str, list[str]] = {}
        schemas: dict[str, Written] = {}
        for name in keys(place, "dependentRequired"):
            needed[name] = names_of(place, "dependentRequired", node["dependentRequired"][name])
        for name in keys(place, "dependentSchemas"):
            schemas[name] = self._below(place, "dependentSchemas", name)
        for name in keys(place, "dependencies"):
            if isinstance(node["dependencies"][name], list):
                needed[name] = names_of(place, "dependencies", node["dependencies"][name])
            else:
                schemas[name] = self._below(place, "dependencies", name)
        if len(needed) + len(schemas) > _MAX_DEPENDENT:
            keyword = next(keyword for keyword in node if keyword.startswith("dependen"))
            raise refused(keyword, place, f"want at most {_MAX_DEPENDENT} properties that others depend on")
        for name, names in needed.items():
            if name in required:
                required = [*required, *(other for other in names if other not in required)]
            elif names:
                every.append({"anyOf": [{"properties": {name: False}}, {"required": names}]})
        for name, schema in schemas.items():
            every.append(schema if name in required else {"anyOf": [{"properties": {name: False}}, schema]})
        return required

    # ---------------------------------------------------------------- arrays

    def _array(self, place: Place, types: frozenset[str], out: dict[str, Any], every: list[Written]) -> None:
        node = place.node
        lists = [keyword for keyword in ("prefixItems", "items") if isinstance(node.get(keyword), list)]
        prefix = [self._below(place, lists[0], index) for index in range(len(node[lists[0]]))] if lists else []
        rest: Written = True
        if "items" in node and "items" not in lists:
            rest = self._below(place, "items")
        elif "additionalItems" in node and "items" in lists:
            rest = self._below(place, "additionalItems")
        elif _is_unevaluated(place, "unevaluatedItems"):
            rest = self._below(place, "unevaluatedItems")
        least, most = count(place, "minItems", 0), count(place, "maxItems", _MAX_ITEMS)
        if "contains" in node:
            num_leading = self._contained(place, is_alone=not prefix)
            if num_leading:
                prefix = [{"allOf": [self.reference(place.below("contains")), rest]}] * num_leading
                least = max(least, num_leading)
        if rest is False:
            most = min(most, len(prefix))
        if least > most:
            keyword = "minItems" if "minItems" in node else "contains"
            raise refused(keyword, place, f"at least {shown(least)} items and at most {most} are wanted: no list has")
        if prefix:
            out["prefixItems"] = prefix
        if rest is not True:
            out["items"] = rest
        if least:
            out["minItems"] = least
        if most < _MAX_ITEMS:
            out["maxItems"] = most
        if flag(place, "uniqueItems") and most > 1:
            every.append(_distinct(place, types, least, most))

    def _contained(self, place: Place, *, is_alone: bool) -> int:
        """Return how many items at the head of a list are to be what `contains` says: nobody asks where they are."""
        least = count(place, "minContains", 1)
        if not is_alone or "maxContains" in place.node or least > _MAX_LEADING:
            keyword = "maxContains" if "maxContains" in place.node else "contains"
            raise refused(keyword, place, f"want contains without prefixItems, of at most {_MAX_LEADING} items")
        return least


def _names(place: Place) -> tuple[Place, set[str]]:
    """Return the schema that `propertyNames` is or refers to, and its keywords that hold a name to something.

    "false" stands for those that no name satisfies.
    """
    places = place.below("propertyNames").with_targets()
    found: list[tuple[Place, set[str]]] = []
    for names in places:
        if names.node is False or (isinstance(names.node, dict) and "string" not in types_at(names)):
            return names, {"false"}
        keywords = set(_NAMES & names.node.keys()) if isinstance(names.node, dict) else set()
        if "format" in keywords and format_of(names) not in LIBRARY_FORMATS:
            keywords -= {"format"}
        if keywords:
            found.append((names, keywords))
    if len(found) > 1:
        raise refused("propertyNames", place, f"got {shown(places[0].node)}, want nothing beside its $ref")
    return found[0] if found else (places[-1], set())


def _negated(place: Place) -> Written:
    """Write what `not` leaves: of a property that must not be there, or of types."""
    negated = place.below("not").node
    if isinstance(negated, bool):
        return not negated
    if not negated.keys() - _DESCRIBING:
        return False  # as zod has it for what is never there
    keywords = negated.keys()
    if keywords == {"required"}:
        names = names_of(place, "not", negated["required"])
        if len(names) == 1:
            return {"type": "object", "properties": {names[0]: False}}
    if keywords == {"type"}:
        left = types_of({}) - types_at(place.below("not"))
        if left and ("integer" in left or "fraction" not in left):
            return {"type": sorted(left - {"fraction"} - ({"integer"} if "fraction" in left else set()))}
    raise refused("not", place, f"got {shown(negated)}, want what a value is to be")


def _distinct(place: Place, types: frozenset[str], least: int, most: int) -> Written:
    """Write all lists of different values, one by one, where there are few."""
    items: Any = None
    if "items" in place.node and not isinstance(place.node["items"], list):
        items = place.below("items").with_targets()[-1]
    said = items.node if items is not None and isinstance(items.node, dict) else {}
    values = (
        [True, False] if said.get("type") == "boolean" else [said["const"]] if "const" in said else said.get("enum")
    )
    if not isinstance(values, list) or not 1 <= len(values) <= _MAX_DISTINCT or "prefixItems" in place.node:
        raise refused(
            "uniqueItems",
            place,
            f"got true, want false, or an enum of at most {_MAX_DISTINCT} items: what came before is not looked at",
        )
    different = {json.dumps(value): value for value in values}
    values = [_value(place, "uniqueItems", value) for value in different.values()]
    lists: list[Written] = [
        {"type": "array", "prefixItems": [{"const": value} for value in chosen], "items": False, "minItems": length}
        for length in range(least, min(most, len(values)) + 1)
        for chosen in permutations(values, length)
    ]
    if not lists:
        raise refused("uniqueItems", place, f"{least} different items are wanted of {len(values)} values")
    others = [name for name in _TYPES if name in types and name != "array"]
    return {"anyOf": [*lists, *({"type": [*others, "number"] if "fraction" in types else others} for _ in others[:1])]}


def _count_properties(place: Place, out: dict[str, Any]) -> None:
    """Write how many properties there may be, where the library counts them: beyond those that are all required."""
    least, most = count(place, "minProperties", 0), count(place, "maxProperties", _MAX_ITEMS)
    properties, required = out.get("properties", {}), out.get("required", [])
    is_closed = out.get("additionalProperties") is False and "patternProperties" not in out
    possible = [name for name, schema in properties.items() if schema is not False]
    if least > most or most < len(required) or (is_closed and least > len(possible)):
        keyword = "minProperties" if "minProperties" in place.node else "maxProperties"
        raise refused(keyword, place, f"at least {max(least, len(required))} properties are wanted and at most {most}")
    if least > len(required):
        if least - len(required) > 1 and is_closed and least == len(possible):
            out["required"] = possible
        elif least - len(required) > 1:
            raise refused(
                "minProperties", place, f"got {least}, want at most 1 above those required: a name may come twice"
            )
        else:
            out["minProperties"] = least
    if most < (len(possible) if is_closed else _MAX_ITEMS):
        out["maxProperties"] = most


def _is_unevaluated(place: Place, keyword: str) -> bool:
    """Tell whether what no other keyword looks at is held to something, which is known where no other schema looks."""
    node = place.node
    if node.get(keyword, True) in (True, {}):
        return False
    if _APPLICATORS & node.keys() or "contains" in node:
        raise refused(keyword, place, f"got {shown(node[keyword])}, want it without {', '.join(sorted(_APPLICATORS))}")
    return True


def _value(place: Place, keyword: str, value: Any) -> Any:
    """Return a constant that can be written: the library has numbers as doubles, and few control characters."""
    if isinstance(value, list):
        return [_value(place, keyword, item) for item in value]
    if isinstance(value, dict):
        return {key: _value(place, keyword, item) for key, item in value.items()}
    if isinstance(value, str) and _UNWRITTEN.search(value):
        raise refused(keyword, place, f"got {shown(value)}, want no control characters but \\b, \\f, \\n, \\r and \\t")
    if isinstance(value, int) and (abs(value) >= 2**63 or int(float(value)) != value):
        raise refused(keyword, place, f"got {shown(value)}, want an integer that a double holds, below 2**63")
    if isinstance(value, float) and abs(value) > 2**53 and Decimal(repr(value)) != Decimal(value):
        raise refused(keyword, place, f"got {shown(value)}, want a number whose digits tell it apart")
    return value
