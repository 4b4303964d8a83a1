"""A real Prometheus, Debian's, and what Grafana would ask it for our dashboard."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_dashboard.grafana import dashboard_json
from tests.served import free_port


@contextlib.contextmanager
def prometheus(folder: Path, scrape_configs: str = "[]") -> Iterator[str]:
    """The URL of one that keeps its data in `folder`; skips where there is none."""
    if (command := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not there (Debian's package prometheus)")
    (folder / "prometheus.yml").write_text(f"global: {{scrape_interval: 2s}}\nscrape_configs: {scrape_configs}\n")
    port = free_port()
    process = subprocess.Popen(
        [
            *(command, "--config.file", str(folder / "prometheus.yml")),
            *("--storage.tsdb.path", str(folder / "data"), "--web.listen-address", f"127.0.0.1:{port}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def panels(dashboard: dict) -> list[dict]:
    """Panels of all rows, the rows included."""
    return [panel for row in dashboard["panels"] for panel in (row, *row.get("panels", ()))]


def asked_by_panels() -> list[tuple[str, str]]:
    """Each query of our dashboard, its variables filled in, after a title."""
    return [
        (
            f"{panel['title']} {target['refId']}",
            re.sub(r"\$\w+", ".*", target["expr"].replace("$__rate_interval", "1m")),
        )
        for panel in panels(json.loads(dashboard_json()))
        for target in panel.get("targets", ())
    ]


def answer(url: str, expr: str) -> dict:
    """What Prometheus says to a query; waits until it has started."""
    asked = f"{url}/api/v1/query?" + urllib.parse.urlencode({"query": expr})
    ends_s = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=5) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503:  # it starts
                return json.load(error)
        except OSError:
            pass
        assert time.monotonic() < ends_s, "prometheus does not answer"
        time.sleep(0.2)


def has_series(url: str, expr: str) -> bool:
    return bool(answer(url, expr)["data"]["result"])
