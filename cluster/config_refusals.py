"""What is wrong with a configuration document, in our words."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final, get_args, get_type_hints

import msgspec
from msgspec import Meta

#: Never printed: the one value that may hold credentials. Everything else names where they are found.
_PRIVATE: Final = "http.api_keys"


def refusal(kind: type[msgspec.Struct], document: dict[str, Any], complaint: str) -> str:
    """Tell what msgspec finds wrong with `document` as a `kind`: where, what was seen, what is wanted."""
    what, _, where = complaint.partition(" - at `$")
    steps = re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", where)
    is_of_entry = bool(steps) and not steps[-1][0] and not what.startswith("Object")
    seen: Any = document
    place = ""
    for key, index in steps[:-1] if is_of_entry else steps:
        seen = seen[key or int(index)]
        place += f"[{index}]" if index else f"{'.' if place else ''}{key}"
    unknown = re.match("Object contains unknown field `(.*)`", what)
    if unknown:
        known = [field.name for field in msgspec.structs.fields(_section_at(kind, place))]
        near = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"{place + '.' if place else ''}{unknown[1]}: no such key; {hint}"
    missing = re.match("Object missing required field `(.*)`", what)
    if missing:
        return f"{place}.{missing[1]}: missing, a value is wanted"
    seen_text = "something else" if place == _PRIVATE else shown(seen)
    if what.startswith("Invalid enum value"):
        section, _, name = place.rpartition(".")
        choices = re.findall(r"'([^']*)'", str(get_type_hints(_section_at(kind, section))[name]))
        return f"{place}: wanted one of {', '.join(choices)}, saw {seen_text}"
    in_entries = " in every entry" if is_of_entry else ""
    pattern = re.match("Expected `str` matching regex '(.*)'", what)
    if pattern:
        return f"{place}: wanted what matches {pattern[1]}, saw {seen_text}"
    if re.match("Expected `(int|float)` [<>]=", what):
        low, high = _range_of(kind, place)
        return (
            f"{place}: wanted {low:.15g} to {high:.15g}{in_entries}, saw {seen_text if in_entries else f'{seen:.15g}'}"
        )
    wanted = re.match("Expected `(.*?)`(?: of length ([0-9]+))?", what)
    if not wanted:
        return f"{place or 'the document'}: {what}"
    type_name = wanted[1].removesuffix(" | null")
    type_name = {"object": "a mapping", "array": "a list"}.get(type_name, type_name)
    of_length = f" of {wanted[2]}" if wanted[2] else ""
    return f"{place or 'names of sections'}: wanted {type_name}{of_length}{in_entries}, saw {seen_text}"


def _section_at(kind: type[msgspec.Struct], place: str) -> type[msgspec.Struct]:
    for key in re.findall(r"[^.\[\]]+", place):
        if not key.isdecimal():
            found = get_type_hints(kind)[key]
            kind = get_args(found)[0] if get_args(found) else found
    return kind


def _range_of(kind: type[msgspec.Struct], place: str) -> tuple[float, float]:
    """Return the least and the largest number allowed at `place`: those of the one Meta in the field's type."""
    section, _, name = place.rpartition(".")
    pending = [get_type_hints(_section_at(kind, section), include_extras=True)[name]]
    while not isinstance(pending[-1], Meta):
        pending += get_args(pending.pop())
    low, high = pending[-1].ge, pending[-1].le
    assert low is not None
    assert high is not None, "every range has both ends"
    return low, high


def shown(value: Any) -> str:
    """Return a value of a document as a message shows it: with its type, not too long."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
