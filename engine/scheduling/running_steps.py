"""The steps that run: one, or two, of which the second was planned before the first ended.

    token_ids      [ ... known ............. ]( awaited )
                   [ num_computed ][ step    ][ step ahead )
                                             planned_end      one further when the step ahead is planned

A step ahead counts on the one before it: that its tokens are computed, and that each sequence it samples gets a token
and does not end by it. Of one that does end, or is cancelled, the row is computed for nothing: its blocks are nobody
else's until then, and nobody gets to know what was written there.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from engine.scheduling.plan import SequenceStep
from engine.scheduling.sequence import Sequence
from messages.errors import InvariantError

PlannedStep: TypeAlias = list[tuple[SequenceStep, Sequence]]


class RunningSteps:
    """Steps in the order in which they run, at most `max_steps`, and what their sequences have in them."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._steps: deque[PlannedStep] = deque()

    def __len__(self) -> int:
        """Count them."""
        return len(self._steps)

    @property
    def may_be_followed(self) -> bool:
        """Whether another may be planned behind the one that runs: not where that may end the process, as a suspect's.

        So nobody else is in what runs when it does.
        """
        return not any(seq.is_suspect for step in self._steps for _, seq in step)

    def check_wanted(self) -> None:
        """Raise InvariantError if no step can be wanted now."""
        if len(self._steps) >= self._max_steps:
            runs = "one runs" if self._max_steps == 1 else f"{self._max_steps} run"
            raise InvariantError(f"a step is wanted while {runs}")

    def begin(self, step: PlannedStep) -> None:
        """Take in a step that begins, or will when the one before it has ended."""
        for part, seq in step:
            seq.num_steps += 1
            seq.num_awaited += part.is_sampled
            seq.planned_end = part.end
        self._steps.append(step)

    def end(self) -> PlannedStep:
        """Return the step that began first: it has ended.

        Raises:
            InvariantError: none runs.
        """
        if not self._steps:
            raise InvariantError("a step ended that was not running")
        step = self._steps.popleft()
        for part, seq in step:
            seq.num_steps -= 1
            seq.num_awaited -= part.is_sampled
        return step
