"""What is counted of requests, choice by choice."""

from __future__ import annotations

import pytest

from cluster.openai.metrics import HttpMetrics, tenant_labels
from messages.request import GenerateRequest, SamplingParams
from messages.stream import PromptPlan, PromptSources


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def time(monkeypatch) -> Time:
    made = Time()
    monkeypatch.setattr("cluster.openai.metrics.time", made)
    return made


def requests(*tenants: int, num_prompt_tokens: int = 30) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=str(number),
            token_ids=b"",
            num_prompt_tokens=num_prompt_tokens,
            params=SamplingParams(max_tokens=9),
            tenant=tenant,
        )
        for number, tenant in enumerate(tenants)
    ]


def sums(metrics: HttpMetrics) -> dict[str, tuple[float, float]]:
    """Of each histogram that has seen something: how often, and how much."""
    values = metrics.values()
    names = [name.removesuffix("_sum") for name in values if name.endswith("_sum")]
    return {
        name.removeprefix("kvray_"): (values[f"{name}_count"], pytest.approx(values[f"{name}_sum"]))
        for name in names
        if values[f"{name}_count"]
    }


def test_the_parts_of_a_requests_time_are_told_apart_and_beside_what_was_predicted(time):
    metrics = HttpMetrics()
    clock = metrics.clock(requests(0))
    time.now_s += 2.0
    clock.first(0, PromptSources(computed=30), PromptPlan(predicted_ttft_s=1.0, queued_s=0.5, prefill_s=1.25))
    clock.chunk(0, 1)
    for _ in range(4):
        time.now_s += 0.25
        clock.chunk(0, 2)
    clock.finish(0, "stop")
    time.now_s += 0.5  # to write it
    clock.end("")
    clock.close()
    assert sums(metrics) == {
        "inter_token_latency_seconds": (4, 1.0),
        "time_to_first_token_seconds": (1, 2.0),
        "predicted_time_to_first_token_seconds": (1, 1.0),
        "time_to_first_token_ratio": (1, 2.0),
        "request_latency_seconds": (1, 3.5),
        "request_queue_time_seconds": (1, 0.5),
        "request_prefill_time_seconds": (1, 1.25),
        "request_decode_time_seconds": (1, 1.0),
        "request_inference_time_seconds": (1, 2.25),
        "request_time_per_output_token_seconds": (1, 0.125),
        "request_prompt_tokens": (1, 30.0),
        "request_generation_tokens": (1, 9.0),
    }
    values = metrics.values()
    assert values['kvray_time_to_first_token_seconds_bucket{le="1.2"}'] == 0
    assert values['kvray_time_to_first_token_seconds_bucket{le="2.5"}'] == 1
    assert values['kvray_time_to_first_token_seconds_bucket{le="+Inf"}'] == 1
    assert values["kvray_generation_tokens_total"] == 9


def test_a_request_that_was_placed_without_a_prediction_tells_nothing_of_predictions(time):
    metrics = HttpMetrics()
    clock = metrics.clock(requests(0))
    time.now_s += 1.0
    clock.first(0, PromptSources(), PromptPlan())
    clock.chunk(0, 1)
    assert sums(metrics) == {"time_to_first_token_seconds": (1, 1.0)}


def test_a_request_is_running_until_it_is_closed_and_choices_left_open_end_as_it_does():
    metrics = HttpMetrics()
    clock = metrics.clock(requests(0, 0))
    assert metrics.values()["kvray_requests_running"] == 1
    clock.chunk(0, 1)
    clock.finish(0, "length")
    clock.end("abandoned")
    clock.close()
    values = metrics.values()
    assert values["kvray_requests_running"] == 0
    assert values['kvray_choices_finished_total{reason="length"}'] == 1
    assert values['kvray_choices_finished_total{reason="abandoned"}'] == 1
    assert values["kvray_request_latency_seconds_count"] == 0, "it was not answered whole"


def test_tenants_beyond_those_that_are_counted_by_name_share_a_label_and_strangers_another():
    labels = tenant_labels({11: "gold", 12: "silver", 13: "bronze"}, 1)
    metrics = HttpMetrics(tenants=labels)
    for tenant in (11, 12, 13, 999):
        clock = metrics.clock(requests(tenant))
        clock.first(0, PromptSources(host=16, computed=14), None)
        clock.chunk(0, 5)
        clock.finish(0, "stop")
    told = {name: value for name, value in metrics.values().items() if name.startswith("kvray_tenant_")}
    assert told == {
        'kvray_tenant_requests_total{tenant="gold"}': 1,
        'kvray_tenant_requests_total{tenant="other"}': 2,
        'kvray_tenant_requests_total{tenant="none"}': 1,
        'kvray_tenant_prompt_tokens_total{tenant="gold",source="host"}': 16,
        'kvray_tenant_prompt_tokens_total{tenant="gold",source="computed"}': 14,
        'kvray_tenant_prompt_tokens_total{tenant="other",source="host"}': 32,
        'kvray_tenant_prompt_tokens_total{tenant="other",source="computed"}': 28,
        'kvray_tenant_prompt_tokens_total{tenant="none",source="host"}': 16,
        'kvray_tenant_prompt_tokens_total{tenant="none",source="computed"}': 14,
        'kvray_tenant_generation_tokens_total{tenant="gold"}': 5,
        'kvray_tenant_generation_tokens_total{tenant="other"}': 10,
        'kvray_tenant_generation_tokens_total{tenant="none"}': 5,
    }


def test_no_tenant_is_counted_where_none_was_asked_for():
    assert tenant_labels({11: "gold"}, 0) is None
    metrics = HttpMetrics(tenants=None)
    metrics.clock(requests(11)).first(0, PromptSources(computed=30), None)
    assert not any("tenant" in name for name in metrics.values())


def test_nothing_is_counted_where_nothing_is_to_be():
    metrics = HttpMetrics("ingress-1", is_counting=False)
    clock = metrics.clock(requests(0))
    clock.first(0, PromptSources(computed=30), PromptPlan(predicted_ttft_s=1.0))
    clock.chunk(0, 1)
    clock.finish(0, "stop")
    clock.end("")
    clock.close()
    metrics.count_http("/v1/completions", 200, has_left=False)
    assert metrics.values() == {}
    metrics.is_counting = True
    assert not any(metrics.values().values()), "not even unseen"


def test_families_of_which_nothing_was_counted_are_on_the_page_without_samples():
    lines = HttpMetrics("i").text([]).decode().splitlines()
    assert "# TYPE kvray_connections_ended_total counter" in lines
    assert not any(line.startswith("kvray_connections_ended_total") for line in lines)
    assert len(lines) == len(set(lines))
