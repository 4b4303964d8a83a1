"""What the placement page shows, as one JSON document: gathered when somebody looks, and never else.

Counters are since the processes began; the page makes rates of them itself, so that nothing is kept here of who looks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from cluster.cache_stats import owner_stats, seen_by
from cluster.openai.cache_protocol import NODE_TIERS, OwnerStats, TenantStats, TierStats
from cluster.openai.exposition import labels_of
from kvcache.names import NAME_BYTES
from messages.fleet import RoadStatus, Stats, WorkerInfo
from messages.tier import Tier
from messages.view import HolderView, PrefixView, ViewTold

_SUMMED: Final = ("kvray_requests_running", "kvray_requests_moved_total", "kvray_client_disconnects_total")
#: A client's id, random digits, the number of the choice; behind it, of a request that moved, how often.
_SEQUENCE_ID: Final = re.compile(r"(.*)-[0-9a-f]{8}-\d+(#\d+)?")
_TTFT: Final = "kvray_time_to_first_token_seconds"


class TierRow(msgspec.Struct, frozen=True, kw_only=True):
    """A tier of an owner. None: not known, or it has no such limit."""

    blocks: int | None  #: that its owner holds
    known_blocks: int | None  #: that the router believes to be there
    bytes: int | None
    capacity_bytes: int | None
    hits: int | None
    evictions: int | None


class RoadRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker pulled over one road."""

    bytes: float = 0.0
    seconds: float = 0.0
    failed: float = 0.0


class OwnerRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker or node cache."""

    worker_id: str
    role: str
    node: str
    is_answering: bool  #: with its numbers
    is_in_step: bool | None = None  #: as the router sees it; None: the router does not know it
    tiers: dict[Tier, TierRow] = {}
    tenants: dict[str, dict[Tier, TenantStats]] = {}
    running: int | None = None
    waiting: int | None = None
    promised: int | None = None  #: placed there, and not reported yet
    free_blocks: int | None = None
    num_blocks: int | None = None
    queue_s: float | None = None  #: of prefill before a new prompt begins
    ttft_s: float | None = None  #: predicted for a prompt of `nominal_tokens` that nobody holds
    decode_step_s: float | None = None
    spare_blocks: int | None = None  #: copies that others keep
    roads: dict[str, RoadRow] = {}
    rejected_blocks: float = 0.0  #: pulled, and not used: damaged, late, or of others


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [begin, end) of a prefix have these holders."""

    begin: int
    end: int
    holders: list[tuple[str, Tier]]


