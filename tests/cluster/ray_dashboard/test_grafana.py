"""The Grafana dashboard against what is exported, and against a real Prometheus."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from cluster.fleet_metrics import HELP
from cluster.openai.metrics import HttpMetrics
from cluster.ray_dashboard.grafana import UID, dashboard_json
from kvrouter.gauges import GAUGES
from tests.cluster.ray_dashboard.panels import asked_by_panels, panels
from tests.prometheus import needs_prometheus, prometheus

_NAME = re.compile(r"\b(?:ray_)?kvray_\w+")


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(dashboard_json())


def queries(dashboard: dict) -> list[str]:
    asked = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", ())]
    return [*asked, *(one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query")]


def exported() -> set[str]:
    samples = {sample for family in HttpMetrics().registry.collect() for sample in _samples(family.name, family.type)}
    return samples | HELP.keys() | {f"ray_{name}" for name in GAUGES}


def _samples(name: str, kind: str) -> list[str]:
    ends = {"counter": ["_total"], "histogram": ["_bucket", "_count"]}  # no sums: Ray makes them of bucket middles
    return [name + end for end in ends.get(kind, [""])]


def test_every_metric_that_is_asked_for_is_exported(dashboard):
    asked = {name for query in queries(dashboard) for name in _NAME.findall(query)}
    assert len(asked) > 10
    assert asked <= exported()


def test_every_gauge_but_free_blocks_is_shown(dashboard):
    shown = {name for query in queries(dashboard) for name in _NAME.findall(query)}
    hidden = {f"ray_{name}" for name in GAUGES} - shown
    assert hidden == {"ray_kvray_placement_free_blocks", "ray_kvray_placement_hot_prefix_tokens"}


def test_panels_have_ids_and_places_of_their_own(dashboard):
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in panels(dashboard)]
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_every_variable_that_is_used_is_declared(dashboard):
    declared = {one["name"] for one in dashboard["templating"]["list"]}
    used = {name for query in queries(dashboard) for name in re.findall(r"\$(\w+)", query)}
    assert used - {"__rate_interval"} <= declared
    assert "SessionName" in declared  # which Ray's UI sets
    assert (dashboard["uid"], dashboard["title"]) == (UID, "kvray: cache placement")


def test_labels_that_are_asked_for_are_those_of_the_gauge(dashboard):
    rays = {"SessionName"}
    for query in queries(dashboard):
        for name, selector in re.findall(r"ray_(kvray_\w+)\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)=~?\"", selector))
            assert labels <= {*GAUGES[name].labels, *rays}, query


@needs_prometheus
@pytest.mark.slow
def test_a_real_prometheus_understands_every_query(tmp_path):
    with prometheus(tmp_path) as seen:
        for _, expression in asked_by_panels():
            seen.query(expression)
