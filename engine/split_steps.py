"""A step that does not fit into the device's memory is computed in parts.

    plan                         its parts, each launched alone, and split on where it does not fit either
    decodes a b c | chunk d      decodes a b c | first half of d,  rest of d
    decodes a b c                a,  b c

So the chunks are halved first; sequences are taken one at a time at last, and tokens of one. Who does not fit even so
ends with an error, and nobody else. KV that is written again is what was there, so nothing has to be undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from engine.scheduling.plan import SequenceStep, StepPlan, StepResult
from messages.errors import CapacityError, KvrayError

logger = logging.getLogger(__name__)

#: Chunks are cut at multiples of the first of these that leaves something on both sides: as the scheduler cuts them.
_CUT_TOKENS = (256, 16, 1)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SplitStep(Generic[T]):
    """A step that is on its way, in one part if it fitted."""

    launched: list[T]
    errors: dict[str, KvrayError]  #: of sequences that do not fit


class SplitSteps(Generic[T]):
    """Launches steps, and splits those that do not fit.

    Args:
        launch: puts a step on its way; raises torch.OutOfMemoryError where it does not fit.
        finish: waits for the end of one.
        release: gives back what memory is held and not used.
    """

    def __init__(
        self, launch: Callable[[StepPlan], T], finish: Callable[[T], StepResult], release: Callable[[], None]
    ) -> None:
        self._launch = launch
        self._finish = finish
        self._release = release
        self._last_errors: dict[str, KvrayError] = {}  # of the last step: the one behind it may be planned already
        self.num_splits = 0

    def launch(self, plan: StepPlan) -> SplitStep[T]:
        """Put a step on its way, as a whole or in parts."""
        last, errors = self._last_errors, dict[str, KvrayError]()
        if last:
            over = (part.seq_id for part in plan.parts if part.begins is None and part.seq_id in last)
            errors = {seq_id: last[seq_id] for seq_id in over}
        launched: list[T] = []
        left = [plan]
        while left:
            some = left.pop(0)
            if errors:
                some = replace(some, parts=tuple(part for part in some.parts if part.seq_id not in errors))
            if some.is_told and not some.parts:
                continue
            done = self._try(some)
            if done is None:
                left[:0] = self._split(some, errors)
            else:
                launched.append(done)
        self._last_errors = errors
        return SplitStep(launched, errors)

    def finish(self, step: SplitStep[T]) -> StepResult:
        """Wait for the end of a step; return what all of its parts gave."""
        return merged([self._finish(each) for each in step.launched], step.errors)

    def _split(self, plan: StepPlan, errors: dict[str, KvrayError]) -> Sequence[StepPlan]:
        """Split a step that does not fit; put its sequence into `errors` where it cannot be."""
        halves = split(plan)
        if halves is None:
            (part,) = plan.parts
            errors[part.seq_id] = CapacityError(
                f"the device's memory is too small for token {part.start} of the sequence, even alone", status=503
            )
            return ()
        self.num_splits += 1
        if self.num_splits & (self.num_splits - 1) == 0:  # seldomer and seldomer
            logger.warning(
                "a step of %d sequences, %d tokens, does not fit into the device's memory and is computed in parts (%d "
                "times so far): lower engine.max_num_batched_tokens or engine.gpu_memory_utilization",
                len(plan.parts),
                sum(part.num_tokens for part in plan.parts),
                self.num_splits,
            )
        return halves

    def _try(self, plan: StepPlan) -> T | None:
        """Launch `plan`; None where it does not fit. The error is gone then: its traceback keeps what was computed."""
        try:
            return self._launch(plan)
        except torch.OutOfMemoryError:
            pass
        self._release()
        return None


def split(plan: StepPlan) -> tuple[StepPlan, StepPlan] | None:
    """Split a step that was tried into two that together compute the same; None where it is one token of one sequence.

    What the plan tells of its slots was taken in when it was tried.
    """
    chunks = [part for part in plan.parts if part.kind == "prefill"]
    rows = [part for part in plan.parts if part.kind == "decode"]
    if chunks and (rows or len(chunks) > 1 or chunks[0].num_tokens > 1):
        first, second = _halves(chunks)
        first = rows + first
    elif len(rows) > 1:
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    elif rows and rows[0].num_tokens > 1:
        first, second = _halves(rows)
    else:
        return None
    return _told(plan, first), _told(plan, second)


def merged(results: Sequence[StepResult], errors: dict[str, KvrayError]) -> StepResult:
    """Merge what the parts of a step gave, in order, and the errors of those that were left out."""
    if len(results) == 1 and not errors:
        return results[0]
    whole = StepResult(sampled={}, errors=dict(errors), elapsed_s=sum(result.elapsed_s for result in results))
    for result in results:
        whole.sampled.update(result.sampled)
        whole.errors.update(result.errors)
        for seq_id, logprobs in result.prompt_logprobs.items():
            whole.prompt_logprobs.setdefault(seq_id, []).extend(logprobs)
    return whole


def _told(plan: StepPlan, parts: list[SequenceStep]) -> StepPlan:
    return replace(plan, parts=tuple(parts), freed_slots=(), is_told=True)


def _halves(parts: list[SequenceStep]) -> tuple[list[SequenceStep], list[SequenceStep]]:
    """Split parts into two that have half of the tokens each, or nearly; one of one token goes into the second."""
    left = sum(part.num_tokens for part in parts) // 2
    for index, part in enumerate(parts):
        if part.num_tokens > left:
            if not left:
                return parts[:index], parts[index:]
            head, tail = _cut(part, left)
            return [*parts[:index], head], [tail, *parts[index + 1 :]]
        left -= part.num_tokens
    return parts, []


def _cut(part: SequenceStep, num_tokens: int) -> tuple[SequenceStep, SequenceStep]:
    """Cut a part behind about `num_tokens` of its tokens."""
    ends = ((part.start + num_tokens) // unit * unit for unit in _CUT_TOKENS)
    end = next(end for end in ends if end > part.start)
    head = replace(part, num_tokens=end - part.start, is_sampled=False)
    return head, replace(part, start=end, num_tokens=part.end - end)
