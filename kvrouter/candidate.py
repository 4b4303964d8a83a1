"""One placement and what it costs."""

from __future__ import annotations

from typing import NamedTuple

from kvcache.price import SHORT_TOKENS
from kvrouter.worker_state import WorkerState


class Candidate(NamedTuple):
    """One placement and what it costs."""

    decode: WorkerState
    prefill: WorkerState | None
    decode_match_tokens: int
    prefill_match_tokens: int
    num_computed_tokens: int
    wait_s: float
    load_s: float  #: of what others hold
    queue_s: float
    compute_s: float
    pull_s: float  #: what the handoff adds, with what is pulled after the computation
    harm_s: float
    displaced_s: float  #: of computing again what is evicted for it
    prefill_s: float  #: once the prefill worker is asked, until its KV lies on the decode worker; 0 without one

    @property
    def ttft_s(self) -> float:
        """Predicted time to first token."""
        return self.wait_s + self.load_s + self.queue_s + self.compute_s + self.pull_s

    @property
    def cost_s(self) -> float:
        """Seconds that placements are compared by: time to first token, the harm to others, and what is lost."""
        return self.ttft_s + self.harm_s + self.displaced_s

    @property
    def delay_s(self) -> float:
        """The part of the time to first token that is others' work."""
        return self.wait_s + self.queue_s

    @property
    def is_short(self) -> bool:
        """Whether little of the prompt is to be computed."""
        return self.num_computed_tokens <= SHORT_TOKENS

    def reason(self) -> str:
        """Say in a few words what the placement is worth, for people."""
        match = f"decode holds {self.decode_match_tokens} tokens"
        if self.prefill is not None:
            match += f", prefill {self.prefill_match_tokens}"
        where = "on decode" if self.prefill is None else "on prefill"
        return (
            f"{match}; {self.num_computed_tokens} computed {where} in {self.compute_s:.3f} s, "
            f"behind {self.delay_s:.3f} s, load {self.load_s:.3f} s, pull {self.pull_s:.3f} s"
        )
