"""Tool calls read back out of generated text, in the formats that models were trained to write.

hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number   (Hermes, Qwen, SmolLM, Granite)
llama3   {"name": ..., "parameters": {...}}, several parted by `;`, perhaps after <|python_tag|>
mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] or [TOOL_CALLS]name[ARGS]{...}
list     [{"name": ..., "parameters": {...}}, ...]: what the grammar of tool_choice "required" makes
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from cluster.openai.call_scanner import CallScanner, NotACallError

ToolFormat: TypeAlias = Literal["hermes", "llama3", "mistral", "list"]

_SPACE: Final = " \t\r\n"
_MISTRAL_NAME: Final = re.compile(r"([A-Za-z0-9_.-]{1,256})(\[CALL_ID\][A-Za-z0-9]{1,64})?(\[ARGS\])?\s*(?=\{)")
_MISTRAL_PARTIAL: Final = re.compile(r"[A-Za-z0-9_.-]{1,256}(\[[A-Za-z0-9_\]\[]{0,96})?\s*$")


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of call number `index`: its first one carries the name, all carry argument text."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class _Frame:
    """The text that stands around the calls of a format."""

    openers: tuple[str, ...]
    closers: tuple[str, ...] = ()
    separators: str = _SPACE
    is_bare: bool = False  # an object at the very beginning is a call without an opener
    has_named_objects: bool = False  # name{arguments}


_FRAMES: Final[dict[ToolFormat, _Frame]] = {
    "hermes": _Frame(("<tool_call>",), ("</tool_call>",)),
    "llama3": _Frame(("<|python_tag|>",), (), _SPACE + ";,", is_bare=True),
    "mistral": _Frame(("[TOOL_CALLS]",), (), _SPACE + "[],", has_named_objects=True),
    "list": _Frame((), (), _SPACE + "[],"),
}

#: what stands around calls, by format
MARKS: Final[dict[ToolFormat, tuple[str, ...]]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "list": (),
}

#: formats whose marks are special tokens, which the text must then keep
SPECIAL_TOKEN_FORMATS: Final = ("hermes", "llama3", "mistral")


def format_of_text(text: str, name: str) -> ToolFormat | None:
    """Find the format in which `text`, a rendered conversation, shows a call of `name`; None where it shows none."""
    quoted = re.escape(name)
    if re.search(rf"\[TOOL_CALLS\]\s*(\[\s*\{{[^{{}}]*\"{quoted}\"|{quoted}\W)", text):
        return "mistral"
    if re.search(rf"<tool_call>\s*\{{[^{{}}]*\"{quoted}\"", text):
        return "hermes"
    if re.search(rf"\{{\s*\"name\"\s*:\s*\"{quoted}\"\s*,\s*\"parameters\"", text):
        return "llama3"
    return None


class ToolCallParser:
    """Splits generated text into content and calls, piece by piece; one per choice.

    `known_names`: only these make a bare object a call. What looked like a call and is none comes out as content.
    """

    def __init__(self, kind: ToolFormat, known_names: Collection[str]) -> None:
        self._frame = _FRAMES[kind]
        self._known_names = known_names
        self._pending = ""  # read, not yet decided about
        self._raw = ""  # the opener of the call area we are in, for text that turns out to be content
        self._state: Literal["begin", "text", "area", "call"] = "area" if kind == "list" else "begin"
        self._is_bare = False
        self._scanner: CallScanner | None = None
        self._is_announced = False  # the scanner's call was given a name
        self.num_calls = 0

    def push(self, text: str) -> list[str | CallDelta]:
        """Return the content and call pieces that `text` completes, in order."""
        self._pending += text
        out: list[str | CallDelta] = []
        while self._advance(out):
            pass
        return _merged(out)

    def flush(self) -> list[str | CallDelta]:
        """Return what was held back, at the end of the output. A call cut short keeps what was given of it."""
        out: list[str | CallDelta] = []
        if self._scanner is not None and not self._is_announced:
            out.append(self._raw + "".join(self._scanner.raw))
        if self._state != "area":
            out.append(self._pending)
        elif self._pending.strip(self._frame.separators):
            out.append(self._raw + self._pending)
        self._pending = ""
        self._scanner = None
        return _merged(out)

    def _advance(self, out: list[str | CallDelta]) -> bool:
        """Decide about the next piece of the text; False when more text is needed."""
        if not self._pending:
            return False
        match self._state:
            case "begin":
                return self._begin()
            case "text":
                return self._text(out)
            case "area":
                return self._area(out)
            case "call":
                return self._call(out)

    def _begin(self) -> bool:
        stripped = self._pending.lstrip(_SPACE)
        if not stripped:
            return False
        if self._frame.is_bare and stripped[0] == "{":
            self._raw = self._pending[: len(self._pending) - len(stripped)]
            self._pending = stripped
            self._is_bare = True
            self._state = "area"
        else:
            self._state = "text"
        return True

    def _text(self, out: list[str | CallDelta]) -> bool:
        found = [(at, opener) for opener in self._frame.openers if (at := self._pending.find(opener)) >= 0]
        if found:
            at, opener = min(found)
            out.append(self._pending[:at].rstrip(_SPACE))
            self._raw = opener
            self._pending = self._pending[at + len(opener) :]
            self._state = "area"
            return True
        # keep back what may be the beginning of an opener, and the space before it, which goes with a call
        keep = len(self._pending) - _num_opening_chars(self._pending, self._frame.openers)
        keep = len(self._pending[:keep].rstrip(_SPACE))
        out.append(self._pending[:keep])
        self._pending = self._pending[keep:]
        return False

    def _area(self, out: list[str | CallDelta]) -> bool:
        frame = self._frame
        marks = (*frame.openers, *frame.closers)
        for mark in marks:
            if self._pending.startswith(mark):
                self._pending = self._pending[len(mark) :]
                self._raw = mark
                self._state = "area" if mark in frame.openers else "text"
                return True
        if any(mark.startswith(self._pending) for mark in marks):
            return False
        char = self._pending[0]
        if char == "{":
            self._scanner = CallScanner()
        elif char in frame.separators:
            self._raw += char
            self._pending = self._pending[1:]
            return True
        elif frame.has_named_objects and (match := _MISTRAL_NAME.match(self._pending)):
            self._scanner = CallScanner(match[1])
            self._pending = self._pending[match.end() :]
        elif frame.has_named_objects and _MISTRAL_PARTIAL.match(self._pending):
            return False
        else:
            self._leave_area(out, "" if self.num_calls else self._raw)
            return True
        self._is_announced = False
        self._state = "call"
        return True

    def _leave_area(self, out: list[str | CallDelta], raw: str) -> None:
        out.append(raw)
        self._raw = ""
        self._state = "text"

    def _call(self, out: list[str | CallDelta]) -> bool:
        scanner = self._scanner
        assert scanner is not None
        for num_read, char in enumerate(self._pending, start=1):
            try:
                scanner.feed(char)
                self._check_bare(scanner)
            except NotACallError:
                self._pending = self._pending[num_read:]
                self._scanner = None
                if not self._is_announced:
                    self._leave_area(out, self._raw + "".join(scanner.raw))
                else:
                    self._end_call(out, scanner)
                return True
            if scanner.is_done:
                self._pending = self._pending[num_read:]
                self._give(out, scanner)
                self._end_call(out, scanner)
                return True
        self._pending = ""
        self._give(out, scanner)
        return False

    def _check_bare(self, scanner: CallScanner) -> None:
        """Take a bare object for ordinary JSON unless it names a tool and has arguments."""
        if not self._is_bare or not scanner.is_announced or self._is_announced:
            return
        if scanner.name not in self._known_names or not scanner.has_arguments:
            raise NotACallError("no tool of that name")

    def _give(self, out: list[str | CallDelta], scanner: CallScanner) -> None:
        if not scanner.is_announced:
            return
        name = None if self._is_announced else scanner.name
        self._is_announced = True
        arguments = scanner.take()
        if name is not None or arguments:
            out.append(CallDelta(self.num_calls, name, arguments))

    def _end_call(self, out: list[str | CallDelta], scanner: CallScanner) -> None:
        self._give(out, scanner)
        self.num_calls += 1
        self._raw = ""
        self._scanner = None
        self._state = "area"


class NamedCallParser:
    """Takes the whole output for the arguments of one function: what a named tool choice's grammar makes."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name
        self.num_calls = 0

    def push(self, text: str) -> list[str | CallDelta]:
        """Return the next piece of the arguments."""
        if not text:
            return []
        delta = CallDelta(0, self._name, text)
        self._name = None
        self.num_calls = 1
        return [delta]

    def flush(self) -> list[str | CallDelta]:
        """Return nothing: nothing is ever held back."""
        return []


def _num_opening_chars(text: str, openers: tuple[str, ...]) -> int:
    """Return the length of the longest end of `text` that begins an opener."""
    longest = max((len(opener) - 1 for opener in openers), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(opener.startswith(tail) for opener in openers):
            return size
    return 0


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
            result[-1] = CallDelta(last.index, last.name, last.arguments + piece.arguments)
            continue
        result.append(piece)
    return result
