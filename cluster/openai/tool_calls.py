"""Tool calls read back out of generated text, piece by piece, by the table of `cluster.openai.call_formats`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from cluster.openai.call_bodies import PythonCallScanner, body_arguments
from cluster.openai.call_formats import FORCED, CallFormat
from cluster.openai.call_scanner import CallScanner, NotACallError
from cluster.openai.marks import Buffer
from cluster.openai.pair_reader import PairReader
from cluster.openai.value_types import ToolSchema

_SPACE: Final = " \t\r\n"
_MAX_NAME_CHARS: Final = 512  #: between a head and what follows the name


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of call number `index`: its first one carries the name, all carry argument text."""

    index: int
    name: str | None
    arguments: str
    id: str | None = None  #: that the model gave the call, beside its name


class CallParser(Protocol):
    """Splits generated text into content and calls; one per choice. How the text is split changes nothing."""

    def push(self, text: str) -> list[str | CallDelta]:
        """Return the content and call pieces that `text` completes, in order."""

    def flush(self, *, is_cut: bool) -> list[str | CallDelta]:
        """Return what was held back, at the end of the output. `is_cut`: it did not end of itself."""


class ToolCallParser:
    """Reads the calls of one format. What looked like a call and is none comes out as content.

    A call that the model ended without closing it is closed; one that was cut off keeps what was given of it.
    """

    def __init__(
        self, kind: CallFormat, tools: Mapping[str, ToolSchema], allowed: Collection[str] | None = None
    ) -> None:
        """Make a parser that knows `tools` by name. `allowed`: calls of others are none; None: any name is one."""
        self._kind = kind
        self._tools = tools
        self._allowed = allowed
        drops = [mark.replace("{}", name) for mark in kind.drops for name in (tools if "{}" in mark else [""])]
        self._drops = tuple(drops)
        self._text_marks = (*kind.opens, *kind.heads, *kind.weak_opens, *drops)
        # JSON ends by itself, so that what closes its call comes when we are back between calls
        self._area_marks = (*kind.opens, *kind.heads, *kind.closes, *kind.fillers, *kind.call_closes)
        before = (kind.pairs.open, kind.pairs.whole or kind.pairs.open) if kind.pairs else ()
        braces = ("{",) if kind.arguments == "json" or kind.takes_objects else ()
        self._name_marks = (*kind.name_ends, *before, *kind.call_closes, *kind.closes, *braces)
        self._buffer = Buffer()
        #: an area without anything around it is the whole output
        self._state: Literal["text", "area", "name", "json", "scan", "pairs", "body"]
        self._state = "text" if self._text_marks else "area"
        self._raw = ""  # read since the area or the call began, for text that turns out to be content
        self._num_blank = 0  # characters that the buffer of text begins with, known to be white space
        self._is_weak = False  # of the area: a call must be one of a known tool
        self._num_in_area = 0  # calls
        self._is_after_call = False  # no content since
        self._name = ""
        self._id: str | None = None
        self._scanner: CallScanner | PythonCallScanner | None = None
        self._reader: PairReader | None = None
        self._is_announced = False  # the call that is being read was given its name
        self.num_calls = 0

    def push(self, text: str) -> list[str | CallDelta]:
        """Implement `CallParser.push`."""
        self._buffer.push(text)
        return self._read()

    def flush(self, *, is_cut: bool) -> list[str | CallDelta]:
        """Implement `CallParser.flush`."""
        buffer = self._buffer
        buffer.is_final = True
        out = self._read()
        if self._state == "pairs" and self._reader is not None:
            if not is_cut:
                self._give(out, self._reader.close(buffer))
        elif self._state == "json" and self._is_announced:
            if not is_cut:
                self._give(out, "{}")
        elif self._state == "body" and not is_cut and self._end_body(out, buffer.text):
            pass
        elif self._state == "text":
            self._content(out, buffer.text)
        elif self._state == "area":
            is_blank = not buffer.text.strip(self._kind.separators)
            if self._num_in_area == 0 and (self._is_weak or not is_blank):
                self._content(out, self._raw + buffer.text)
            elif not is_blank:
                self._content(out, buffer.text)
        elif not self._is_announced:
            scanned = "" if self._scanner is None else "".join(self._scanner.raw)
            self._content(out, self._raw + scanned + buffer.text)
        buffer.text = ""
        return _merged(out)

    def _read(self) -> list[str | CallDelta]:
        out: list[str | CallDelta] = []
        steps = {
            "text": self._text,
            "area": self._area,
            "name": self._call_name,
            "json": self._json,
            "scan": self._scan,
            "pairs": self._pairs,
            "body": self._body,
        }
        while self._buffer.text and steps[self._state](out):
            pass
        return _merged(out)

    def _content(self, out: list[str | CallDelta], text: str) -> None:
        """Give content; white space alone is none right after a call."""
        if not self._is_after_call or text.strip(_SPACE):
            self._is_after_call = False
            out.append(text)

    # Each step decides about the next piece of the buffer, and returns False when it needs more text.

    def _text(self, out: list[str | CallDelta]) -> bool:
        """Look for what begins an area or a call. White space before it goes with it, and is held back until then."""
        buffer = self._buffer
        found = buffer.find(self._text_marks)
        before = buffer.text[: buffer.clean if found is None else found[0]]
        rest = before[self._num_blank :].rstrip(_SPACE)
        text = before[: self._num_blank + len(rest)] if rest else ""
        buffer.take(len(text))
        self._num_blank = len(before) - len(text) if found is None else 0
        if text:
            self._content(out, text)
        if found is None:
            return False
        mark = found[1]
        space = buffer.take(len(before) - len(text))
        if mark in self._drops and mark not in self._kind.opens:
            buffer.take(len(mark))
            buffer.text = space + buffer.text
            buffer.clean = 0
            return True
        self._is_weak = mark in self._kind.weak_opens
        self._num_in_area = 0
        self._raw = space
        if mark != "{":  # which begins the call itself
            self._raw += buffer.take(len(mark))
        self._state = "name" if mark in self._kind.heads else "area"
        return True

    def _area(self, out: list[str | CallDelta]) -> bool:
        kind, buffer = self._kind, self._buffer
        mark = buffer.starts(self._area_marks)
        if mark is None:
            return False
        if mark:
            self._raw += buffer.take(len(mark))
            if mark in kind.heads:
                self._state = "name"
            elif mark in kind.closes:
                self._leave(out, "" if not self._is_weak else self._raw)
            return True
        char = buffer.text[0]
        if char in kind.separators:
            self._raw += buffer.take(1)
        elif char == "{" and kind.takes_objects:
            self._begin_scan(CallScanner(is_keyed=kind.is_keyed, is_strict=self._is_weak))
        elif kind.arguments == "python" and (char.isalpha() or char == "_"):
            known = self._tools if self._is_weak and self._allowed is None else self._allowed
            self._begin_scan(PythonCallScanner(self._tools, known))
        elif kind.has_bare_names and (char.isalnum() or char in "_-"):
            self._state = "name"
        else:
            self._leave(out, self._raw)
        return True

    def _leave(self, out: list[str | CallDelta], raw: str) -> None:
        """Go on with text; `raw` was none of a call."""
        if self._num_in_area == 0:
            self._content(out, raw)
        self._raw = ""
        self._state = "text"

    def _call_name(self, out: list[str | CallDelta]) -> bool:
        """Read up to what follows a name."""
        kind, buffer = self._kind, self._buffer
        found = buffer.find(self._name_marks)
        if found is None and len(buffer.text) <= _MAX_NAME_CHARS:
            return False
        at, mark = found or (0, "")
        if mark == "{" and kind.takes_objects and not buffer.text[:at].strip():
            self._raw += buffer.take(at)
            self._begin_scan(CallScanner())
            return True
        match = kind.name.fullmatch(buffer.text[:at])
        name = "" if match is None else next(filter(None, map(match.groupdict().get, ("double", "single", "bare"))), "")
        if not name or not self._is_allowed(name):
            self._leave(out, self._raw)
            return True
        assert match is not None
        self._name, self._id = name, match.groupdict().get("id")
        self._raw += buffer.take(at)
        if mark in kind.name_ends:
            self._raw += buffer.take(len(mark))
        if kind.arguments == "pairs":
            self._state = "pairs"
            self._reader = PairReader(kind, self._tool(name))
            self._give(out, "")
        else:
            self._state = "json" if kind.arguments == "json" else "body"
        return True

    def _is_allowed(self, name: str) -> bool:
        return self._allowed is None or name in self._allowed

    def _tool(self, name: str) -> ToolSchema:
        return self._tools.get(name) or ToolSchema(None)

    def _json(self, out: list[str | CallDelta]) -> bool:
        """Wait for the object that is the arguments of a call with a name."""
        buffer = self._buffer
        mark = buffer.starts(self._area_marks)
        if mark is None:
            return False
        if buffer.text[0] in _SPACE:
            self._raw += buffer.take(1)
        elif buffer.text[0] == "{":
            self._begin_scan(CallScanner(self._name))
        elif mark and mark in self._kind.fillers:
            self._raw += buffer.take(len(mark))
        elif mark or self._is_announced:
            self._give(out, "{}")
            self._end_call()
        else:
            self._leave(out, self._raw)
        return True

    def _begin_scan(self, scanner: CallScanner | PythonCallScanner) -> None:
        self._scanner = scanner
        self._state = "scan"

    def _scan(self, out: list[str | CallDelta]) -> bool:
        """Read a call, or its arguments, character by character."""
        scanner, buffer = self._scanner, self._buffer
        assert scanner is not None
        for num_read, char in enumerate(buffer.text, start=1):
            try:
                scanner.feed(char)
                if scanner.is_announced and not self._is_announced:
                    self._check(scanner)
                    self._give_scanned(out, scanner)
            except NotACallError:
                buffer.take(num_read - 1)  # the character that shows it may begin something else
                self._scanner = None
                if self._is_announced:
                    self._give(out, scanner.take())
                    self._end_call()
                else:
                    self._leave_scan(out, self._raw, "".join(scanner.raw[:-1]))
                return True
            if scanner.is_done:
                buffer.take(num_read)
                self._give_scanned(out, scanner)
                self._end_call()
                return True
        buffer.take(len(buffer.text))
        self._give_scanned(out, scanner)
        return False

    def _check(self, scanner: CallScanner | PythonCallScanner) -> None:
        """Refuse a call of what is no tool, where that makes it none."""
        name = scanner.name or ""
        if not self._is_allowed(name) or (self._is_weak and not (name in self._tools and scanner.has_arguments)):
            raise NotACallError(f"{name!r} is no tool")

    def _leave_scan(self, out: list[str | CallDelta], raw: str, scanned: str) -> None:
        raw = raw if self._num_in_area == 0 else ""
        self._num_in_area = 0
        self._leave(out, raw + scanned)

    def _pairs(self, out: list[str | CallDelta]) -> bool:
        reader = self._reader
        assert reader is not None
        arguments = reader.read(self._buffer)
        if arguments:
            self._give(out, arguments)
        if reader.is_json:
            self._state = "json"
        elif reader.is_done:
            self._end_call()
        else:
            return False
        return True

    def _body(self, out: list[str | CallDelta]) -> bool:
        found = self._buffer.find(self._kind.call_closes)
        if found is None:
            return False
        at, mark = found
        body = self._buffer.take(at)
        end = self._buffer.take(len(mark))
        if not self._end_body(out, body):
            self._leave_scan(out, self._raw, body + end)
        return True

    def _end_body(self, out: list[str | CallDelta], body: str) -> bool:
        try:
            arguments = body_arguments(self._kind, body, self._tool(self._name))
        except NotACallError:
            return False
        self._give(out, arguments)
        self._end_call()
        return True

    def _give_scanned(self, out: list[str | CallDelta], scanner: CallScanner | PythonCallScanner) -> None:
        if scanner.is_announced:
            self._name = scanner.name or ""
            self._give(out, scanner.take())

    def _give(self, out: list[str | CallDelta], arguments: str) -> None:
        if self._is_announced:
            out.append(CallDelta(self.num_calls, None, arguments))
        else:
            out.append(CallDelta(self.num_calls, self._name, arguments, self._id))
        self._is_announced = True

    def _end_call(self) -> None:
        self.num_calls += 1
        self._num_in_area += 1
        self._is_after_call = True
        self._is_announced = False
        self._id = None
        self._raw = ""
        self._scanner = self._reader = None
        self._state = "area"


