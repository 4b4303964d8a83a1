"""Counters and histograms of the HTTP surface, for Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from messages.stream import PromptSources

_TTFT_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_ITL_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_LATENCY_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
SOURCES: Final = ("device", "host", "peer", "disk", "remote", "computed")


class HttpMetrics:
    """What one ingress counts, in a registry of its own, so that several can live in a process.

    A page shows several ingresses: the own numbers get the label `ingress` where it has a name.
    """

    def __init__(self, ingress: str = "") -> None:
        self._labels = {"ingress": ingress} if ingress else {}
        self.registry = CollectorRegistry()
        registry = self.registry
        self.http_requests = Counter(
            "kvray_http_requests_total",
            "HTTP requests",
            ["endpoint", "status"],
            registry=registry,
        )
        self.disconnects = Counter(
            "kvray_client_disconnects_total", "Requests whose client left before the end", registry=registry
        )
        self.connections_ended = Counter(
            "kvray_connections_ended_total",
            "Connections that were ended because the client was beyond a limit, by which",
            ["reason"],
            registry=registry,
        )
        self.running = Gauge("kvray_requests_running", "Generation requests not yet answered", registry=registry)
        self.finished = Counter(
            "kvray_choices_finished_total",
            "Choices by how they ended",
            ["reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "kvray_prompt_tokens_total",
            "Prompt tokens of answered requests, by where their KV came from",
            ["source"],
            registry=registry,
        )
        self.chunks = ChunkCounts()
        registry.register(self.chunks)
        self.time_to_first_token = Histogram(
            "kvray_time_to_first_token_seconds",
            "To the first token",
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self.request_latency = Histogram(
            "kvray_request_latency_seconds", "From request to last token", buckets=_LATENCY_BUCKETS_S, registry=registry
        )
        for source in SOURCES:
            self.prompt_tokens.labels(source)

    def values(self) -> dict[str, float]:
        """Return the samples by name with labels, as `messages.fleet.Stats` has them."""
        return {
            sample.name + (_written(sample.labels) if sample.labels else ""): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def text(self, more: Iterable[Metric]) -> bytes:
        """Return the surface's families and `more` in the Prometheus text format, each family once."""
        page = CollectorRegistry()
        page.register(_Merged([*self._labelled(), *more]))
        return generate_latest(page)

    def _labelled(self) -> Iterator[Metric]:
        for family in self.registry.collect():
            own = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    own.add_sample(sample.name, {**self._labels, **sample.labels}, sample.value)
            yield own


def _written(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


class _Merged(Collector):
    """Families as they were given, those of one name as one: the first one's help and type, all samples."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families: dict[str, Metric] = {}
        for family in families:
            merged = self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += family.samples

    def collect(self) -> Iterable[Metric]:
        """Yield the families; the registry calls this."""
        return self._families.values()


class ChunkCounts(Collector):
    """What is counted for every chunk: tokens, and the time since the choice's last one. One event loop.

    prometheus_client's own classes take a lock and look at all buckets each time: 3 us for both, a third of what a
    streamed token costs; these take 0.3 us.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._gaps = [0] * (len(_ITL_BUCKETS_S) + 1)  #: chunks by bucket; the last one has no bound
        self._gaps_s = 0.0

    def add(self, num_tokens: int, gap_s: float) -> None:
        """Count a chunk that came so long after the one before it; 0: it is the first."""
        self.num_tokens += num_tokens
        if gap_s > 0:
            self._gaps[bisect_left(_ITL_BUCKETS_S, gap_s)] += 1
            self._gaps_s += gap_s

    def collect(self) -> Iterator[Metric]:
        """Yield the families; the registry calls this."""
        tokens = CounterMetricFamily("kvray_generation_tokens", "Tokens generated for clients")
        tokens.add_metric([], self.num_tokens)
        yield tokens
        bounds = [*map(floatToGoString, _ITL_BUCKETS_S), "+Inf"]
        buckets: Sequence[tuple[str, float]] = list(zip(bounds, accumulate(self._gaps), strict=True))
        gaps = HistogramMetricFamily("kvray_inter_token_latency_seconds", "Between a choice's chunks")
        gaps.add_metric([], buckets, self._gaps_s)
        yield gaps


class RequestClock:
    """Times one generation request with `num_choices` choices. `end` must be called, once."""

    def __init__(self, metrics: HttpMetrics, num_choices: int) -> None:
        self._metrics = metrics
        self._started_s = time.perf_counter()
        self._last_s = [0.0] * num_choices
        self._is_first = True
        self._num_open = num_choices

    def chunk(self, choice: int, num_tokens: int) -> None:
        """Note that `num_tokens` tokens of `choice` arrived now."""
        now_s = time.perf_counter()
        if self._is_first:
            self._is_first = False
            self._metrics.time_to_first_token.observe(now_s - self._started_s)
        if num_tokens > 0:
            self._metrics.chunks.add(num_tokens, now_s - (self._last_s[choice] or now_s))
            self._last_s[choice] = now_s

    def sources(self, sources: PromptSources) -> None:
        """Count where a sequence's prompt came from."""
        for name in SOURCES:
            num_tokens = getattr(sources, name)
            if num_tokens:
                self._metrics.prompt_tokens.labels(name).inc(num_tokens)

    def finish(self, reason: str) -> None:
        """Count a choice that ended for `reason`."""
        self._num_open -= 1
        self._metrics.finished.labels(reason).inc()

    def end(self, reason: str) -> None:
        """End the request; choices still open ended for `reason`."""
        if self._num_open:
            self._metrics.finished.labels(reason).inc(self._num_open)
        else:
            self._metrics.request_latency.observe(time.perf_counter() - self._started_s)
