"""Reads one tool call's JSON object as it is generated, character by character."""

from __future__ import annotations

import json
from typing import Final

_NAME_KEYS: Final = ("name", "tool_name")
_ARGUMENT_KEYS: Final = ("arguments", "parameters", "args")
#: what else an object may have that nothing but its looks makes a call
_OTHER_KEYS: Final = ("id", "type", "tool_call_id")
_SPACE: Final = " \t\r\n"
_LITERAL: Final = "+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class NotACallError(ValueError):
    """What was generated is not a tool call after all."""


class CallScanner:
    """`{"name": "f", "arguments": {...}}`, in whichever order and with whatever else is in it.

    With `name` given, the object itself is the arguments; with `is_keyed` it is `{"f": {...}}`; with `is_strict` it has
    nothing in it that calls have not. `take()` gives argument text as soon as the name is known; arguments that come as
    a JSON string of JSON are given decoded, when they are whole.
    """

    def __init__(self, name: str | None = None, *, is_keyed: bool = False, is_strict: bool = False) -> None:
        self.raw: list[str] = []
        self.name = name
        self.has_arguments = name is not None
        self.is_done = False
        self._is_named_outside = name is not None
        self._is_keyed = is_keyed
        self._is_strict = is_strict
        self._is_of_arguments = False  # the value being read
        self._state = "start"
        self._key: str | None = None
        self._value: list[str] = []  # characters of the key or value being read
        self._depth = 0  # open braces and brackets inside the value
        self._is_in_string = False
        self._is_escaped = False
        self._untaken: list[str] = []  # argument text not yet given out

    @property
    def is_announced(self) -> bool:
        """Whether the function's name is known, and also that arguments follow or that none will."""
        return self.name is not None and (self.has_arguments or self.is_done)

    def take(self) -> str:
        """Return the argument text since the last call; "" before the name is known."""
        if self.name is None:
            return ""
        text = "".join(self._untaken)
        self._untaken.clear()
        return text

    def feed(self, char: str) -> None:
        """Read one more character.

        Raises:
            NotACallError: the object cannot become a call.
        """
        self.raw.append(char)
        match self._state:
            case "start":
                self._start(char)
            case "nested":
                self._nested(char)
            case "string":
                self._string(char)
            case "literal":
                self._literal(char)
            case _:
                if char not in _SPACE:
                    self._between(char)

    def _start(self, char: str) -> None:
        if char in _SPACE:
            return
        if char != "{":
            raise NotACallError(f"a call begins with {{, not {char!r}")
        if self._is_named_outside:
            self._is_of_arguments = True
            self._begin_value(char)
        else:
            self._state = "key"

    def _between(self, char: str) -> None:
        state = self._state
        if state == "colon" and char == ":":
            self._state = "value"
        elif state == "value":
            self._begin_value(char)
        elif state == "comma" and char == ",":
            self._state = "key"
        elif state == "key" and char == '"':
            self._key = None
            self._value = [char]
            self._state = "string"
        elif state in ("comma", "key") and char == "}":
            self._finish()
        else:
            raise NotACallError(f"{char!r} where a {state} was due")

    def _begin_value(self, char: str) -> None:
        self._value = [char]
        self.has_arguments |= self._is_of_arguments
        if char == '"':
            self._state = "string"
        elif char in "{[":
            if self._is_strict and not self._is_of_arguments:
                raise NotACallError(f"{self._key!r} of a call is no {char}")
            self._state = "nested"
            self._depth = 1
            self._give(char)
        elif char in _LITERAL:
            self._state = "literal"
        else:
            raise NotACallError(f"{char!r} begins no value")

    def _give(self, text: str) -> None:
        if self._is_of_arguments:
            self._untaken.append(text)

    def _nested(self, char: str) -> None:
        self._give(char)
        if self._is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._is_in_string = False
        elif char == '"':
            self._is_in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._state = "comma"
                if self._is_named_outside:
                    self._finish()

    def _string(self, char: str) -> None:
        self._value.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._end_string()

    def _end_string(self) -> None:
        try:
            text = json.loads("".join(self._value), strict=False)
            text.encode()  # half a surrogate pair could not be sent on
        except ValueError as error:
            raise NotACallError(str(error)) from None
        if self._key is None:
            self._begin_member(text)
            return
        if self._key in _NAME_KEYS and not self._is_keyed:
            self.name = text
        self._give(text)
        self._state = "comma"

    def _begin_member(self, key: str) -> None:
        self._key = key
        self._state = "colon"
        if self._is_keyed:
            if self.name is not None:
                raise NotACallError(f"{key!r} beside {self.name!r}")
            self.name = key
        elif self._is_strict and key not in (*_NAME_KEYS, *_ARGUMENT_KEYS, *_OTHER_KEYS):
            raise NotACallError(f"{key!r} is nothing that a call has")
        # of several, the first
        self._is_of_arguments = not self.has_arguments and (self._is_keyed or key in _ARGUMENT_KEYS)

    def _literal(self, char: str) -> None:
        if char in _LITERAL:
            self._value.append(char)
            return
        text = "".join(self._value)
        self._give("{}" if text == "null" else text)
        self._state = "comma"
        if char not in _SPACE:
            self._between(char)

    def _finish(self) -> None:
        if self.name is None:
            raise NotACallError("the object has no name")
        if not self.has_arguments:
            self._untaken.append("{}")
        self.is_done = True
