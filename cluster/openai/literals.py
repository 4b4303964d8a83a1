"""Arguments in syntaxes other than JSON: Python's calls, Gemma's braces, nested elements."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_WORD: Final = re.compile(r"[^,:=\[\](){}\"'\s]+")
_KEY: Final = re.compile(r"[^,:=\[\](){}\"'\s]+")
_BARE: Final = re.compile(r"[^,\[\]{}]+")
_NUMBER: Final = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|(?:[0-9][0-9_]*)?\.?[0-9][0-9_]*\.?(?:[eE][+-]?[0-9]+)?)")
_CONSTANTS: Final = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_ESCAPE: Final = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_MAX_DEPTH = 100
_MAX_NUMBER_CHARS = 3500  #: more hexadecimal digits are more decimal ones than Python writes
_CLOSERS: Final = {"[": "]", "(": ")", "{": "}"}


class NotALiteralError(ValueError):
    """The text is no value of this syntax."""


class LiteralReader:
    """Reads the values of one text, in Python's syntax, or in Gemma's, which has one quote and words without quotes."""

    def __init__(self, text: str, quote: str = "") -> None:
        """Stand before the first value of `text`. `quote`: Gemma's; "" for Python's syntax."""
        self._text = text
        self._at = 0
        self._quote = quote
        self._depth = 0

    def arguments(self, separator: str, *, positional: list[str] | None = None) -> dict[str, Any]:
        """Read `key SEPARATOR value` pairs up to the text's end; values without a key get the next of `positional`.

        Raises:
            NotALiteralError: they are none.
        """
        found: dict[str, Any] = {}
        names = iter(positional or ())
        while not self._is_at_end():
            begin = self._at
            key = self._key()
            if key is not None and self._takes(separator):
                found[key] = self.value()
            else:
                self._at = begin
                name = next((name for name in names if name not in found), None)
                if name is None:
                    raise NotALiteralError(f"a value without a name at {begin}")
                found[name] = self.value()
            if not self._takes(",") and not self._is_at_end():
                raise NotALiteralError(f"{self._text[self._at]!r} where a comma was due")
        return found

    def whole(self) -> Any:
        """Read the one value that the text is."""
        value = self.value()
        if not self._is_at_end():
            raise NotALiteralError(f"{self._text[self._at]!r} after the end")
        return value

    def value(self) -> Any:
        """Read the next value."""
        self._skip()
        if self._quote and self._text.startswith(self._quote, self._at):
            return self._quoted()
        char = self._text[self._at : self._at + 1]
        if char and char in _CLOSERS:
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise NotALiteralError("nested too deep")
            self._at += 1
            value = self._mapping() if char == "{" else self._items(_CLOSERS[char])
            self._depth -= 1
            return value
        if self._quote:
            return self._bare()
        if char and char in "\"'":
            text = "".join(self._strings())
            # two escaped halves of a pair become one character, a half alone becomes U+FFFD
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._word()

    def _items(self, closer: str) -> list[Any]:
        items: list[Any] = []
        while not self._takes(closer):
            items.append(self.value())
            if not self._takes(","):
                self._needs(closer)
                break
        return items

    def _mapping(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._takes("}"):
            self._skip()
            key = self._key() if self._quote else self.value()
            if not isinstance(key, str):
                key = json.dumps(key)
            self._needs(":")
            found[key] = self.value()
            if not self._takes(","):
                self._needs("}")
                break
        return found

    def _key(self) -> str | None:
        self._skip()
        if self._quote and self._text.startswith(self._quote, self._at):
            return self._quoted()
        match = _KEY.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def _quoted(self) -> str:
        begin = self._at + len(self._quote)
        end = self._text.find(self._quote, begin)
        if end < 0:
            raise NotALiteralError("a string without an end")
        self._at = end + len(self._quote)
        return self._text[begin:end]

    def _strings(self) -> list[str]:
        """Read string literals that follow each other, which Python joins."""
        parts: list[str] = []
        while self._text[self._at : self._at + 1] in ("'", '"'):
            quote = self._text[self._at]
            quote = quote * 3 if self._text.startswith(quote * 3, self._at) else quote
            begin = end = self._at + len(quote)
            while not self._text.startswith(quote, end):
                if end >= len(self._text):
                    raise NotALiteralError("a string without an end")
                end += 2 if self._text[end] == "\\" else 1
            parts.append(_ESCAPE.sub(_unescaped, self._text[begin:end]))
            self._at = end + len(quote)
            self._skip()
        return parts

    def _word(self) -> Any:
        match = _WORD.match(self._text, self._at)
        if match is None:
            raise NotALiteralError(f"no value at {self._at}")
        self._at = match.end()
        word = match[0]
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        number = _number(word)
        if number is None:
            raise NotALiteralError(f"{word!r} is no value")
        return number

    def _bare(self) -> Any:
        """Read a number, a constant, or words up to the next mark."""
        match = _BARE.match(self._text, self._at)
        if match is None:
            raise NotALiteralError(f"no value at {self._at}")
        self._at = match.end()
        word = match[0].strip()
        number = _number(word)
        return _CONSTANTS.get(word, word if number is None else number)

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _takes(self, mark: str) -> bool:
        self._skip()
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def _needs(self, mark: str) -> None:
        if not self._takes(mark):
            raise NotALiteralError(f"{self._text[self._at : self._at + 1]!r} where {mark} was due")

    def _is_at_end(self) -> bool:
        self._skip()
        return self._at >= len(self._text)


def read_literal(text: str) -> Any:
    """Return the value of a Python literal, with JSON's constants besides.

    Raises:
        NotALiteralError: it is none.
    """
    return LiteralReader(text).whole()


def read_elements(text: str, namespace: str) -> list[tuple[str, Any]]:
    """Return names and contents of <name>...</name>, each tag with `namespace` before it: a text, or elements again.

    Raises:
        NotALiteralError: tags do not match.
    """
    elements, at = _elements(text, 0, namespace, 0)
    if text[at:].strip():
        raise NotALiteralError(f"{text[at : at + 20]!r} between elements")
    return elements


def _elements(text: str, at: int, namespace: str, depth: int) -> tuple[list[tuple[str, Any]], int]:
    if depth > _MAX_DEPTH:
        raise NotALiteralError("nested too deep")
    begin, end_begin = f"{namespace}<", f"{namespace}</"
    found: list[tuple[str, Any]] = []
    while True:
        tag = text.find(begin, at)
        if tag < 0 or text.startswith(end_begin, tag) or text[at:tag].strip():
            return found, at
        name, _, _ = text[tag + len(begin) :].partition(">")
        inside = tag + len(begin) + len(name) + 1
        closing = f"{end_begin}{name}>"
        children, end = _elements(text, inside, namespace, depth + 1)
        if children:
            end = text.find(closing, end)
            content: Any = children
        else:
            end = text.find(closing, inside)
            content = text[inside:end]
        if end < 0:
            raise NotALiteralError(f"<{name}> without an end")
        found.append((name, content))
        at = end + len(closing)


def _number(word: str) -> int | float | None:
    if len(word) > _MAX_NUMBER_CHARS or not _NUMBER.fullmatch(word):
        return None
    plain = word.replace("_", "")
    try:
        return int(plain, 16) if "x" in plain.lower() else int(plain)
    except ValueError:
        value = float(plain)
        return value if math.isfinite(value) else None


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "uUx" and len(code) > 1:
        point = int(code[1:], 16)
        return chr(point) if point < 0x110000 else "\ufffd"
    return _ESCAPES.get(code, code if code in "\\'\"" else f"\\{code}")
