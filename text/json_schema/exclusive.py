"""Which alternatives of a `oneOf` no value can satisfy together, so that it says no more than `anyOf`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final

from text.json_schema.places import Place, enumerated, refused, shown

_MAX_SHAPES: Final = 64  #: that are told apart of one schema
_MAX_DEPTH: Final = 6  #: of properties within properties, and of references on the way to one shape
_TYPES: Final = {
    "null": {"null"},
    "boolean": {"boolean"},
    "integer": {"integer"},
    "number": {"integer", "fraction"},
    "string": {"string"},
    "array": {"array"},
    "object": {"object"},
}
_ALL: Final = frozenset().union(*_TYPES.values())


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is known of the values that satisfy one way through a schema; a value that is not of it does not."""

    types: frozenset[str] = _ALL
    values: frozenset[str] | None = None  #: as JSON; None: any
    required: frozenset[str] = frozenset()
    properties: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    closed: tuple[frozenset[str], ...] = ()  #: of objects: no other properties than in each of these

    def both(self, other: _Shape) -> _Shape:
        values = [shape.values for shape in (self, other) if shape.values is not None]
        names = self.properties.keys() | other.properties.keys()
        return _Shape(
            self.types & other.types,
            frozenset.intersection(*values) if values else None,
            self.required | other.required,
            {name: self.properties.get(name, ()) + other.properties.get(name, ()) for name in names},
            self.closed + other.closed,
        )


_ANY: Final = _Shape()


def types_of(node: dict[str, Any]) -> frozenset[str]:
    """Return the types that a schema's `type` allows, numbers parted into "integer" and "fraction"."""
    wanted = node.get("type", list(_TYPES))
    names = [wanted] if isinstance(wanted, str) else wanted
    return frozenset().union(*(_TYPES.get(name, set()) for name in names))


def types_at(place: Place) -> frozenset[str]:
    """Return `types_of` a client's schema.

    Raises:
        RequestError: its `type` is none.
    """
    node = place.node
    if "type" in node:
        names = [node["type"]] if isinstance(node["type"], str) else node["type"]
        known = tuple(_TYPES)  # what a client has there may not be hashable
        if not isinstance(names, list) or not names or not all(name in known for name in names):
            raise refused("type", place, f"got {shown(node['type'])}, want one or more of {', '.join(_TYPES)}")
    return types_of(node)


def exclusions(options: list[Place], types: frozenset[str]) -> list[set[str]] | None:
    """Return the properties that each option must not have, for no two to hold together; None where that cannot be.

    A property that another one requires, and this one does not, parts the two where objects alone are allowed. `types`:
    those of the schema around them.
    """
    around = _Shape(types)
    shapes = [[shape.both(around) for shape in _shapes(option)] for option in options]
    forbidden: list[set[str]] = [set() for _ in options]
    for later in range(len(options)):
        for earlier in range(later):
            ones, others = shapes[earlier], shapes[later]
            if _are_apart(ones, others):
                continue
            if not all(shape.types <= {"object"} for shape in (*ones, *others)):
                return None
            if name := _only_required(others, ones):
                forbidden[earlier].add(name)
            elif name := _only_required(ones, others):
                forbidden[later].add(name)
            else:
                return None
    return forbidden


def _only_required(ones: list[_Shape], others: list[_Shape]) -> str | None:
    """Return a property that all of `ones` require, and none of `others` does."""
    needed = frozenset.intersection(*(shape.required for shape in ones))
    return min(needed.difference(*(shape.required for shape in others)), default=None)


def _shapes(place: Place, depth: int = 0) -> list[_Shape]:
    """Return the ways through a schema; more than are told apart are one of which nothing is known."""
    node = place.node
    if node is False:
        return []
    if node is True or depth > _MAX_DEPTH:
        return [_ANY]
    found = [_own_shape(place)]
    if "$ref" in node:
        found = _together(found, _shapes(place.target(), depth + 1))
    for option in _below_list(place, "allOf"):
        found = _together(found, _shapes(option, depth + 1))
    for keyword in ("anyOf", "oneOf"):
        if keyword in node:
            ways = [shape for option in _below_list(place, keyword) for shape in _shapes(option, depth + 1)]
            found = _together(found, ways)
    return found


def _together(ones: list[_Shape], others: list[_Shape]) -> list[_Shape]:
    if len(ones) * len(others) > _MAX_SHAPES:
        return [_ANY]
    return [one.both(other) for one, other in product(ones, others)]


def _below_list(place: Place, keyword: str) -> Iterable[Place]:
    options = place.node.get(keyword)
    return (place.below(keyword, index) for index in range(len(options))) if isinstance(options, list) else ()


def _own_shape(place: Place) -> _Shape:
    node = place.node
    types = types_at(place)
    values = [node["const"]] if "const" in node else enumerated(place) if "enum" in node else None
    properties = node.get("properties") if isinstance(node.get("properties"), dict) else {}
    required = node.get("required") if isinstance(node.get("required"), list) else []
    is_closed = node.get("additionalProperties") is False and not node.get("patternProperties")
    return _Shape(
        types if values is None else types & frozenset(map(_type_of, values)),
        None if values is None else frozenset(map(_canonical, values)),
        frozenset(name for name in required if isinstance(name, str)),
        {name: (place.below("properties", name),) for name in properties},
        (frozenset(properties),) if is_closed else (),
    )


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if value == int(value) else "fraction"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _canonical(value: Any) -> str:
    """Write a value so that equal ones are written alike."""
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _are_apart(ones: list[_Shape], others: list[_Shape], depth: int = 0) -> bool:
    return all(_is_apart(one, other, depth) for one, other in product(ones, others))


def _is_apart(one: _Shape, other: _Shape, depth: int) -> bool:
    """Tell whether no value is of both shapes, as far as can be seen."""
    shared = one.types & other.types
    if not shared:
        return True
    if one.values is not None and other.values is not None and not one.values & other.values:
        return True
    if shared != {"object"} or depth > _MAX_DEPTH:
        return False
    for name in one.required | other.required:
        if any(name not in names for shape in (one, other) for names in shape.closed):
            return True
        for ones, others in product(one.properties.get(name, ()), other.properties.get(name, ())):
            if _are_apart(_shapes(ones, depth), _shapes(others, depth), depth + 1):
                return True
    return False
