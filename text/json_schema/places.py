"""Where in a document a schema stands, what references written there mean, and how a keyword is refused by name."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from referencing import Registry, exceptions
from referencing.jsonschema import DRAFT202012, SchemaRegistry, specification_with

from messages.errors import RequestError

_MAX_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class Place:
    """A schema within a document."""

    node: Any  #: what is written there: an object or a boolean, or something that is no schema
    pointer: str  #: where, for people
    resolver: Any  #: of references written there (`referencing`)
    depth: int = 0  #: schemas around it, up to the document's root or the reference that led here
    within: str = "#"  #: pointer of the innermost schema around it that has an `$id`, and so references of its own

    @classmethod
    def root(cls, schema: dict[str, Any]) -> Place:
        """Begin at the whole of a document.

        Raises:
            RequestError: its `$id` is no URI.
        """
        dialect = schema.get("$schema")
        specification = specification_with(dialect, default=DRAFT202012) if isinstance(dialect, str) else DRAFT202012
        resource = specification.create_resource(schema)
        try:
            uri = resource.id() or ""
            registry: SchemaRegistry = Registry().with_resource(uri, resource)
        except (AttributeError, TypeError, ValueError):  # `referencing` has plain errors for what is no URI
            raise _no_id(cls(schema, "#", None), schema) from None
        with suppress(AttributeError, TypeError, ValueError, LookupError):  # it comes through what is no schema
            registry = registry.crawl()  # here once, else with each reference to an anchor
        return cls(schema, "#", registry.resolver(uri))

    def below(self, *keys: str | int) -> Place:
        """Go to a schema within this one.

        Raises:
            RequestError: there is no schema, or one whose `$id` is no URI.
        """
        node = self.node
        for key in keys:
            node = node[key]
        pointer = f"{self.pointer}/{'/'.join(str(key) for key in keys)}"
        if not isinstance(node, dict | bool):
            raise refused(str(keys[0]), self, f"got {shown(node)}, want a JSON schema")
        resolver, within = self.resolver, self.within
        if isinstance(node, dict) and isinstance(node.get("$id"), str):
            try:
                resolver, within = resolver.in_subresource(DRAFT202012.create_resource(node)), pointer
            except ValueError:
                raise _no_id(Place(node, pointer, resolver), node) from None
        return Place(node, pointer, resolver, self.depth + 1, within)

    def target(self) -> Place:
        """Go where this schema's `$ref` leads.

        Raises:
            RequestError: to nowhere within the document, or to what is no schema.
        """
        reference = self.node["$ref"]
        if not isinstance(reference, str):
            raise refused("$ref", self, f"got {shown(reference)}, want a reference")
        try:
            found = self.resolver.lookup(reference)
        except (exceptions.Unresolvable, AttributeError, TypeError, ValueError, LookupError):
            # beside its own errors `referencing` has plain ones, where what it comes through is no schema
            raise refused("$ref", self, f"got {shown(reference)}, want a reference within the schema") from None
        if not isinstance(found.contents, dict | bool):
            raise refused("$ref", self, f"{shown(reference)} leads to {shown(found.contents)}, want a JSON schema")
        pointer = self.within + reference[1:] if reference.startswith("#") else reference
        has_id = isinstance(found.contents, dict) and "$id" in found.contents
        return Place(found.contents, pointer, found.resolver, within=pointer if has_id else self.within)

    def with_targets(self) -> list[Place]:
        """Return this schema, then the one that its reference leads to, and so on: all of them hold.

        Raises:
            RequestError: a reference leads nowhere, or back to where it began.
        """
        places = [self]
        passed: set[int] = set()
        while isinstance(places[-1].node, dict) and "$ref" in places[-1].node:
            place = places[-1]
            if id(place.node) in passed:
                raise refused("$ref", place, f"got {shown(place.node['$ref'])}, which leads back to it")
            passed.add(id(place.node))
            places.append(place.target())
        return places


def refused(keyword: str, place: Place, reason: str) -> RequestError:
    """Make the error that refuses a keyword: `reason` says what was seen and what is wanted."""
    return RequestError(f"{keyword} at {place.pointer}: {reason}", code="bad_grammar")


def _no_id(place: Place, schema: dict[str, Any]) -> RequestError:
    keyword = "$id" if "$id" in schema else "id"  # draft 4's
    return refused(keyword, place, f"got {shown(schema.get(keyword))}, want a URI")


def shown(value: Any) -> str:
    """Return `value` as messages show it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def indices(place: Place, keyword: str) -> range:
    """Return the places in a keyword's list of schemas.

    Raises:
        RequestError: it is something else.
    """
    value = place.node[keyword]
    if not isinstance(value, list) or not value:
        raise refused(keyword, place, f"got {shown(value)}, want a list of one or more schemas")
    return range(len(value))


def keys(place: Place, keyword: str) -> list[str]:
    """Return the names in a keyword's object of schemas; none where it is not there.

    Raises:
        RequestError: it is something else.
    """
    value = place.node.get(keyword, {})
    if not isinstance(value, dict):
        raise refused(keyword, place, f"got {shown(value)}, want an object")
    return list(value)


def names_of(place: Place, keyword: str, value: Any) -> list[str]:
    """Return a list of names, each once.

    Raises:
        RequestError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refused(keyword, place, f"got {shown(value)}, want a list of names")
    return list(dict.fromkeys(value))


def count(place: Place, keyword: str, default: int = 0) -> int:
    """Return a keyword's count, or `default` where it is not there.

    Raises:
        RequestError: it is something else.
    """
    value = place.node.get(keyword, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        raise refused(keyword, place, f"got {shown(value)}, want a whole number from 0")
    return int(value)


def enumerated(place: Place) -> list[Any]:
    """Return the values of `enum`.

    Raises:
        RequestError: it is no list of values.
    """
    values = place.node["enum"]
    if not isinstance(values, list) or not values:
        raise refused("enum", place, f"got {shown(values)}, want a list of one or more values")
    return values


def format_of(place: Place) -> str:
    """Return the name that `format` has.

    Raises:
        RequestError: it is no name.
    """
    value = place.node["format"]
    if not isinstance(value, str):
        raise refused("format", place, f"got {shown(value)}, want a format's name")
    return value


def flag(place: Place, keyword: str) -> bool:
    """Return a keyword's boolean, false where it is not there.

    Raises:
        RequestError: it is something else.
    """
    value = place.node.get(keyword, False)
    if not isinstance(value, bool):
        raise refused(keyword, place, f"got {shown(value)}, want true or false")
    return value
