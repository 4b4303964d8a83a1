"""What /v1/route takes and gives, field by field."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from cluster.openai.cache_protocol import PromptFields
from messages.miss import ComputedWhy


class RouteFields(PromptFields, frozen=True, kw_only=True):
    """POST /v1/route: where would this prompt go, if it came now?"""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1, description="that the answer may have")] = 16


class PlacementParts(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a placement's cost, in seconds; the first five add up to the predicted time to first token."""

    wait_s: float  #: until there are a sequence slot and blocks
    load_s: float  #: of what others hold
    queue_s: float  #: of prompts that are computed before
    compute_s: float
    handoff_s: float  #: what bringing the KV from the prefill worker adds
    crowding_s: float  #: harm to the sequences that run there
    displaced_s: float  #: of computing again what is evicted for it


class PlacementCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A placement that was possible."""

    decode_worker: str
    prefill_worker: str | None  #: None: the decode worker computes the prompt
    cost_s: float  #: what placements are compared by
    ttft_s: float  #: predicted time to first token
    parts: PlacementParts
    matched_tokens: dict[str, int]  #: by the nearest place that has them: device, peer, host, disk, remote
    num_computed_tokens: int
    is_chosen: bool


class PredictedRoute(msgspec.Struct, frozen=True, kw_only=True):
    """What the router priced: the chosen placement and the next best ones, cheapest first."""

    candidates: list[PlacementCandidate] = []
    num_possible: int = 0  #: placements that it chose from


class RouteRun(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens [begin, end) have their KV from one source, and were computed for one reason."""

    begin: int
    end: int
    source: str  #: device, peer, host, disk, remote, computed
    holder: str  #: who had them, or computed them: a worker or a node cache, by id, else by address
    why: ComputedWhy | None  #: of computed ones: the reason
    missed_holder: str | None = None  #: of a miss: who had them last, where that is known


class RouteReply(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request went where it went, and what came of it; of several prompts the first one is told of."""

    request_id: str | None  #: as the client knows it; None: of POST
    began_s: float  #: unix time
    model: str
    num_prompt_tokens: int
    num_cached_tokens: int | None  #: of the prompt: nobody had to compute them; None: no token came yet
    num_sequences: int
    num_placements: int  #: more than one: it moved, as its worker was lost or failed it
    state: (
        str  #: predicted (of POST), waiting, running (no token came yet), answered, failed, left (its client, before)
    )
    placed_by: str | None  #: router; hashing, where no router answered
    reason: str
    decode_worker: str | None
    prefill_worker: str | None
    predicted_ttft_s: float | None
    ttft_s: float | None  #: from the request's arrival at its ingress
    predicted: PredictedRoute
    runs: list[RouteRun]  #: what really happened; of POST: what is to be expected
    error: str | None
    sentences: list[str]  #: the same for people


class RouteList(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/route: the newest first, without `predicted`, which is told of one request at a time."""

    routes: list[RouteReply]
