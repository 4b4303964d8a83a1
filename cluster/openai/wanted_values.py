"""What a field takes that lists its values, or an object that lists its fields: msgspec's errors do not say it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from msgspec import inspect

_MAX_CHARS: Final = 400


def listed_at(kind: type, path: Iterable[str]) -> str:
    """Return the values that a field of literals takes, else the fields of an object, as people read them.

    `path`: to it, from a value of type `kind`: names of fields, "" for an item of a list.
    """
    found = list(_plain(inspect.type_info(kind)))
    for name in path:
        found = [inner for one in found for inner in _inside(one, name)]
    values = {str(value) for one in found if isinstance(one, inspect.LiteralType) for value in one.values}
    names = {field.encode_name for one in found if isinstance(one, inspect.StructType) for field in one.fields}
    text = ", ".join(sorted(values or names))
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "..."


def _plain(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.Metadata):
        yield from _plain(kind.type)
    elif isinstance(kind, inspect.UnionType):
        for one in kind.types:
            yield from _plain(one)
    else:
        yield kind


def _inside(kind: Any, name: str) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.StructType):
        for field in kind.fields:
            if field.encode_name == name:
                yield from _plain(field.type)
    elif isinstance(kind, inspect.ListType):
        yield from _plain(kind.item_type)
    elif isinstance(kind, inspect.DictType):
        yield from _plain(kind.value_type)
    elif isinstance(kind, inspect.TupleType):
        for item in kind.item_types:
            yield from _plain(item)
