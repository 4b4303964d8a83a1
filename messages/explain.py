"""Why a request went where it went: an ingress asks the router what it priced, and other ingresses what they know."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from messages.cache import BlockHolder
from messages.errors import ErrorInfo
from messages.miss import MissedRun
from messages.request import HeldRun
from messages.route import RouteRequest
from messages.view import AskView, ViewTold


class PricedPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """A placement that was possible, and its cost by part, in seconds; `ttft_s` is the sum of the first five parts."""

    decode_worker: str
    prefill_worker: str | None
    cost_s: float  #: what placements are compared by
    ttft_s: float  #: predicted time to first token
    wait_s: float  #: until there are a sequence slot and blocks
    load_s: float  #: of what others hold
    queue_s: float  #: of prompts that are computed before
    compute_s: float
    handoff_s: float  #: what bringing the KV from the prefill worker adds
    crowding_s: float  #: harm to the sequences that run there
    displaced_s: float  #: of computing again what is evicted for it
    matched_tokens: dict[str, int]  #: by the nearest place that has them: device, peer, host, disk, remote
    num_computed_tokens: int
    is_chosen: bool


class ExplainPlacement(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ingress to router: what did you price for this request, or what would you for `route`? Reserves nothing."""

    query_id: str
    request_id: str = ""  #: of a RouteRequest that was answered
    route: RouteRequest | None = None


class PlacementExplained(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: the chosen placement and the next best ones, cheapest first; none where nothing is known any more."""

    query_id: str
    placements: tuple[PricedPlacement, ...] = ()
    num_possible: int = 0  #: placements there were, of decode workers alone and of pairs, whether or not they could be
    held: tuple[HeldRun, ...] = ()  #: of a `route`: where blocks lie, by address
    missing: tuple[MissedRun, ...] = ()  #: of a `route`
    reason: str = ""  #: of a `route`
    error: ErrorInfo | None = None  #: of a `route`: it would be refused


class RecordQuestion(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ingress to router, and on to the ingress `holder`: what do you know of a request, or of the newest ones?"""

    query_id: str
    asker: str
    holder: str
    tenant: int | None  #: whose they have to be, by the number in their blocks; None: anybody's
    request_id: str | None  #: as clients know it; None: the newest ones
    limit: int = 1


class RecordAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer, the same way back."""

    query_id: str
    asker: str
    records: bytes | None  #: a JSON array, newest first; None: nobody of that name is there


class IndexQuestion(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ingress to router: who holds each of these blocks, whatever prompts they are of? Or some of your own choice."""

    query_id: str
    names: bytes = b""  #: 16 bytes each, concatenated
    num_sampled: int = 0  #: instead of names: so many of those that were stored of late


class IndexAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: each name, and who holds it as far as the router knows, nobody maybe."""

    query_id: str
    names: bytes
    holders: tuple[tuple[BlockHolder, ...], ...]
    out_of_step: tuple[str, ...] = ()  #: workers whose blocks the router does not know yet, nor says that it does


RouterQuestion: TypeAlias = ExplainPlacement | IndexQuestion | AskView
RouterAnswer: TypeAlias = PlacementExplained | IndexAnswer | ViewTold
