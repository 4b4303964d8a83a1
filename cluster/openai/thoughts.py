"""Thoughts read out of generated text, token by token, by the table of `cluster.openai.thought_formats`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cluster.openai.marks import Buffer
from cluster.openai.thought_formats import ThoughtFormat


class Read(NamedTuple):
    """What a text turned out to be."""

    thought: str
    content: str


class ThoughtReader:
    """Splits the text of one choice into thought and content, token by token. How the text is split changes nothing."""

    def __init__(self, plan: ThoughtPlan) -> None:
        kind = plan.kind
        self._kind = kind
        self._drops = () if kind.is_kept else plan.drops
        self._may_open = plan.may_open and not kind.is_kept
        self._prefix = kind.opens[0] if kind.is_kept else ""  #: of the content
        self._buffer = Buffer()
        self._num_begun = 0  #: thoughts
        self._num_held = 0  #: tokens of a thought whose text is not decided about
        self.num_tokens = 0  #: of thoughts, without their marks
        self._space = ""  #: held back: nothing else came since the thought or the content began
        self._is_blank = True  #: nothing but white space came since
        self._wanted: tuple[str, ...] = ()  #: marks that would change anything now
        self._begin(is_inside=plan.begins_inside and not kind.is_kept)

    @property
    def is_done(self) -> bool:
        """Whether all that follows is content as it stands."""
        return not (self.is_inside or self._wanted or self._space or self._prefix)

    def push(self, text: str) -> Read:
        """Return what the text of the next token completes."""
        was_inside, num_begun = self.is_inside, self._num_begun
        read = self._read(text)
        self._count(read, was_inside=was_inside and num_begun == self._num_begun)
        return read

    def flush(self, text: str) -> Read:
        """Take the last text, of tokens that came before, and return what was held back."""
        self._buffer.is_final = True
        read = self._read(text)
        if self.is_inside:
            self.num_tokens += self._num_held
            return read
        return Read(read.thought, read.content + self._space)

    def _count(self, read: Read, *, was_inside: bool) -> None:
        """Count the tokens that a thought is made of; those of its marks are none."""
        if read.thought:
            self.num_tokens += self._num_held
            self._num_held = 0
        if not self.is_inside:
            self.num_tokens += bool(read.thought)
            self._num_held = 0
        elif self._buffer.text:
            self._num_held += 1
        elif was_inside:
            self.num_tokens += self._num_held + 1
            self._num_held = 0

    def _read(self, text: str) -> Read:
        buffer = self._buffer
        buffer.push(text)
        thought, content = [""], [self._prefix]
        self._prefix = ""
        while True:
            into = thought if self.is_inside else content
            found = buffer.find(self._wanted)
            size = len(buffer.text) if not self._wanted else buffer.clean if found is None else found[0]
            self._take(into, buffer.take(size))
            if found is None:
                return Read("".join(thought), "".join(content))
            if found[1] in self._wanted:  # what stood before it may have changed that
                self._meet(found[1])

    def _take(self, into: list[str], text: str) -> None:
        """Give text; white space that a thought or the content begins with waits for what follows it."""
        if self._is_blank and text:
            text = self._space + text
            self._space = ""
            if self._wanted and not text.strip():
                self._space = text
                return
            self._is_blank = False
            self._wanted = self._find_wanted()
        into.append(text)

    def _meet(self, mark: str) -> None:
        """Go on behind a mark, or before one that belongs to what follows."""
        kind = self._kind
        if self.is_inside and mark in kind.yields and mark not in kind.opens:
            self._begin(is_inside=False)
            return
        self._buffer.take(len(mark))
        if self.is_inside or (self._may_open and mark in kind.opens):
            self._begin(is_inside=mark in kind.opens)
        else:
            self._space = ""

    def _begin(self, *, is_inside: bool) -> None:
        """Begin a thought, or what is none."""
        self.is_inside = is_inside  #: of a thought
        self._space = ""
        self._is_blank = True
        if is_inside:
            self._num_begun += 1
            self._num_held = 0
            self._may_open = self._kind.is_repeated
        self._wanted = self._find_wanted()

    def _find_wanted(self) -> tuple[str, ...]:
        kind = self._kind
        if self.is_inside:
            return (*kind.closes, *kind.yields, *(kind.opens if self._is_blank else ()))
        return (*(kind.opens if self._may_open else ()), *self._drops)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtPlan:
    """The thoughts that one request's outputs may have."""

    kind: ThoughtFormat
    begins_inside: bool  #: the output begins with a thought that is open already
    may_open: bool  #: a thought may be opened
    close: str  #: ends the first one, as a rule
    drops: tuple[str, ...] = ()  #: frames around content that nobody else reads

    def reader(self) -> ThoughtReader:
        """Make a fresh reader for one choice."""
        return ThoughtReader(self)


def plan_thought(
    kind: ThoughtFormat | None,
    prompt: str,
    template_kwargs: Mapping[str, Any],
    *,
    continued: str | None = None,
    call_marks: Collection[str] = (),
) -> ThoughtPlan | None:
    """Plan how a request's outputs are read; None where all of them is content.

    Args:
        kind: how this model writes thoughts, if it has any.
        prompt: as the template rendered it: where it ends with an open thought, the output begins within that.
        template_kwargs: what the template was given, by which clients turn thoughts off.
        continued: the text of the message that the output goes on from.
        call_marks: what a parser of calls reads, frames too.
    """
    if kind is None:
        return None
    is_off = any(template_kwargs.get(name) is False for name in ("enable_thinking", "thinking"))
    opened, is_closed = _at_end(kind, prompt) if continued is None else _within(kind, continued)
    may_open = not (is_closed or is_off)
    place = kind.opens.index(opened) if opened else 0
    plan = ThoughtPlan(
        kind=kind,
        begins_inside=bool(opened) or (may_open and kind.is_implied),
        may_open=may_open or kind.is_repeated,
        close=kind.closes[place] if place < len(kind.closes) else kind.closes[0],
        drops=tuple(mark for mark in kind.drops if mark not in call_marks),
    )
    return plan if plan.begins_inside or plan.may_open or plan.drops else None


def _at_end(kind: ThoughtFormat, prompt: str) -> tuple[str, bool]:
    """Return the mark of the thought that a prompt ends with if it is open, and whether it ends with a closed one."""
    end = prompt.rstrip()
    opened = next((mark for mark in kind.opens if end.endswith(mark.rstrip())), "")
    return opened, not opened and any(end.endswith(mark.strip()) for mark in kind.closes)


def _within(kind: ThoughtFormat, message: str) -> tuple[str, bool]:
    """Do as `_at_end` for a message that the output goes on from: where no thought is open in it, it has ended."""
    opened = max(kind.opens, key=message.rfind)
    is_open = message.rfind(opened) > max(map(message.rfind, kind.closes))
    return (opened, False) if is_open else ("", True)
