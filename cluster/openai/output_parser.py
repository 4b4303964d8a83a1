"""The one place where what a choice got is split into thought, content and calls."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.openai.tool_calls import CallDelta
from cluster.openai.tools import ToolPlan
from cluster.openai.transcript import Delta


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """A piece of a thought."""

    text: str


class OutputParser:
    """Splits one choice's deltas, in order, each of them once."""

    def __init__(self, tools: ToolPlan, *, shows_thoughts: bool = True) -> None:
        """Make a parser. `shows_thoughts`: the client wants them; what they are is left out else."""
        self._tools = tools
        self._calls = tools.parser()
        self._shows_thoughts = shows_thoughts
        self.has_calls = False  #: there was one

    @property
    def reads_calls(self) -> bool:
        """Whether content may turn out to be calls."""
        return self._calls is not None

    def split(self, delta: Delta) -> list[ThoughtDelta | str | CallDelta]:
        """Return the pieces of a delta, in order; none of them is empty but the first piece of a call."""
        pieces: list[ThoughtDelta | str | CallDelta] = []
        if delta.reasoning and self._shows_thoughts:
            pieces.append(ThoughtDelta(delta.reasoning))
        if self._calls is None:
            return [*pieces, delta.text] if delta.text else pieces
        read = self._calls.push(delta.text)
        if delta.finish_reason is not None:
            read += self._calls.flush(is_cut=delta.finish_reason == "length" or isinstance(delta.stop_reason, str))
        pieces += [p for p in read if isinstance(p, str) or not (self._tools.is_single and p.index)]
        self.has_calls = self.has_calls or any(isinstance(piece, CallDelta) for piece in read)
        return pieces
