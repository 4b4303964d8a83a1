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
_CLOCK = r"T([0-9]{1,4}H([0-9]{1,4}M([0-9]{1,4}S)?)?|[0-9]{1,4}M([0-9]{1,4}S)?|[0-9]{1,4}S)"
_DAYS = r"([0-9]{1,4}Y([0-9]{1,4}M([0-9]{1,4}D)?)?|[0-9]{1,4}M([0-9]{1,4}D)?|[0-9]{1,4}D)"
_LABEL = r"[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*"
_ATOM = r"[a-zA-Z0-9_+-]+"

#: formats that are written more narrowly here than by the library: dates that calendars have, seconds without a leap
#: second, durations of few digits, mail addresses at a domain that has a dot: what the parsers of clients take
_FORMATS: Final = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}[tT]{_TIME}",
    "duration": rf"P({_DAYS}({_CLOCK})?|{_CLOCK}|[0-9]{{1,4}}W)",
    "base64": r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "email": rf"{_ATOM}(\.{_ATOM})*@({_LABEL}\.)+[a-zA-Z]{{2,6}}",
} | {
    f"uuid{version}": rf"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
    for version in range(1, 9)
}

#: formats that the library knows; all others say something about a string and hold nobody to it, as JSON Schema has it
LIBRARY_FORMATS: Final = frozenset({"hostname", "ipv4", "ipv6", "uuid", "uri"})

_AHEAD = re.compile(r"\^?\(\?([=!])")
_CHARACTER = r"[^\\\[\](){}^$.*+?|]|\\[^a-zA-Z0-9]"
_SET = re.compile(rf"\[(?!\^)((?:[^\]\\\[]|\\.)+)\]|({_CHARACTER})")
_SET_ALONE = re.compile(rf"\^?(?:{_SET.pattern})\*\$")
_PAIR_AHEAD = re.compile(rf"\.\*({_CHARACTER})({_CHARACTER})")


def pattern_of_format(name: str) -> str | None:
    """Return the pattern of a format; None where the library has its own, or nobody has one."""
    pattern = _FORMATS.get(name)
    return None if pattern is None else f"^({pattern})$"


def as_library_reads(pattern: str) -> str:
    """Return a pattern that means the same to the library, which calculates with sets: `[a&&[b]` is one to others."""
    out: list[str] = []
    is_class, is_escaped = False, False
    for character in pattern:
        if is_class and not is_escaped and character in "[&~":
            out.append("\\")
        out.append(character)
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        elif character == "[":
            is_class = True
        elif character == "]":
            is_class = False
    return "".join(out)


def without_looking_ahead(pattern: str) -> list[str]:
    """Return patterns that a string matches together exactly where it matches `pattern`.

    What stands ahead at the very beginning becomes a pattern of its own: `^(?=.*a)b` is `^.*a` and `^b`. So does what
    must not stand there, where it is a character, a pair of them anywhere, or a whole string of some: `(?!^[ab]*$)` is
    `[^ab]`. Others stay as they are.
    """
    found: list[str] = []
    rest = pattern
    while match := _AHEAD.match(rest):
        end = _group_end(rest, match.end())
        if end is None or _has_alternatives(rest):
            break
        ahead = rest[match.end() : end]
        pattern_ahead = f"^(?:{ahead.removeprefix('^')})" if match[1] == "=" else _otherwise(ahead)
        if pattern_ahead is None:
            break
        found.append(pattern_ahead)
        rest = "^" + rest[end + 1 :].removeprefix("^")
        if not match[0].startswith("^") and not pattern.startswith("^"):
            return [pattern]  # it may match further on: not at the beginning alone
    return [*found, rest]


def _otherwise(ahead: str) -> str | None:
    """Return a pattern of the strings that do not begin with `ahead`."""
    if match := _SET.fullmatch(ahead):
        return f"^(?:[^{match[1] or match[2]}]|$)"
    if match := _SET_ALONE.fullmatch(ahead):
        return f"[^{match[1] or match[2]}]"
    if match := _PAIR_AHEAD.fullmatch(ahead):
        first, second = match.groups()
        if first == second:
            return f"^(?:[^{first}]|{first}[^{first}])*{first}?$"
        return f"^(?:[^{first}]|{first}+[^{first}{second}])*{first}*$"
    return None


def _group_end(pattern: str, begin: int) -> int | None:
    """Return where the group that began before `begin` is closed."""
    return next((index for index, _, depth in _structure(pattern, begin) if depth < 0), None)


def _has_alternatives(pattern: str) -> bool:
    """Tell whether an alternative stands outside of all groups."""
    return any(character == "|" and not depth for _, character, depth in _structure(pattern, 0))


def _structure(pattern: str, begin: int) -> Iterator[tuple[int, str, int]]:
    """Yield the characters from `begin` on that are neither escaped nor in a class, with place and depth of groups."""
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
