"""Patterns and formats of strings, as patterns that the grammar library follows: it has no looking ahead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_FRACTION = r"(\.[0-9]{1,6})?"
_ZONE = r"([zZ]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = rf"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]{_FRACTION}{_ZONE}"
_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP}-02-29)"
)
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_ATOM = r"[a-zA-Z0-9_+-]{1,20}"

#: formats that are written more narrowly here than by the library: dates that calendars have, seconds without a leap
#: second, mail addresses at a domain that has a dot: what the parsers of clients take
_FORMATS: Final = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}[tT]{_TIME}",
    "email": rf"{_ATOM}(\.{_ATOM}){{0,2}}@({_LABEL}\.){{1,3}}[a-zA-Z]{{2,6}}",
} | {
    f"uuid{version}": rf"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
    for version in range(1, 9)
}

#: formats that the library knows; all others say something about a string and hold nobody to it, as JSON Schema has it
LIBRARY_FORMATS: Final = frozenset({"duration", "hostname", "ipv4", "ipv6", "uuid", "uri"})

_AHEAD = re.compile(r"\^?\(\?([=!])")
_SET_ONLY = re.compile(r"\^?(\[(?!\^)(?:[^\]\\\[]|\\.)+\])\*\$?")


def pattern_of_format(name: str) -> str | None:
    """Return the pattern of a format; None where the library has its own, or nobody has one."""
    pattern = _FORMATS.get(name)
    return None if pattern is None else f"^({pattern})$"


def without_looking_ahead(pattern: str) -> list[str]:
    """Return patterns that a string matches together exactly where it matches `pattern`.

    What stands ahead at the very beginning becomes a pattern of its own: `^(?=.*a)b` is `^.*a` and `^b`. What must not
    stand there does where it is a whole string of some characters: `(?!^[ab]*$)` is `[^ab]`. Others stay as they are.
    """
    found: list[str] = []
    rest = pattern
    while match := _AHEAD.match(rest):
        end = _group_end(rest, match.end())
        if end is None or _has_alternatives(rest):
            break
        ahead = rest[match.end() : end]
        if match[1] == "=":
            found.append(f"^(?:{ahead.removeprefix('^')})")
        elif (only := _SET_ONLY.fullmatch(ahead)) and ahead.endswith("$"):
            found.append(f"[^{only[1][1:]}")
        else:
            break
        rest = "^" + rest[end + 1 :].removeprefix("^")
        if not match[0].startswith("^") and not pattern.startswith("^"):
            return [pattern]  # it may match further on: not at the beginning alone
    return [*found, rest]


def _group_end(pattern: str, begin: int) -> int | None:
    """Return where the group that began before `begin` is closed."""
    return next((index for index, _, depth in _structure(pattern, begin) if depth < 0), None)


def _has_alternatives(pattern: str) -> bool:
    """Tell whether an alternative stands outside of all groups."""
    return any(character == "|" and not depth for _, character, depth in _structure(pattern, 0))


def _structure(pattern: str, begin: int) -> Iterator[tuple[int, str, int]]:
    """Yield each character from `begin` on that is neither escaped nor in a class, with its place and the groups open."""
    depth, is_class, is_escaped = 0, False, False
    for index in range(begin, len(pattern)):
        character = pattern[index]
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        elif is_class:
            is_class = character != "]"
        elif character == "[":
            is_class = True
        else:
            depth += (character == "(") - (character == ")")
            yield index, character, depth
