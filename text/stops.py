"""Stop strings, found in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence

from messages.errors import RequestError


class StopMatcher:
    """Cuts a stream of text at the first of several stop strings, however the text is split into pieces.

    The first stop is the one that is complete first; where two end at the same character, the longer one. Text that
    may turn out to be the beginning of a stop is held back until it is decided.
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str: bool = False, min_tokens: int = 0) -> None:
        """Make a matcher for one sequence.

        Args:
            stop: the stop strings; none at all is fine, the text then passes straight through.
            include_stop_str: keep the stop string at the end of the text.
            min_tokens: no stop is complete inside the text of the first `min_tokens` tokens.

        Raises:
            RequestError: a stop string is empty.
        """
        if "" in stop:
            raise RequestError(f"stop[{list(stop).index('')}] is empty, wanted at least one character", param="stop")
        self._stops = tuple(dict.fromkeys(stop))
        self._include_stop_str = include_stop_str
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str, num_tokens: int = 1) -> tuple[str, str | None]:
        """Take the text of the next `num_tokens` tokens; return what may be shown of it and the stop that it met.

        After a stop, everything that follows is dropped.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        self._num_tokens += num_tokens
        # A stop counts only if its last character is after `decided`; what was held back before ended no stop.
        decided = len(self._held)
        buffer = self._held + text
        if self._num_tokens > self._min_tokens:
            match = self._first_match(buffer, decided)
            if match is not None:
                end, stop = match
                self._matched, self._held = stop, ""
                return buffer[: end if self._include_stop_str else end - len(stop)], stop
        held = self._open_suffix(buffer)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held], None

    def flush(self) -> str:
        """Return what is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str, decided: int) -> tuple[int, str] | None:
        """Find the stop that ends first after `decided`: its end and its text."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            at = buffer.find(stop, max(0, decided - len(stop) + 1))
            if at < 0:
                continue
            end = at + len(stop)
            if best is None or end < best[0] or (end == best[0] and len(stop) > len(best[1])):
                best = (end, stop)
        return best

    def _open_suffix(self, buffer: str) -> int:
        """Count the characters at the end of `buffer` that a stop may begin with."""
        longest = 0
        for stop in self._stops:
            first = max(0, len(buffer) - len(stop) + 1)
            at = buffer.find(stop[0], first)
            while at >= 0 and len(buffer) - at > longest:
                if stop.startswith(buffer[at:]):
                    longest = len(buffer) - at
                    break
                at = buffer.find(stop[0], at + 1)
        return longest
