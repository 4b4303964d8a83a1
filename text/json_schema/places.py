"""Where in a document a schema stands, what references written there mean, and how a keyword is refused by name."""

from __future__ import annotations

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

    @classmethod
    def root(cls, schema: dict[str, Any]) -> Place:
        """Begin at the whole of a document."""
        dialect = schema.get("$schema")
        specification = specification_with(dialect, default=DRAFT202012) if isinstance(dialect, str) else DRAFT202012
        resource = specification.create_resource(schema)
        registry: SchemaRegistry = Registry()
        return cls(schema, "#", registry.resolver_with_root(resource))

    def below(self, *keys: str | int) -> Place:
        """Go to a schema within this one.

        Raises:
            RequestError: there is no schema.
        """
        node = self.node
        for key in keys:
            node = node[key]
        pointer = f"{self.pointer}/{'/'.join(str(key) for key in keys)}"
        if not isinstance(node, dict | bool):
            raise refused(str(keys[0]), self, f"got {shown(node)}, want a JSON schema")
        resolver = self.resolver
        if isinstance(node, dict) and isinstance(node.get("$id"), str):
            resolver = resolver.in_subresource(DRAFT202012.create_resource(node))
        return Place(node, pointer, resolver, self.depth + 1)

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
        return Place(found.contents, reference, found.resolver)


def refused(keyword: str, place: Place, reason: str) -> RequestError:
    """Make the error that refuses a keyword: `reason` says what was seen and what is wanted."""
    return RequestError(f"{keyword} at {place.pointer}: {reason}", code="bad_grammar")


def shown(value: Any) -> str:
    """Return `value` as messages show it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
