"""Workload from a trace: a block of it becomes tokens, equal blocks equal ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cluster.bench.synthetic import FIRST_TOKEN, VOCAB_SIZE
from cluster.bench.workload import Session, Turn
from cluster.traces import Trace, TraceRequest
from messages.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How a trace is made small enough for a model, and fast enough for whoever waits."""

    block_tokens: int | None = None  #: that a block of the trace becomes; None: as many as it stands for
    max_prompt_tokens: int = 2**31  #: what is longer is cut at its end
    max_output_tokens: int = 2**31
    max_turns: int | None = None  #: of a session
    speed: float = 1.0  #: times are divided by it; inf: nobody waits
    vocab_size: int = VOCAB_SIZE


def sessions_of(trace: Trace, scale: Scale, seed: int) -> list[Session]:
    """Return the workload that `trace` stands for. `seed`: what a block's tokens are drawn by, beside its id.

    A request that the trace holds as it was posted is posted as it stands, whatever the scale. Sessions of which the
    trace does not say when they begin all begin at once.

    Raises:
        ConfigError: the trace cannot be scaled.
    """
    if scale.block_tokens is not None and trace.kind == "requests":
        raise ConfigError("--block-tokens: requests of a file are posted as they stand; wanted Mooncake's or agents'")
    tokens = _Tokens(scale.vocab_size, seed)
    begun_s = min((session.begin_s or 0.0 for session in trace.sessions), default=0.0)
    return [
        Session(
            begin_s=((session.begin_s or begun_s) - begun_s) / scale.speed,
            turns=tuple(_turn(request, trace, scale, tokens) for request in session.requests[: scale.max_turns]),
        )
        for session in trace.sessions
    ]


def _turn(request: TraceRequest, trace: Trace, scale: Scale, tokens: _Tokens) -> Turn:
    pause_s = request.pause_s / scale.speed
    if request.body is not None:
        return Turn([], request.num_output_tokens, pause_s, path=request.path, body=request.body)
    block_tokens = trace.block_tokens if scale.block_tokens is None else scale.block_tokens
    share = block_tokens / trace.block_tokens
    num_tokens = min(max(1, int(request.num_prompt_tokens * share)), scale.max_prompt_tokens)
    output = min(max(1, int(request.num_output_tokens * share)), scale.max_output_tokens)
    return Turn(tokens.prompt(request, num_tokens, block_tokens), output, pause_s)


class _Tokens:
    """The tokens that stand for blocks."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._first = min(FIRST_TOKEN, vocab_size // 2)
        self._num_ids = vocab_size - self._first
        self._seed = seed
        self._of: dict[int, list[int]] = {}

    def prompt(self, request: TraceRequest, num_tokens: int, block_tokens: int) -> list[int]:
        """Return a prompt's tokens. What is no whole block has tokens that no other prompt has."""
        tokens: list[int] = []
        for block_id in request.block_ids():
            if len(tokens) >= num_tokens:
                break
            if block_id not in self._of:
                self._of[block_id] = self._drawn(f"{self._seed}/{block_id}", block_tokens)
            tokens += self._of[block_id]
        if len(tokens) < num_tokens:
            tokens += self._drawn(f"{self._seed}/{request}", num_tokens - len(tokens))
        return tokens[:num_tokens]

    def _drawn(self, key: str, count: int) -> list[int]:
        drawn = memoryview(hashlib.shake_128(key.encode()).digest(4 * count)).cast("I")
        return [self._first + number % self._num_ids for number in drawn]
