"""Debian's prometheus as a process, for tests that want numbers scraped by the real thing."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.served import free_port

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (make prometheus)"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (make prometheus)"
)
_START_TIMEOUT_S = 60.0


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    """What promtool says, which must find nothing wrong. `text`: its standard input."""
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=5)

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer of its API."""
        answer = self._http.get(f"/api/v1/{path}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of what an expression is now."""
        return [(one["metric"], float(one["value"][1])) for one in self.get("query", query=expression)["result"]]

    def target(self) -> dict[str, Any]:
        """Its one target."""
        (target,) = self.get("targets")["activeTargets"]
        return dict(target)


@contextlib.contextmanager
def prometheus(
    directory: Path, scrape_configs: Sequence[object] = (), rules: Sequence[Path] = ()
) -> Iterator[Prometheus]:
    """One that keeps its data in `directory` and scrapes every second, until the block ends."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rule) for rule in rules],
        "scrape_configs": list(scrape_configs),
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    log = directory / "prometheus.log"
    with contextlib.ExitStack() as stack:
        url = None
        while url is None:
            url = _started(directory, log, stack)
        yield Prometheus(url)


def _started(directory: Path, log: Path, stack: contextlib.ExitStack) -> str | None:
    """Where it answers; None where somebody else took its port before it did, and another is to be tried."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    ends_s = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None:
        if _is_ready(url):
            return url
        assert time.monotonic() < ends_s, log.read_text()
        time.sleep(0.1)
    assert "address already in use" in log.read_text(), log.read_text()
    return None


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False
