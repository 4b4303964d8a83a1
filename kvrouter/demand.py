"""What was asked of a router since its start, served or not: what whoever scales the fleet counts."""

from __future__ import annotations

from kvrouter.candidate import Candidate
from messages.scaling import RouterScaling


class Demand:
    """Adds up the best candidate of each request, before it is placed there or refused."""

    def __init__(self) -> None:
        self._prefill_s = self._decode_s = self._ttft_s = 0.0
        self._num_asked = self._num_refused = 0
        self._prompt_tokens = self._matched_tokens = 0

    def note(self, best: Candidate, num_prompt_tokens: int) -> None:
        """Count a request, which has so many prompt tokens."""
        self._num_asked += 1
        self._ttft_s += best.ttft_s
        self._prompt_tokens += num_prompt_tokens
        self._matched_tokens += num_prompt_tokens - best.num_computed_tokens
        if best.prefill is None:
            self._decode_s += best.compute_s
        else:
            self._prefill_s += best.compute_s

    def refuse(self) -> None:
        """Count that the last one was refused."""
        self._num_refused += 1

    def scaling(self) -> RouterScaling:
        """Return the sums so far."""
        return RouterScaling(
            prefill_asked_s_total=self._prefill_s,
            decode_asked_s_total=self._decode_s,
            num_asked_total=self._num_asked,
            num_refused_total=self._num_refused,
            ttft_s_total=self._ttft_s,
            prompt_tokens_total=self._prompt_tokens,
            matched_tokens_total=self._matched_tokens,
        )
