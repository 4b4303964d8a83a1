"""What was priced for the requests that were placed last, kept so that it can be told when somebody asks.

Keeping it costs a reference: the arrays that the decision was made from. What is made of them for people, when asked.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from kvrouter.candidate import Candidate
from kvrouter.policy import Pricing
from messages.explain import PlacementExplained, PricedPlacement

#: Placements of one request that are told: the chosen one, and the next best.
_TOLD = 8
#: Workers priced of all requests that are kept, about 100 bytes each: of a large fleet fewer requests are kept.
_MAX_PRICED = 1 << 18


class _Kept(NamedTuple):
    pricing: Pricing
    chosen: Candidate
    num_priced: int  #: workers


class Explanations:
    """What was priced for the last requests, `max_requests` of them at most."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._num_priced = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, request_id: str, pricing: Pricing, chosen: Candidate) -> None:
        """Keep what a request was placed by; the oldest ones make room."""
        if self._max_requests <= 0:
            return
        self._forget(request_id)
        self._kept[request_id] = _Kept(pricing, chosen, pricing.num_priced)
        self._num_priced += pricing.num_priced
        while len(self._kept) > self._max_requests or (self._num_priced > _MAX_PRICED and len(self._kept) > 1):
            self._forget(next(iter(self._kept)))

    def explained(self, query_id: str, request_id: str) -> PlacementExplained:
        """Say what a request was placed by; nothing where it is not kept, or not any more."""
        kept = self._kept.get(request_id)
        if kept is None:
            return PlacementExplained(query_id=query_id)
        return explained(query_id, kept.pricing, kept.chosen)

    def _forget(self, request_id: str) -> None:
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            self._num_priced -= kept.num_priced


def explained(query_id: str, pricing: Pricing, chosen: Candidate) -> PlacementExplained:
    """Write a decision for people: the chosen placement, and the next best ones."""
    others = [one for one in pricing.few(_TOLD) if _workers(one) != _workers(chosen)]
    told = sorted([chosen, *others[: _TOLD - 1]], key=lambda one: one.cost_s)
    return PlacementExplained(
        query_id=query_id,
        placements=tuple(_priced(pricing, one, is_chosen=one is chosen) for one in told),
        num_possible=pricing.num_possible,
    )


def _workers(placed: Candidate) -> tuple[str, str | None]:
    return placed.decode.info.worker_id, placed.prefill.info.worker_id if placed.prefill else None


def _priced(pricing: Pricing, placed: Candidate, *, is_chosen: bool) -> PricedPlacement:
    decode_worker, prefill_worker = _workers(placed)
    return PricedPlacement(
        decode_worker=decode_worker,
        prefill_worker=prefill_worker,
        cost_s=placed.cost_s,
        ttft_s=placed.ttft_s,
        wait_s=placed.wait_s,
        load_s=placed.load_s,
        queue_s=placed.queue_s,
        compute_s=placed.compute_s,
        handoff_s=placed.pull_s,
        crowding_s=placed.harm_s,
        displaced_s=placed.displaced_s,
        matched_tokens=pricing.matched_tokens(placed),
        num_computed_tokens=placed.num_computed_tokens,
        is_chosen=is_chosen,
    )
