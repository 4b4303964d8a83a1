"""What workers count, as Prometheus reads it."""

from __future__ import annotations

import re

import pytest

from cluster.fleet_metrics import HELP
from cluster.openai.exposition import NOT_DESCRIBED, families
from cluster.openai.metrics import HttpMetrics
from cluster.request_table import RequestLimits, RequestTable
from kvrouter.router import Router
from messages.route import RouteRequest
from nodecache.cache import CacheLimits, NodeCache
from nodecache.loopback import LoopbackStore
from tests.models import make_tiny_model
from tests.nodecache.blocks import checksum, pool_of
from tests.workers import running_pair, worker_options


def undescribed(*sources: dict[str, float]) -> list[str]:
    """Families without a help text."""
    return [family.name for family in families([({}, one) for one in sources], HELP) if family.help == NOT_DESCRIBED]


def test_names_keep_to_the_rules_of_prometheus():
    """As `promtool check metrics` has them."""
    kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in HELP}
    for family in HttpMetrics(tenants={}).registry.collect():
        kinds[family.name + "_total" * (family.type == "counter")] = family.type
        assert family.documentation
    for name, kind in kinds.items():
        assert re.fullmatch("kvray_[a-z_]+", name), name
        assert name.endswith("_total") == (kind == "counter"), name
        words = set(name.split("_"))
        assert not words & {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "m", "h", "d"}, name
        assert not words & {"milliseconds", "microseconds", "kilobytes", "gauge", "counter"}, name


def test_everything_that_a_node_cache_counts_is_described():
    cache = NodeCache(pool_of(4), {"disk": LoopbackStore(4, checksum)}, CacheLimits(lease_s=1.0))
    assert undescribed(cache.stats()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
async def test_everything_that_workers_and_the_router_count_is_described(tmp_path):
    model_dir = make_tiny_model(tmp_path)
    router = Router()
    router.on_event(RouteRequest(request_id="r", names=b"", num_prompt_tokens=1, max_tokens=1), 0.0)
    sources = [
        router.stats(),
        RequestTable(RequestLimits(request_timeout_s=1.0, lost_after_s=1.0, max_ttft_s=1.0)).stats(),
    ]
    async with running_pair(worker_options(model_dir), worker_options(model_dir)) as pair:
        (token_ids,) = await pair.ingress.finish(pair.ingress.send("r", list(range(5, 105))))
        sources += [worker._worker._stats("q").values for worker in (pair.prefill, pair.decode)]
    assert undescribed(*sources) == []
    names = {name.partition("{")[0] for values in sources for name in values}
    assert {"kvray_peers", "kvray_evictions_total", "kvray_process_resident_memory_bytes"} <= names
    generated = sum(values.get("kvray_generated_tokens_total", 0) for values in sources)
    assert generated == len(token_ids), "the first token, which prefill hands over, counts once"
