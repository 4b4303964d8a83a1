"""Schemas of several clients' making within one document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def embedded(schemas: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return definitions of schemas that were documents of their own, by name, and keep their references to themselves.

    What has an `$id` has its references by it; two of one `$id` would have each other's.
    """
    definitions: dict[str, dict[str, Any]] = {}
    taken: set[Any] = set()
    for name, schema in schemas.items():
        own = schema.get("$id")
        definitions[name] = schema if isinstance(own, str) and own not in taken else {**schema, "$id": f"urn:{name}"}
        taken.add(own)
    return definitions
