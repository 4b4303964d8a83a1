"""What workers count, as Prometheus reads it."""

from __future__ import annotations

import re

import pytest
from prometheus_client.core import Metric

from cluster.fleet_metrics import HELP, families
from cluster.openai.metrics import HttpMetrics
from cluster.request_table import RequestLimits, RequestTable
from kvrouter.router import Router
from messages.route import RouteRequest
from nodecache.cache import CacheLimits, NodeCache
from nodecache.loopback import LoopbackStore
from tests.models import make_tiny_model
from tests.nodecache.blocks import checksum, pool_of
from tests.workers import running_pair, worker_options


def told(found: list[Metric]) -> list[tuple[str, str, dict[str, str], float]]:
    return [(sample.name, family.type, sample.labels, sample.value) for family in found for sample in family.samples]


def test_numbers_keep_their_names_and_labels_and_get_those_of_who_tells_them():
    found = families(
        [
            ({"worker": "d1"}, {"kvray_blocks": 7.0, 'kvray_transfer_bytes_total{road="shm"}': 3.0}),
            ({"worker": "d2"}, {'kvray_transfer_bytes_total{road="ucx"}': 4.0}),
        ]
    )
    assert told(found) == [
        ("kvray_blocks", "gauge", {"worker": "d1"}, 7.0),
        ("kvray_transfer_bytes_total", "counter", {"worker": "d1", "road": "shm"}, 3.0),
        ("kvray_transfer_bytes_total", "counter", {"worker": "d2", "road": "ucx"}, 4.0),
    ]
    assert [family.documentation for family in found] == [HELP["kvray_blocks"], HELP["kvray_transfer_bytes_total"]]


def test_several_labels_are_told_apart_whatever_stands_in_them():
    name = 'kvray_road_bytes_per_second{peer="tcp://[::1]:5",road="ucx",carriers="tcp, cuda_ipc"}'
    (one,) = told(families([({}, {name: 1.0})]))
    assert one[2] == {"peer": "tcp://[::1]:5", "road": "ucx", "carriers": "tcp, cuda_ipc"}


def test_parts_of_a_histogram_are_one_family_and_of_one_name_all_are_whatever_their_labels():
    found = families(
        [
            (
                {"ingress": "a"},
                {'kvray_x_seconds_bucket{le="1"}': 2.0, "kvray_x_seconds_sum": 3.0, "kvray_blocks": 4.0},
            ),
            ({"worker": "b", "role": "decode"}, {"kvray_blocks": 5.0}),
        ]
    )
    assert [(family.name, family.type, len(family.samples)) for family in found] == [
        ("kvray_x_seconds", "histogram", 2),
        ("kvray_blocks", "gauge", 2),
    ]


def test_names_keep_to_the_rules_of_prometheus():
    """As `promtool check metrics` has them."""
    kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in HELP}
    for family in HttpMetrics().registry.collect():
        kinds[family.name + "_total" * (family.type == "counter")] = family.type
        assert family.documentation
    for name, kind in kinds.items():
        assert re.fullmatch("kvray_[a-z_]+", name), name
        assert name.endswith("_total") == (kind == "counter"), name
        words = set(name.split("_"))
        assert not words & {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "m", "h", "d"}, name
        assert not words & {"milliseconds", "microseconds", "kilobytes", "gauge", "counter"}, name


def test_a_name_that_nobody_described_is_told_all_the_same():
    (family,) = families([({}, {"kvray_new": 1.0})])
    assert (family.name, family.documentation) == ("kvray_new", "Not described")


def test_everything_that_a_node_cache_counts_is_described():
    cache = NodeCache(pool_of(4), {"disk": LoopbackStore(4, checksum)}, CacheLimits(lease_s=1.0))
    assert {name.partition("{")[0] for name in cache.stats()} <= HELP.keys()


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
    names = {name.partition("{")[0] for values in sources for name in values}
    assert "kvray_road_bytes_per_second" in names
    assert names <= HELP.keys()
    generated = sum(values.get("kvray_generated_tokens_total", 0) for values in sources)
    assert generated == len(token_ids), "the first token, which prefill hands over, counts once"
