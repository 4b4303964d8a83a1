import math

from kvrouter.gauges import GAUGES, Gauges
from messages.cache import BlockHolder, KnownRun
from messages.view import HolderView, PrefixView, ViewTold
from tests.kvrouter.test_router import info

INFOS = {"d": info("d", num_blocks=100, block_bytes=10), "c": info("c", "cache", num_blocks=50, block_bytes=10)}


def told(**changes) -> ViewTold:
    holders = (
        HolderView(
            worker_id="d", role="decode", node_id="n1", is_in_step=True, known_blocks={"device": 20}, num_running=2,
            num_waiting=1, num_promised=3, free_blocks=80, queue_s=1.5, ttft_s=2.5,
        ),
        HolderView(
            worker_id="c", role="cache", node_id="n1", is_in_step=False,
            known_blocks={"device": 0, "host": 5, "disk": 7},
        ),
    )  # fmt: skip
    run = KnownRun(0, 4, (BlockHolder("d", "device"), BlockHolder("c", "disk")))
    prefix = PrefixView(
        name=bytes(16),
        num_blocks=4,
        num_tokens=64,
        num_requests=9.5,
        age_s=0.0,
        last_request="r",
        tenant=0,
        runs=(run,),
    )
    return ViewTold(**({"query_id": "", "nominal_tokens": 1024, "holders": holders, "prefixes": (prefix,)} | changes))


def shown(samples) -> dict:
    return {(one.name.removeprefix("kvray_placement_"), *one.labels.values()): one.value for one in samples}


def tokens(**by_source) -> dict[str, float]:
    return {f'kvray_prompt_tokens_total{{source="{source}"}}': count for source, count in by_source.items()}


def test_each_holder_tells_what_it_has_and_how_busy_it_is():
    values = shown(Gauges().samples(told(), INFOS, {}, 0.0))
    assert values["held_bytes", "d", "decode", "n1", "device"] == 200
    assert values["capacity_bytes", "d", "decode", "n1", "device"] == 1000
    assert values["held_bytes", "c", "cache", "n1", "disk"] == 70
    assert values["capacity_bytes", "c", "cache", "n1", "host"] == 500
    assert ("held_bytes", "c", "cache", "n1", "device") not in values
    assert ("queue_seconds", "c", "cache", "n1") not in values
    assert values["queue_seconds", "d", "decode", "n1"] == 1.5
    assert values["predicted_ttft_seconds", "d", "decode", "n1"] == 2.5
    assert values["sequences_waiting", "d", "decode", "n1"] == 4
    assert [values["out_of_step", *rest] for rest in (("d", "decode", "n1"), ("c", "cache", "n1"))] == [0, 1]
    assert [values[f"hot_prefix_{what}", "1"] for what in ("requests", "tokens", "holders")] == [9.5, 64, 2]


def test_all_that_is_told_is_declared_with_those_labels_and_is_a_number():
    gauges = Gauges()
    gauges.samples(told(), INFOS, {"a": tokens(device=1)}, 0.0)
    seen = set()
    for name, labels, value in gauges.samples(told(), INFOS, {"a": tokens(device=2)}, 5.0):
        assert set(labels) == set(GAUGES[name].labels)
        assert math.isfinite(value)
        seen.add(name)
    assert seen == GAUGES.keys()


def test_counters_of_ingresses_are_told_as_rates_since_the_last_time():
    gauges = Gauges()
    first = shown(gauges.samples(told(), INFOS, {"a": tokens(device=100, computed=50)}, 10.0))
    assert ("prompt_tokens_per_second", "device") not in first
    both = {"a": tokens(device=150, computed=50), "b": tokens(device=5000)}  # b counted all that before it was heard
    later = shown(gauges.samples(told(), INFOS, both, 15.0))
    assert later["prompt_tokens_per_second", "device"] == 10
    assert later["prompt_tokens_per_second", "computed"] == 0
    lost = shown(gauges.samples(told(), INFOS, {"a": tokens(device=10)}, 20.0))  # b ended, a counts anew
    assert lost["prompt_tokens_per_second", "device"] == 0


def test_what_nobody_measured_and_who_is_gone_is_left_out():
    holder = HolderView(worker_id="gone", role="decode", node_id="n", is_in_step=True, known_blocks={})
    there = HolderView(worker_id="d", role="decode", node_id="n", is_in_step=True, known_blocks={})
    values = shown(Gauges().samples(told(holders=(holder, there), prefixes=None), INFOS, {}, 0.0))
    assert ("predicted_ttft_seconds", "d", "decode", "n") not in values
    assert values["held_bytes", "d", "decode", "n", "device"] == 0
    assert not [key for key in values if "gone" in key]
