"""Marks found in a text that comes piece by piece."""

from __future__ import annotations


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
        begin = self.clean if marks == self._marks else 0
        self._marks = marks
        found = [(at, -len(mark), mark) for mark in marks if (at := self.text.find(mark, begin)) >= 0]
        self.clean = len(self.text) if self.is_final else self._open_at(marks, begin)
        if not found:
            return None
        at, _, mark = min(found)
        if at >= self.clean:
            return None
        self.clean = at
        return at, mark

    def starts(self, marks: tuple[str, ...]) -> str | None:
        """Return the longest mark that the text begins with, "" for none; None where that is not decided yet."""
        if not self.is_final and any(len(mark) > len(self.text) and mark.startswith(self.text) for mark in marks):
            return None
        return max((mark for mark in marks if self.text.startswith(mark)), key=len, default="")

    def _open_at(self, marks: tuple[str, ...], begin: int) -> int:
        """Return where the first mark may begin that the text ends within; its length where none does."""
        longest = max(map(len, marks), default=1) - 1
        for at in range(max(begin, len(self.text) - longest), len(self.text)):
            tail = self.text[at:]
            if any(len(mark) > len(tail) and mark.startswith(tail) for mark in marks):
                return at
        return len(self.text)
