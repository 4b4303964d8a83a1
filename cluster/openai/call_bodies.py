"""Calls whose arguments mean something only when they are whole: Python's, Gemma's, nested elements."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from cluster.openai.call_formats import CallFormat
from cluster.openai.call_scanner import NotACallError
from cluster.openai.literals import LiteralReader, NotALiteralError, read_elements
from cluster.openai.value_types import ToolSchema, fitted, typed

_NAME: Final = re.compile(r"[A-Za-z_][\w.-]*")
_MAX_NAME_CHARS: Final = 256
_BRACKETS: Final = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


class PythonCallScanner:
    """Reads `f(a=1, b="text")`, character by character; `take()` gives all arguments when the call is whole."""

    def __init__(self, tools: Mapping[str, ToolSchema], known: Collection[str] | None) -> None:
        """Make a scanner of calls of `known` functions; None: of any."""
        self.raw: list[str] = []
        self.name: str | None = None
        self.has_arguments = True
        self.is_done = False
        self._tools = tools
        self._known = known
        self._head = ""  # what stands before the first parenthesis
        self._depth = 0
        self._quote = ""  # of the string that we are in
        self._is_escaped = False
        self._arguments = ""

    @property
    def is_announced(self) -> bool:
        """Whether there is something to take."""
        return self.is_done

    def take(self) -> str:
        """Return the argument text since the last call."""
        text, self._arguments = self._arguments, ""
        return text

    def feed(self, char: str) -> None:
        """Read one more character.

        Raises:
            NotACallError: the text cannot become a call.
        """
        self.raw.append(char)
        if not self._depth:
            self._before(char)
        elif self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        else:
            self._depth += _BRACKETS.get(char, 0)
            if not self._depth:
                self._finish()

    def _before(self, char: str) -> None:
        head = self._head.rstrip()
        if char == "(" and (self._known is None or head in self._known):
            self._depth = 1
            return
        self._head += char
        if len(self._head) > _MAX_NAME_CHARS:
            raise NotACallError(f"no name has more than {_MAX_NAME_CHARS} characters")
        is_name = _NAME.fullmatch(self._head.rstrip()) is not None and (char.isspace() or head == self._head[:-1])
        is_known = self._known is None or any(name.startswith(self._head.rstrip()) for name in self._known)
        if not is_name or not is_known:
            raise NotACallError(f"{self._head!r} begins no call")

    def _finish(self) -> None:
        name = self._head.rstrip()
        text = "".join(self.raw)[len(self._head) + 1 : -1]
        tool = self._tools.get(name, ToolSchema(None))
        try:
            arguments = LiteralReader(text).arguments("=", positional=tool.names)
        except NotALiteralError as error:
            raise NotACallError(str(error)) from None
        self.name = name
        self._arguments = json.dumps(arguments, ensure_ascii=False)
        self.is_done = True


def body_arguments(kind: CallFormat, body: str, tool: ToolSchema) -> str:
    """Return the arguments in JSON that stand between a call's name and its end.

    Raises:
        NotACallError: `body` is not written as the format's arguments are.
    """
    try:
        if kind.arguments == "gemma":
            found = LiteralReader(f"{{{body}", kind.quote).whole()
            arguments = {key: fitted(value, tool.parameter(key), tool) for key, value in found.items()}
        else:
            elements = read_elements(body, kind.namespace)
            arguments = {key: _element(content, tool.parameter(key), tool) for key, content in elements}
    except NotALiteralError as error:
        raise NotACallError(str(error)) from None
    return json.dumps(arguments, ensure_ascii=False)


def _element(content: Any, schema: Any, tool: ToolSchema) -> Any:
    """Return the value of an element: a text in its type, or its elements as an object, or a list of what they hold."""
    types = tool.types(schema)
    if isinstance(content, str):
        is_empty_list = not content.strip() and "array" in types and "string" not in types
        return [] if is_empty_list else typed(content, types)
    names = {name for name, _ in content}
    if ("array" in types and "object" not in types) or (not types and names == {"item"}):
        return [_element(inner, tool.items_of(schema), tool) for _, inner in content]
    return {name: _element(inner, tool.property_of(schema, name), tool) for name, inner in content}
