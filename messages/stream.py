"""The tokens that a worker streams back: one message per engine step and ingress."""

from __future__ import annotations

from typing import Literal

import msgspec

from messages.errors import ErrorInfo
from messages.miss import MissReason
from messages.tier import Tier

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability under the unmodified distribution, with the likeliest alternatives."""

    token_id: int
    logprob: float
    rank: int  #: 1 is the likeliest
    top: tuple[tuple[int, float], ...] = ()  #: (token id, logprob), likeliest first


class PromptSources(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the KV of a prompt's tokens came from; all add up to the prompt's length.

    `device`: already in the decode worker's pool; `peer`: already in another worker's pool; `host`, `disk`, `remote`:
    in that tier of a node cache; `computed`: computed for this request, wherever.
    """

    device: int = 0
    host: int = 0
    peer: int = 0
    disk: int = 0
    remote: int = 0
    computed: int = 0

    @property
    def cached(self) -> int:
        """Prompt tokens that nobody had to compute."""
        return self.device + self.host + self.peer + self.disk + self.remote


class PlannedRun(msgspec.Struct, frozen=True, array_like=True):
    """Prompt tokens [begin, end) were to be loaded from `owner`, who has them in `tier`."""

    begin: int
    end: int
    tier: Tier
    owner: str  #: channel endpoint


class GotRun(msgspec.Struct, frozen=True, array_like=True):
    """Prompt tokens [begin, end) have their KV from `source`, a field of PromptSources."""

    begin: int
    end: int
    source: str
    owner: str = ""  #: channel endpoint of who had them, or computed them for this request; "": the decode worker
    why: MissReason | None = None  #: of computed ones that were to come from others


class PromptPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a worker meant to get the KV of a prompt, with the prices that it decided by, and what it moved for it."""

    runs: tuple[PlannedRun, ...] = ()  #: to be loaded from holders; the rest is held, computed, or handed over
    is_mixed: bool = False  #: the head of what is loaded was to be computed meanwhile
    load_s: float = 0.0  #: predicted for loading all that holders have
    compute_s: float = 0.0  #: predicted for computing it instead, what waits before it included
    handed_over_by: str = ""  #: the prefill worker that was asked for the rest; "": it is computed here
    got: tuple[GotRun, ...] = ()  #: what came of it, in order, the whole prompt; it agrees with the PromptSources
    num_moved_bytes: int = 0  #: that came from others, until the first token
    predicted_ttft_s: float = 0.0  #: by whoever placed the request
    queued_s: float = 0.0  #: from its arrival at the decode worker until it was admitted there
    prefill_s: float = 0.0  #: from then to its first token, whoever computed it
    pulled_s: float = 0.0  #: from then until nothing more was on its way, or the first token; 0: nothing was


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step yields for one sequence. `finish_reason` is set on its last chunk, and only there."""

    request_id: str
    position: int = 0  #: of the first of token_ids in the output, of which a worker may have been given the beginning
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []  #: one per token id where asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  #: on the first chunk where asked for; [0] is None
    sources: PromptSources | None = None  #: on the first chunk
    plan: PromptPlan | None = None  #: on the first chunk
    is_accepted: bool = False  #: without tokens: the worker has taken the request in, and the others of its message
    is_alone: bool = False  #: without tokens: of a suspect, of which a step begins now that computes nothing else
    stop_token_id: int | None = None  #: that ended it; also the last of token_ids, unless it came before a move
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None  #: with finish_reason "error"


class TokenBatch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All of one step's chunks for one ingress."""

    chunks: list[TokenChunk]
