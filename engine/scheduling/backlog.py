"""What a worker still has to compute, in seconds of its own price."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.step_cost import StepCost
from kvcache.price import ASSUMED_COMPUTE, Computation, compute_s
from messages.price import ComputePrice


class Backlog:
    """The prefill of the sequences of `ledger`, those left out that another worker computes. `cost`: of steps."""

    def __init__(self, ledger: SequenceLedger, cost: StepCost) -> None:
        self._ledger = ledger
        self._cost = cost

    @property
    def price(self) -> ComputePrice:
        """What computing here costs, as it was learned; assumed before the first step with prefill."""
        return self._cost.price or ASSUMED_COMPUTE

    def seconds(self, max_tokens: int = sys.maxsize) -> float:
        """Return the seconds of computing before all sequences decode, of prompts that lack at most so many tokens."""
        return sum(self._prompts(max_tokens))

    def compute_s(self, start: int, end: int) -> float:
        """Return the seconds that tokens [start, end) of one prompt take."""
        return compute_s(self.price, Computation.of(start, end))

    def _prompts(self, max_tokens: int) -> Iterator[float]:
        spans = [(seq.expected_match_tokens, seq) for seq in self._ledger.waiting if not seq.wants_remote]
        spans += [(seq.num_computed, seq) for seq in self._ledger.running.values() if not seq.is_decoding]
        for start, seq in spans:
            if seq.num_tokens - start <= max_tokens:
                yield self.compute_s(start, seq.num_tokens)
