"""What a worker still has to compute, in seconds of its own price."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.sequence import Phase, Sequence
from engine.scheduling.step_cost import StepCost
from kvcache.price import ASSUMED_COMPUTE, Computation, compute_s
from messages.price import ComputePrice


class Backlog:
    """The prefill of the sequences of `ledger`, those left out that another worker computes. `cost`: of steps."""

    def __init__(self, ledger: SequenceLedger, cost: StepCost) -> None:
        self._ledger = ledger
        self._cost = cost
        self._parts_s: dict[str, float] | None = None  # seconds by sequence, from `remember` to `forget`
        self._sum_s = 0.0

    @property
    def price(self) -> ComputePrice:
        """What computing here costs, as it was learned; assumed before the first step with prefill."""
        return self._cost.price or ASSUMED_COMPUTE

    def seconds(self, max_tokens: int = sys.maxsize) -> float:
        """Return the seconds of computing before all sequences decode, of prompts that lack at most so many tokens."""
        if self._parts_s is not None and max_tokens == sys.maxsize:
            return self._sum_s
        return sum(self._prompt_s(seq) for seq in self._sequences() if seq.num_tokens - _start_of(seq) <= max_tokens)

    def remember(self) -> None:
        """Add all up once, for many questions: until `forget` only what `note` is told of changes the sum."""
        if self._parts_s is None:
            self._parts_s = {seq.seq_id: self._prompt_s(seq) for seq in self._sequences()}
            self._sum_s = sum(self._parts_s.values())

    def note(self, seq: Sequence) -> None:
        """Take in that a sequence arrived, began, or waits for blocks that another writes."""
        if self._parts_s is not None:
            part_s = self._prompt_s(seq)
            self._sum_s += part_s - self._parts_s.get(seq.seq_id, 0.0)
            self._parts_s[seq.seq_id] = part_s

    def forget(self) -> None:
        """Add all up anew for every question from now on."""
        self._parts_s = None

    def compute_s(self, start: int, end: int) -> float:
        """Return the seconds that tokens [start, end) of one prompt take."""
        return compute_s(self.price, Computation.of(start, end))

    def _sequences(self) -> Iterator[Sequence]:
        yield from self._ledger.waiting
        yield from self._ledger.running.values()

    def _prompt_s(self, seq: Sequence) -> float:
        is_elsewhere = seq.phase is Phase.PULLING or (seq.phase is Phase.WAITING and seq.wants_remote)
        return 0.0 if is_elsewhere or seq.is_decoding else self.compute_s(_start_of(seq), seq.num_tokens)


def _start_of(seq: Sequence) -> int:
    """Return the first token of one that waits or runs that is to be computed here."""
    return seq.expected_match_tokens if seq.phase is Phase.WAITING else seq.num_computed