class PrefixRow(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of prompts."""

    name: str  #: of its last block, hexadecimal
    num_tokens: int
    num_requests: float  #: lately
    age_s: float
    last_request: str
    tenant: str
    text: str | None  #: a preview; None: none is kept
    runs: list[RunRow]


class PageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the page shows but for requests and their explanations, which have endpoints of their own."""

    made_s: float  #: seconds since 1970
    model: str
    tenant: str  #: whose part this is; "": everything
    has_router: bool
    nominal_tokens: int
    has_previews: bool
    owners: list[OwnerRow]
    prompt_tokens: dict[str, float]  #: of answered requests, by where their KV came from
    ttft_count: float  #: of all answered requests
    ttft_sum_s: float
    placed: dict[str, float]  #: requests, by who chose
    counts: dict[str, float]  #: others of ingresses and the router, by metric name
    counts_prefixes: bool
    prefixes: list[PrefixRow]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a document is made of beside numbers."""

    made_s: float
    model: str
    tenant: str | None  #: None: an operator looks
    tenant_names: Mapping[int, str]
    has_previews: bool


def page_document(
    facts: Facts,
    fleet: Sequence[WorkerInfo],
    told: Sequence[Stats],
    ingresses: Sequence[Mapping[str, float]],
    view: ViewTold | None,
    texts: Mapping[bytes, str],
) -> PageDocument:
    """Make the document.

    Args:
        facts: of the deployment, and of who looks: a tenant sees only what is its own.
        fleet: the workers that are there.
        told: what they, the router and node caches told.
        ingresses: what each ingress counts, by metric name with labels.
        view: what the router knows; None: it does not answer.
        texts: previews of prefixes, by name.
    """
    block_sizes = [info.block_size for info in fleet]
    is_operator = facts.tenant is None
    owners = _owner_rows(fleet, told, view) if is_operator else _own_rows(facts.tenant or "", fleet, told)
    counted = ingresses if is_operator else ()
    router = next((stats.values for stats in told if stats.role == "router"), {}) if is_operator else {}
    return PageDocument(
        made_s=facts.made_s,
        model=facts.model,
        tenant=facts.tenant or "",
        has_router=view is not None,
        nominal_tokens=view.nominal_tokens if view else 0,
        has_previews=facts.has_previews,
        owners=owners,
        prompt_tokens=_by_label(counted, "kvray_prompt_tokens_total", "source"),
        ttft_count=_sum(counted, f"{_TTFT}_count"),
        ttft_sum_s=_sum(counted, f"{_TTFT}_sum"),
        placed=_by_label(counted, "kvray_requests_placed_total", "by"),
        counts={name: _sum(counted, name) for name in _SUMMED if is_operator}
        | {name: value for name, value in router.items() if "kept_share" not in name},
        counts_prefixes=view is not None and view.prefixes is not None,
        prefixes=[
            _prefix_row(prefix, block_sizes[0] if block_sizes else 1, facts.tenant_names, texts.get(prefix.name))
            for prefix in ((view.prefixes if view else None) or ())
        ],
    )


def _owner_rows(fleet: Sequence[WorkerInfo], told: Sequence[Stats], view: ViewTold | None) -> list[OwnerRow]:
    stats = {one.worker_id: one for one in told}
    known = {holder.worker_id: holder for holder in (view.holders if view else ())}
    workers = [
        _owner_row(
            owner_stats(info, stats[info.worker_id].values if info.worker_id in stats else None, ("device",)),
            info,
            stats[info.worker_id].values if info.worker_id in stats else {},
            stats[info.worker_id].roads if info.worker_id in stats else (),
            known.get(info.worker_id),
        )
        for info in sorted(fleet, key=lambda info: (info.node_id, info.role, info.worker_id))
    ]
    caches = [
        _owner_row(
            owner_stats(cache.info, cache.values, NODE_TIERS),
            cache.info,
            cache.values,
            (),
            known.get(cache.info.worker_id),
        )
        for one in told
        for cache in one.caches
    ]
    return workers + caches


def _own_rows(tenant: str, fleet: Sequence[WorkerInfo], told: Sequence[Stats]) -> list[OwnerRow]:
    """Return what a tenant's own blocks take, owner by owner; who has none of them is left out."""
    stats = {one.worker_id: one.values for one in told}
    owners = [owner_stats(info, stats.get(info.worker_id), ("device",)) for info in fleet]
    owners += [owner_stats(cache.info, cache.values, NODE_TIERS) for one in told for cache in one.caches]
    seen = (seen_by(tenant, owner) for owner in owners)
    return [
        OwnerRow(
            worker_id=owner.worker_id,
            role=owner.role,
            node=owner.node,
            is_answering=owner.is_answering,
            tenants=owner.tenants,
        )
        for owner in seen
        if owner.tenants
    ]


def _owner_row(
    owner: OwnerStats,
    info: WorkerInfo,
    values: Mapping[str, float],
    roads: Sequence[RoadStatus],
    known: HolderView | None,
) -> OwnerRow:
    is_worker = info.role != "cache"
    return OwnerRow(
        worker_id=owner.worker_id,
        role=owner.role,
        node=owner.node,
        is_answering=owner.is_answering,
        is_in_step=known.is_in_step if known else None,
        tiers={
            tier: _tier_row(one, known.known_blocks.get(tier, 0) if known else None)
            for tier, one in owner.tiers.items()
        },
        tenants=owner.tenants,
        running=known.num_running if known and is_worker else None,
        waiting=known.num_waiting if known and is_worker else None,
        promised=known.num_promised if known and is_worker else None,
        free_blocks=_whole(values.get("kvray_blocks_free")) if is_worker else None,
        num_blocks=info.num_blocks,
        queue_s=known.queue_s if known and is_worker else None,
        ttft_s=known.ttft_s if known else None,
        decode_step_s=values.get("kvray_decode_step_seconds"),
        spare_blocks=known.num_spare if known and is_worker else None,
        roads=_road_rows(values, roads),
        rejected_blocks=_sum([values], "kvray_blocks_rejected_total"),
    )


def _tier_row(tier: TierStats, known_blocks: int | None) -> TierRow:
    return TierRow(
        blocks=tier.blocks,
        known_blocks=known_blocks,
        bytes=tier.bytes,
        capacity_bytes=tier.capacity_bytes,
        hits=tier.hits,
        evictions=tier.evictions,
    )


def _road_rows(values: Mapping[str, float], roads: Sequence[RoadStatus]) -> dict[str, RoadRow]:
    """Return what came over each road that is in use or was."""
    names = {road.road for road in roads if road.road}
    found = {
        what: _by_label([values], f"kvray_transfer{metric}_total", "road")
        for what, metric in (("bytes", "_bytes"), ("seconds", "_seconds"), ("failed", "s_failed"))
    }
    names |= {name for one in found.values() for name in one}
    return {name: RoadRow(**{what: one.get(name, 0.0) for what, one in found.items()}) for name in sorted(names)}


def _prefix_row(prefix: PrefixView, block_size: int, names: Mapping[int, str], text: str | None) -> PrefixRow:
    assert len(prefix.name) == NAME_BYTES
    size = prefix.num_tokens // prefix.num_blocks if prefix.num_blocks else block_size
    return PrefixRow(
        name=prefix.name.hex(),
        num_tokens=prefix.num_tokens,
        num_requests=prefix.num_requests,
        age_s=prefix.age_s,
        last_request=client_id(prefix.last_request),
        tenant=names.get(prefix.tenant, ""),
        text=text,
        runs=[
            RunRow(
                begin=run.begin * size,
                end=run.end * size,
                holders=[(holder.worker_id, holder.tier) for holder in run.holders],
            )
            for run in prefix.runs
        ],
    )


def client_id(sequence_id: str) -> str:
    """Return the id by which a client knows the request that a sequence is of."""
    found = _SEQUENCE_ID.fullmatch(sequence_id)
    return found[1] if found else sequence_id


def _by_label(sources: Iterable[Mapping[str, float]], name: str, label: str) -> dict[str, float]:
    """Add up a metric by the values of one of its labels."""
    found: dict[str, float] = {}
    for values in sources:
        for full_name, value in values.items():
            if full_name.startswith(name + "{"):
                key = labels_of(full_name).get(label, "")
                found[key] = found.get(key, 0.0) + value
    return found


def _sum(sources: Iterable[Mapping[str, float]], name: str) -> float:
    """Add up a metric over all of its labels."""
    return sum(
        value
        for values in sources
        for full_name, value in values.items()
        if full_name == name or full_name.startswith(name + "{")
    )


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)