class ForcedCallParser:
    """Reads what a tool choice's grammar makes: nothing but calls. Only those that are whole are given."""

    def __init__(self, named: str | None) -> None:
        """Make a parser of a list of calls, or, with `named`, of the arguments of that one function."""
        self._named = named
        self._parser = ToolCallParser(FORCED, {})
        self._text: list[str] = []  # of a named function's arguments
        self._calls: list[CallDelta] = []  # not yet whole

    def push(self, text: str) -> list[str | CallDelta]:
        """Implement `CallParser.push`."""
        if self._named is not None:
            self._text.append(text)
            return []
        return self._whole(self._parser.push(text))

    def flush(self, *, is_cut: bool) -> list[str | CallDelta]:
        """Implement `CallParser.flush`."""
        if self._named is None:
            return self._whole(self._parser.flush(is_cut=is_cut))
        arguments = "".join(self._text)
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            return []
        return [CallDelta(0, self._named, arguments)]

    def _whole(self, pieces: list[str | CallDelta]) -> list[str | CallDelta]:
        self._calls = [call for call in _merged([*self._calls, *pieces]) if isinstance(call, CallDelta)]
        num_whole = self._parser.num_calls
        whole: list[str | CallDelta] = [call for call in self._calls if call.index < num_whole]
        self._calls = [call for call in self._calls if call.index >= num_whole]
        return whole


def _merged(pieces: list[str | CallDelta]) -> list[str | CallDelta]:
    """Join neighbours of the same kind; leave out empty text."""
    result: list[str | CallDelta] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, str):
            if not piece:
                continue
            if isinstance(last, str):
                result[-1] = last + piece
                continue
        elif isinstance(last, CallDelta) and last.index == piece.index:
            result[-1] = CallDelta(last.index, last.name, last.arguments + piece.arguments, last.id)
            continue
        elif piece.name is None and not piece.arguments:
            continue
        result.append(piece)
    return result
