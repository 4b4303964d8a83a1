"""Arguments that are pairs of a key and the text of a value, turned into JSON while they are generated."""

from __future__ import annotations

import json
import re
from typing import Final, Literal

from cluster.openai.call_formats import CallFormat
from cluster.openai.marks import Buffer
from cluster.openai.value_types import STRING, ToolSchema, typed

_KEY: Final = re.compile(r"""\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^<]*))""")
_IS_STRING: Final = re.compile(r'\bstring="(true|false)"')
_TYPE: Final = re.compile(r'(?:\btype="|arg_type>)(\w+)')
_CDATA: Final = re.compile(r"\s*<!\[CDATA\[(.*)\]\]>\s*", re.DOTALL)
_NOT_STRING: Final = frozenset({"null", "integer", "number", "boolean", "object", "array"})


class PairReader:
    """Reads the pairs of one call out of a buffer, and what ends the call. A string is given while it grows."""

    def __init__(self, kind: CallFormat, tool: ToolSchema) -> None:
        pairs = kind.pairs
        assert pairs is not None
        self._pairs = pairs
        self._tool = tool
        self._call_closes = kind.call_closes
        whole = () if pairs.whole is None else (pairs.whole,)
        # a call or a value that has no end of its own ends where the next thing begins
        self._between_marks = (pairs.open, *whole, *kind.call_closes, *kind.closes, *kind.heads)
        self._value_marks = (pairs.close, pairs.open, *kind.call_closes, *kind.closes, *kind.heads)
        self._state: Literal["between", "key", "value", "string"] = "between"
        self._types: frozenset[str] = frozenset()
        self._num_given = 0
        self._is_begun = False  # of a string: what may be layout before it is behind us
        self.is_done = False
        self.is_json = False  #: what follows is all arguments, as a JSON object

    def read(self, buffer: Buffer) -> str:
        """Take what can be decided from `buffer`; return the JSON text that it means."""
        out: list[str] = []
        steps = {"between": self._between, "key": self._key, "value": self._value, "string": self._string}
        while not self.is_done and not self.is_json and steps[self._state](buffer, out):
            pass
        return "".join(out)

    def close(self, buffer: Buffer) -> str:
        """Return what makes the arguments whole, where the output ended without ending the call."""
        out = ['"'] if self._state == "string" else []
        if self._state == "value":
            self._give(buffer.take(len(buffer.text)), out)
        out.append("}" if self._num_given else "{}")
        return "".join(out)

    def _between(self, buffer: Buffer, out: list[str]) -> bool:
        """Look for the next pair; what stands before it means nothing."""
        found = buffer.find(self._between_marks)
        if found is None:
            buffer.take(buffer.clean)
            return False
        at, mark = found
        buffer.take(at)
        if mark == self._pairs.open:
            buffer.take(len(mark))
            self._state = "key"
        elif mark == self._pairs.whole:
            buffer.take(len(mark))
            self.is_json = not self._num_given
        else:
            buffer.take(len(mark) if mark in self._call_closes else 0)
            out.append("}" if self._num_given else "{}")
            self.is_done = True
        return True

    def _key(self, buffer: Buffer, out: list[str]) -> bool:
        found = buffer.find((self._pairs.value,))
        if found is None:
            return False
        header = buffer.take(found[0])
        buffer.take(len(found[1]))
        match = _KEY.match(header)
        assert match is not None  # the bare form takes anything
        key = (match["double"] or match["single"] or match["bare"] or "").strip()
        self._types = self._declared(header, self._tool.types(self._tool.parameter(key)))
        is_string = self._types <= STRING and not self._pairs.has_cdata
        out.append(f"{', ' if self._num_given else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        out.append('"' if is_string else "")
        self._num_given += 1
        self._is_begun = not self._pairs.is_trimmed
        self._state = "string" if is_string else "value"
        return True

    def _declared(self, header: str, wanted: frozenset[str]) -> frozenset[str]:
        """Return the types that both the call and the schema tell of, else those of the schema."""
        is_string, kind = _IS_STRING.search(header), _TYPE.search(header)
        if is_string:
            told = STRING if is_string[1] == "true" else _NOT_STRING
        elif kind:
            told = self._tool.types({"type": kind[1]})
        else:
            return wanted
        return (told & wanted) or wanted or told

    def _value(self, buffer: Buffer, out: list[str]) -> bool:
        found = buffer.find(self._value_marks)
        if found is None:
            return False
        self._give(buffer.take(found[0]), out)
        self._end_value(buffer, found[1])
        return True

    def _give(self, text: str, out: list[str]) -> None:
        if self._pairs.is_trimmed:
            text = text.removeprefix("\n").removesuffix("\n")
        if self._pairs.has_cdata and (match := _CDATA.fullmatch(text)):
            text = match[1]
        out.append(json.dumps(typed(text, self._types), ensure_ascii=False))

    def _string(self, buffer: Buffer, out: list[str]) -> bool:
        if not self._is_begun and buffer.text:
            if buffer.text[0] == "\n":
                buffer.take(1)
            self._is_begun = True
        found = buffer.find(self._value_marks)
        size = buffer.clean if found is None else found[0]
        if self._pairs.is_trimmed and buffer.text[:size].endswith("\n"):
            size -= 1
        out.append(json.dumps(buffer.take(size), ensure_ascii=False)[1:-1])
        if found is None:
            return False
        buffer.take(found[0] - size)
        out.append('"')
        self._end_value(buffer, found[1])
        return True

    def _end_value(self, buffer: Buffer, mark: str) -> None:
        if mark == self._pairs.close:
            buffer.take(len(mark))
        self._state = "between"
