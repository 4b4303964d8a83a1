"""Counters and histograms of the HTTP surface, for Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.openai.exposition import Family, families, family_of, page, with_labels
from messages.request import GenerateRequest
from messages.stream import PromptPlan, PromptSources

_TTFT_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_ITL_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_LATENCY_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_TOKENS_BUCKETS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_RATIO_BUCKETS: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.35, 2, 4, 10)
SOURCES: Final = ("device", "host", "peer", "disk", "remote", "computed")
END_REASONS: Final = ("stop", "length", "refused", "error", "abandoned")  #: of choices

OTHER_TENANTS: Final = "other"  #: together, beyond those that are counted by name
NO_TENANT: Final = "none"  #: whoever has a key of no tenant, or needs none


class Histogram(Collector):
    """A histogram for one event loop.

    prometheus_client's own takes a lock and looks at all buckets each time: 3 us with a counter, a third of what a
    streamed token costs; this one takes 0.3 us.
    """

    def __init__(self, name: str, help_text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """Count from now on. `bounds`: of the buckets, ascending; the last bucket has none."""
        self._name = name
        self._help = help_text
        self._bounds = bounds
        self._shown_bounds = [*map(floatToGoString, bounds), "+Inf"]
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the family; the registry calls this."""
        family = HistogramMetricFamily(self._name, self._help)
        family.add_metric([], list(zip(self._shown_bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class Clock(Protocol):
    """Follows one generation request. `end` and then `close` come once each, and last."""

    def first(self, choice: int, sources: PromptSources, plan: PromptPlan | None) -> None:
        """Note that a choice's worker told about its prompt, with its first token."""
        ...

    def chunk(self, choice: int, num_tokens: int) -> None:
        """Note that `num_tokens` tokens of `choice` arrived now."""
        ...

    def finish(self, choice: int, reason: str) -> None:
        """Note that a choice ended for `reason`."""
        ...

    def end(self, reason: str) -> None:
        """Note that the request ended; choices still open ended for `reason`."""
        ...

    def close(self) -> None:
        """Note that it is answered."""
        ...


class HttpMetrics:
    """What one ingress counts, in a registry of its own, so that several can live in a process.

    A page shows several ingresses: the own numbers get the label `ingress` where it has a name.
    """

    def __init__(
        self, ingress: str = "", *, tenants: Mapping[int, str] | None = None, is_counting: bool = True
    ) -> None:
        """Count from now on.

        Args:
            ingress: its name.
            tenants: whom to count apart, by the label that each one gets, several perhaps the same one; whoever is not
                in it gets NO_TENANT. None: tenants are not counted.
            is_counting: whether to count at all.
        """
        self._labels = {"ingress": ingress} if ingress else {}
        self.is_counting = is_counting
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
        self.generation_tokens = TokenCount(registry)
        self.gaps = Histogram(
            "kvray_inter_token_latency_seconds", "Between a choice's chunks", _ITL_BUCKETS_S, registry
        )
        self.times = RequestTimes(registry)
        self.tenants = None if tenants is None else TenantCounts(tenants, registry)
        # There at 0, so that whoever watches them sees the first time, too.
        for source in SOURCES:
            self.prompt_tokens.labels(source)
        for reason in END_REASONS:
            self.finished.labels(reason)

    def clock(self, requests: Sequence[GenerateRequest]) -> Clock:
        """Begin to follow one generation request, of which `requests` are the choices."""
        return RequestClock(self, requests) if self.is_counting else _Uncounted()

    def count_http(self, endpoint: str, status: int, *, has_left: bool) -> None:
        """Count an HTTP request that was answered, or whose client left."""
        if self.is_counting:
            self.http_requests.labels(endpoint, str(status)).inc()
            if has_left:
                self.disconnects.inc()

    def values(self) -> dict[str, float]:
        """Return the samples by name with labels, as `messages.fleet.Stats` has them."""
        if not self.is_counting:
            return {}
        return {
            with_labels(sample.name, **sample.labels) if sample.labels else sample.name: float(sample.value)
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def help_texts(self) -> dict[str, str]:
        """Return what each family means, by its name."""
        return {
            family.name + "_total" * (family.type == "counter"): family.documentation
            for family in self.registry.collect()
        }

    def text(self, more: Iterable[Family]) -> bytes:
        """Return the surface's families and `more` in the Prometheus text format, each family once.

        Families of which nothing was counted yet are there without samples.
        """
        help_texts = self.help_texts()
        own = families([(self._labels, self.values())], help_texts)
        empty = [family_of(name, help_texts) for name in sorted(help_texts.keys() - {family.name for family in own})]
        return page([*own, *empty, *more])


class TokenCount(Collector):
    """How many tokens were generated. One event loop; prometheus_client's own counter takes a lock for each chunk."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_tokens = 0
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the family; the registry calls this."""
        tokens = CounterMetricFamily("kvray_generation_tokens", "Tokens generated for clients")
        tokens.add_metric([], self.num_tokens)
        yield tokens


class RequestTimes:
    """How long requests and their choices took, and how long they were, one histogram for each."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, help_text: str, bounds: Sequence[float]) -> Histogram:
            return Histogram(name, help_text, bounds, registry)

        self.first_token = histogram("kvray_time_to_first_token_seconds", "To the first token", _TTFT_BUCKETS_S)
        self.predicted = histogram(
            "kvray_predicted_time_to_first_token_seconds",
            "To the first token, as predicted when requests were placed",
            _TTFT_BUCKETS_S,
        )
        self.ratio = histogram(
            "kvray_time_to_first_token_ratio", "Time to the first token, of what was predicted", _RATIO_BUCKETS
        )
        self.whole = histogram("kvray_request_latency_seconds", "From request to last token", _LATENCY_BUCKETS_S)
        self.queue = histogram(
            "kvray_request_queue_time_seconds",
            "From a choice's arrival at its decode worker until it was admitted there",
            _TTFT_BUCKETS_S,
        )
        self.prefill = histogram(
            "kvray_request_prefill_time_seconds",
            "From a choice's admission at its decode worker to its first token, whoever computed or brought the prompt",
            _TTFT_BUCKETS_S,
        )
        self.decode = histogram(
            "kvray_request_decode_time_seconds", "From a choice's first token to its last", _LATENCY_BUCKETS_S
        )
        self.inference = histogram(
            "kvray_request_inference_time_seconds",
            "From a choice's admission at its decode worker to its last token",
            _LATENCY_BUCKETS_S,
        )
        self.per_token = histogram(
            "kvray_request_time_per_output_token_seconds",
            "A choice's mean time between tokens, after the first",
            _ITL_BUCKETS_S,
        )
        self.prompt = histogram("kvray_request_prompt_tokens", "Prompt tokens of a choice", _TOKENS_BUCKETS)
        self.output = histogram("kvray_request_generation_tokens", "Generated tokens of a choice", _TOKENS_BUCKETS)


class TenantCounts:
    """What tenants asked for, by so many labels as there are tenants to be told apart, and two more."""

    def __init__(self, labels: Mapping[int, str], registry: CollectorRegistry) -> None:
        self._labels = labels
        self._requests = Counter(
            "kvray_tenant_requests_total", "Generation requests by tenant", ["tenant"], registry=registry
        )
        self._prompt_tokens = Counter(
            "kvray_tenant_prompt_tokens_total",
            "Prompt tokens of answered requests by tenant, and by where their KV came from",
            ["tenant", "source"],
            registry=registry,
        )
        self._generation_tokens = Counter(
            "kvray_tenant_generation_tokens_total",
            "Tokens of ended choices by tenant",
            ["tenant"],
            registry=registry,
        )

    def count_request(self, tenant: int) -> None:
        """Count a generation request."""
        self._requests.labels(self._label(tenant)).inc()

    def count_prompt(self, tenant: int, source: str, num_tokens: int) -> None:
        """Count prompt tokens whose KV came from `source`."""
        self._prompt_tokens.labels(self._label(tenant), source).inc(num_tokens)

    def count_output(self, tenant: int, num_tokens: int) -> None:
        """Count the tokens of a choice that ended."""
        self._generation_tokens.labels(self._label(tenant)).inc(num_tokens)

    def _label(self, tenant: int) -> str:
        return self._labels.get(tenant, NO_TENANT)


def tenant_labels(names: Mapping[int, str], num_apart: int) -> dict[int, str] | None:
    """Return the label of each tenant: the name for the first `num_apart`, else OTHER_TENANTS; None where it is 0."""
    if num_apart == 0:
        return None
    return {tenant: name if place < num_apart else OTHER_TENANTS for place, (tenant, name) in enumerate(names.items())}


class RequestClock:
    """A `Clock` that counts."""

    def __init__(self, metrics: HttpMetrics, requests: Sequence[GenerateRequest]) -> None:
        self._metrics = metrics
        self._requests = requests
        self._started_s = time.perf_counter()
        self._first_s = [0.0] * len(requests)
        self._last_s = [0.0] * len(requests)
        self._num_tokens = [0] * len(requests)
        self._plans: dict[int, PromptPlan] = {}
        self._is_first = True
        self._is_open = [True] * len(requests)
        metrics.running.inc()
        if metrics.tenants is not None:
            metrics.tenants.count_request(requests[0].tenant)

    def first(self, choice: int, sources: PromptSources, plan: PromptPlan | None) -> None:
        """As `Clock.first`."""
        if plan is not None:
            self._plans[choice] = plan
        for name in SOURCES:
            num_tokens = getattr(sources, name)
            if num_tokens:
                self._metrics.prompt_tokens.labels(name).inc(num_tokens)
                if self._metrics.tenants is not None:
                    self._metrics.tenants.count_prompt(self._requests[choice].tenant, name, num_tokens)

    def chunk(self, choice: int, num_tokens: int) -> None:
        """As `Clock.chunk`."""
        now_s = time.perf_counter()
        if self._is_first:
            self._is_first = False
            self._observe_first(choice, now_s - self._started_s)
        if num_tokens > 0:
            self._metrics.generation_tokens.num_tokens += num_tokens
            self._num_tokens[choice] += num_tokens
            last_s = self._last_s[choice]
            if last_s:
                self._metrics.gaps.observe(now_s - last_s)
            else:
                self._first_s[choice] = now_s
            self._last_s[choice] = now_s

    def _observe_first(self, choice: int, ttft_s: float) -> None:
        times = self._metrics.times
        times.first_token.observe(ttft_s)
        plan = self._plans.get(choice)
        if plan is not None and plan.predicted_ttft_s > 0:
            times.predicted.observe(plan.predicted_ttft_s)
            times.ratio.observe(ttft_s / plan.predicted_ttft_s)

    def finish(self, choice: int, reason: str) -> None:
        """As `Clock.finish`."""
        self._count_end(choice, reason)
        times, num_tokens = self._metrics.times, self._num_tokens[choice]
        decode_s = self._last_s[choice] - self._first_s[choice]
        times.prompt.observe(self._requests[choice].num_prompt_tokens)
        times.output.observe(num_tokens)
        times.decode.observe(decode_s)
        if num_tokens > 1:
            times.per_token.observe(decode_s / (num_tokens - 1))
        plan = self._plans.get(choice)
        if plan is not None:
            times.queue.observe(plan.queued_s)
            times.prefill.observe(plan.prefill_s)
            times.inference.observe(plan.prefill_s + decode_s)

    def end(self, reason: str) -> None:
        """As `Clock.end`."""
        if not any(self._is_open):
            self._metrics.times.whole.observe(time.perf_counter() - self._started_s)
        for choice, is_open in enumerate(self._is_open):
            if is_open:
                self._count_end(choice, reason)

    def close(self) -> None:
        """As `Clock.close`."""
        self._metrics.running.dec()

    def _count_end(self, choice: int, reason: str) -> None:
        self._is_open[choice] = False
        self._metrics.finished.labels(reason).inc()
        if self._metrics.tenants is not None:
            self._metrics.tenants.count_output(self._requests[choice].tenant, self._num_tokens[choice])


class _Uncounted:
    """A `Clock` that counts nothing."""

    def first(self, choice: int, sources: PromptSources, plan: PromptPlan | None) -> None:
        """As `Clock.first`."""

    def chunk(self, choice: int, num_tokens: int) -> None:
        """As `Clock.chunk`."""

    def finish(self, choice: int, reason: str) -> None:
        """As `Clock.finish`."""

    def end(self, reason: str) -> None:
        """As `Clock.end`."""

    def close(self) -> None:
        """As `Clock.close`."""
