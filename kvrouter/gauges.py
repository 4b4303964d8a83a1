"""What the router shows to Prometheus by way of Ray, all of it from one place: names, labels, values. Pure.

Ray drops a gauge that is not set for some 20 s, so that all are set again every few seconds, changed or not, and what
is told of a worker that left is gone soon. Counters of others come as rates over the last period.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from messages.fleet import WorkerInfo
from messages.tier import Tier
from messages.view import ViewTold

PERIOD_S: Final = 5.0
NUM_PREFIXES: Final = 5  #: that are told, by rank: their names would be new series without end
_HOLDER: Final = ("holder", "role", "node")
_SOURCE: Final = 'kvray_prompt_tokens_total{source="'


class GaugeKind(NamedTuple):
    """What a gauge means, and its labels. Ray writes `ray_` before its name."""

    help: str
    labels: tuple[str, ...] = ()


class Sample(NamedTuple):
    """A gauge's value for some labels."""

    name: str
    labels: dict[str, str]
    value: float


GAUGES: Final = {
    "kvray_placement_held_bytes": GaugeKind(
        "Bytes of KV blocks that the router knows at a holder, by tier", (*_HOLDER, "tier")
    ),
    "kvray_placement_capacity_bytes": GaugeKind(
        "Bytes of KV blocks for which a holder has memory, by tier", (*_HOLDER, "tier")
    ),
    "kvray_placement_queue_seconds": GaugeKind("Seconds of prefill before a new prompt begins", _HOLDER),
    "kvray_placement_predicted_ttft_seconds": GaugeKind(
        "Predicted time to first token of 1,024 tokens that nobody holds, computed there", _HOLDER
    ),
    "kvray_placement_sequences_running": GaugeKind("Sequences in prefill or decode", _HOLDER),
    "kvray_placement_sequences_waiting": GaugeKind("Sequences that wait to be admitted, or were just placed", _HOLDER),
    "kvray_placement_free_blocks": GaugeKind("KV blocks that are free or may be evicted, less those promised", _HOLDER),
    "kvray_placement_out_of_step": GaugeKind("1 where the router waits for what a holder has, else 0", _HOLDER),
    "kvray_placement_prompt_tokens_per_second": GaugeKind(
        "Prompt tokens of answered requests in a second, by where their KV came from", ("source",)
    ),
    "kvray_placement_hot_prefix_requests": GaugeKind(
        "Requests that began with the hottest prefixes, each counting half every ten minutes", ("rank",)
    ),
    "kvray_placement_hot_prefix_tokens": GaugeKind("Tokens of the hottest prefixes", ("rank",)),
    "kvray_placement_hot_prefix_holders": GaugeKind(
        "Holders and tiers with the head of the hottest prefixes", ("rank",)
    ),
}


class Gauges:
    """Makes samples, one period after the other."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str], float] = {}  #: by ingress and source, a period ago
        self._at_s: float | None = None

    def samples(
        self,
        told: ViewTold,
        infos: Mapping[str, WorkerInfo],
        ingresses: Mapping[str, Mapping[str, float]],
        now_s: float,
    ) -> list[Sample]:
        """Return all values as of now. `ingresses`: what each counts, by metric name with labels, by ingress."""
        return [*_of_holders(told, infos), *self._of_sources(ingresses, now_s), *_of_prefixes(told)]

    def _of_sources(self, ingresses: Mapping[str, Mapping[str, float]], now_s: float) -> list[Sample]:
        before, before_s = self._tokens, self._at_s
        self._tokens, self._at_s = {}, now_s
        gained: dict[str, float] = {}
        for ingress, values in ingresses.items():
            for name, value in values.items():
                if name.startswith(_SOURCE):
                    source = name.removeprefix(_SOURCE).removesuffix('"}')
                    self._tokens[ingress, source] = value
                    # Of an ingress that was not heard before, what it counted so far is no news.
                    gain = max(0.0, value - before.get((ingress, source), value))
                    gained[source] = gained.get(source, 0.0) + gain
        if before_s is None or now_s <= before_s:
            return []
        name = "kvray_placement_prompt_tokens_per_second"
        return [Sample(name, {"source": source}, gain / (now_s - before_s)) for source, gain in gained.items()]


def _of_holders(told: ViewTold, infos: Mapping[str, WorkerInfo]) -> Iterator[Sample]:
    for holder in told.holders:
        info = infos.get(holder.worker_id)
        if info is None:
            continue
        labels = {"holder": holder.worker_id, "role": holder.role, "node": holder.node_id}
        memory: Tier = "host" if holder.role == "cache" else "device"
        for tier, blocks in {memory: 0, **holder.known_blocks}.items():
            if holder.role == "cache" and tier == "device":
                continue  # it has none: its snapshot begins with an empty one
            by_tier = {**labels, "tier": tier}
            yield Sample("kvray_placement_held_bytes", by_tier, float(blocks * info.block_bytes))
        yield Sample(
            "kvray_placement_capacity_bytes", {**labels, "tier": memory}, float(info.num_blocks * info.block_bytes)
        )
        yield Sample("kvray_placement_out_of_step", labels, float(not holder.is_in_step))
        if holder.role == "cache":
            continue
        yield Sample("kvray_placement_queue_seconds", labels, holder.queue_s)
        yield Sample("kvray_placement_sequences_running", labels, float(holder.num_running))
        yield Sample("kvray_placement_sequences_waiting", labels, float(holder.num_waiting + holder.num_promised))
        yield Sample("kvray_placement_free_blocks", labels, float(holder.free_blocks))
        if holder.ttft_s is not None:
            yield Sample("kvray_placement_predicted_ttft_seconds", labels, holder.ttft_s)


def _of_prefixes(told: ViewTold) -> Iterator[Sample]:
    for rank, prefix in enumerate(told.prefixes or (), 1):
        labels = {"rank": str(rank)}
        yield Sample("kvray_placement_hot_prefix_requests", labels, prefix.num_requests)
        yield Sample("kvray_placement_hot_prefix_tokens", labels, float(prefix.num_tokens))
        holders = float(len(prefix.runs[0].holders) if prefix.runs else 0)
        yield Sample("kvray_placement_hot_prefix_holders", labels, holders)
