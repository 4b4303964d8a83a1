"""The Grafana dashboard against what is exported, and against a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from itertools import combinations

import pytest

from cluster.fleet_metrics import HELP
from cluster.openai.metrics import HttpMetrics
from cluster.ray_dashboard.grafana import UID, dashboard_json
from kvrouter.gauges import GAUGES
from tests.served import free_port

_NAME = re.compile(r"\b(?:ray_)?kvray_\w+")


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(dashboard_json())


def panels(dashboard: dict) -> list[dict]:
    return [panel for row in dashboard["panels"] for panel in (row, *row.get("panels", ()))]


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


@pytest.mark.slow
def test_a_real_prometheus_understands_every_query(dashboard, tmp_path):
    if (prometheus := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not there (Debian's package prometheus)")
    (tmp_path / "prometheus.yml").write_text("scrape_configs: []\n")
    port = free_port()
    process = subprocess.Popen(
        [
            *(prometheus, "--config.file", str(tmp_path / "prometheus.yml")),
            *("--storage.tsdb.path", str(tmp_path / "data"), "--web.listen-address", f"127.0.0.1:{port}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for expr in (target["expr"] for panel in panels(dashboard) for target in panel.get("targets", ())):
            filled = re.sub(r"\$\w+", ".*", expr.replace("$__rate_interval", "1m"))
            url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": filled})
            assert _asked(url)["status"] == "success", filled
    finally:
        process.kill()
        process.wait()


def _asked(url: str) -> dict:
    ends_s = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503:  # it starts
                return json.load(error)
        except OSError:
            pass
        assert time.monotonic() < ends_s, "prometheus does not answer"
        time.sleep(0.2)
