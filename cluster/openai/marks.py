"""Marks found in a text that comes piece by piece."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Buffer:
    """Text that was read and is not decided about yet."""

    def __init__(self) -> None:
        self.text = ""
        self.is_final = False  #: nothing more comes
        self.clean = 0  #: before here none of the marks of the last `find` begins, whatever follows
        self._marks: tuple[str, ...] = ()

    def push(self, text: str) -> None:
        """Add text at the end."""
        self.text += text

    def take(self, size: int) -> str:
        """Take `size` characters from the beginning."""
        taken, self.text = self.text[:size], self.text[size:]
        self.clean = max(0, self.clean - size)
        return taken

    def find(self, marks: tuple[str, ...]) -> tuple[int, str] | None:
        """Return place and text of the first mark, of several at one place the longest; None where more is needed.

        Which mark it is never depends on how the text was split: it waits for what may turn out to be a longer one.
        """
        if not marks:
            return None
        begin = self.clean if marks == self._marks else 0
        self._marks = marks
        patterns = _patterns(marks)
        found = patterns.whole.search(self.text, begin)
        self.clean = len(self.text) if self.is_final else self._open_at(patterns, begin)
        if found is None or found.start() >= self.clean:
            return None
        self.clean = found.start()
        return found.start(), found[0]

    def starts(self, marks: tuple[str, ...]) -> str | None:
        """Return the longest mark that the text begins with, "" for none; None where that is not decided yet."""
        if not self.is_final and any(len(mark) > len(self.text) and mark.startswith(self.text) for mark in marks):
            return None
        return max((mark for mark in marks if self.text.startswith(mark)), key=len, default="")

    def _open_at(self, patterns: _Patterns, begin: int) -> int:
        """Return where the first mark may begin that the text ends within; its length where none does."""
        for first in patterns.first.finditer(self.text, max(begin, len(self.text) - patterns.longest + 1)):
            tail = self.text[first.start() :]
            if any(len(mark) > len(tail) and mark.startswith(tail) for mark in self._marks):
                return first.start()
        return len(self.text)


class _Patterns(NamedTuple):
    whole: re.Pattern[str]  #: any of the marks, the longest that fits
    first: re.Pattern[str]  #: a character that one of them begins with
    longest: int


@functools.lru_cache(maxsize=1024)
def _patterns(marks: tuple[str, ...]) -> _Patterns:
    by_length = sorted(set(marks), key=len, reverse=True)
    return _Patterns(
        re.compile("|".join(map(re.escape, by_length))),
        re.compile("|".join(map(re.escape, sorted({mark[0] for mark in marks})))),
        len(by_length[0]),
    )


def suffixed(marks: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    """Return tags with `suffix` within them: <think> is then <thinkSUFFIX>."""
    return tuple(mark.replace(">", f"{suffix}>") for mark in marks)
