"""The ingress asks the router where a prompt should run."""

from __future__ import annotations

import msgspec

from messages.errors import ErrorInfo
from messages.miss import MissedRun
from messages.request import HeldRun


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Route and reserve, in one step.

    `names`: 16-byte names of the prompt's full blocks, concatenated. `num_prompt_tokens`: all that is to be computed
    before the next token, so with what was generated so far if the request moves. `num_sequences`: choices that will
    run.
    """

    request_id: str
    names: bytes
    num_prompt_tokens: int
    max_tokens: int
    num_sequences: int = 1
    other_prompts: tuple[int, ...] = ()  #: tokens of each further prompt of the request, whose blocks nobody asks about
    exclude: tuple[str, ...] = ()  #: worker ids that just failed this request
    tenant: int = 0  #: whose blocks they are, as in GenerateRequest


class Placement(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Where a request runs, and why. A hint: the workers verify."""

    request_id: str
    decode_worker: str
    decode_address: str
    prefill_worker: str | None = None  #: None: the decode worker prefills
    prefill_address: str | None = None
    prefill_s: float = 0.0  #: predicted seconds until the prefill worker's KV lies on the decode worker
    decode_match_tokens: int = 0
    prefill_match_tokens: int = 0
    num_computed_tokens: int = 0  #: that nobody holds, or that are cheaper to compute than to load
    #: where blocks of the prompt lie, head first, as far as anybody holds them; None: it is not known
    held: tuple[HeldRun, ...] | None = ()
    missing: tuple[MissedRun, ...] = ()  #: what follows them, as far as the router was to find out why
    predicted_ttft_s: float = 0.0
    reason: str = ""


class RouteFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Router to ingress: no worker can take the request."""

    request_id: str
    error: ErrorInfo


class RequestEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ingress to router: the reservation made for this request ends, whether or not its Placement was sent yet."""

    request_id: str
