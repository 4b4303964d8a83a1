"""Both pages over a real deployment of three Ray nodes, prefill and decode on different ones, and the openai client.

KVRAY_SCREENSHOTS names a folder where the pictures of docs/CACHE_PAGE.md are put.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from tests.browser import Watched, browser, watched
from tests.cluster.ray_dashboard.panels import asked_by_panels
from tests.cluster.ray_dashboard.ray_head import environment_beside, run
from tests.cluster.test_three_nodes import GCS_PORT, HTTP_PORT, Node
from tests.hosts import hosts_on_a_switch
from tests.prometheus import needs_prometheus, prometheus
from tests.served import STATUS_AGE_S, Served, own_environment

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
DASHBOARD_PORT = 8265
SYSTEM = "Notes of the harbour office:\n" + "".join(f"- pier {n}: {4000 + 17 * n}.\n" for n in range(40))


class Deployment:
    """What runs, and what each of those who tell of it tells."""

    def __init__(self, served: Served, dashboard_url: str, token: str, scrape_configs: list[dict]) -> None:
        self.served = served
        self.url = served.url
        self.dashboard_url = dashboard_url
        self.token = token
        self.scrape_configs = scrape_configs  #: of Prometheus: Ray's targets, and the endpoint

    def page_data(self) -> dict:
        return json.loads(self.get("/cache/data"))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=20) as response:
            return response.read().decode()

    async def talk(self, num_questions: int) -> None:
        """Ask about the same notes, some questions at a time."""
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none")
        model = (await client.models.list()).data[0].id

        async def ask(number: int) -> None:
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"What is the number of pier {number % 8}?"},
            ]
            await client.chat.completions.create(model=model, messages=messages, max_tokens=12)

        for begin in range(0, num_questions, 4):
            await asyncio.gather(*(ask(number) for number in range(begin, begin + 4)))
        await client.close()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("served")
    python = environment_beside(directory / "environment")
    assert run(python, "dashboard", "install").returncode == 0
    config = directory / "kvray.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "pools": {
                    "prefill": 1,
                    "decode": 2,
                    "ingress": 1,
                    "cpus_per_worker": 1,
                    "prefill_labels": {"kvray.io/pool": "prefill"},
                    "decode_labels": {"kvray.io/pool": "decode"},
                },
                "tiers": {"host_memory": "64MiB", "disk_dir": str(directory / "disk"), "disk_capacity": "1GiB"},
                "observability": {"prompt_preview_chars": 60},
            }
        )
    )
    with hosts_on_a_switch(3) as hosts, own_environment() as environment:
        head = hosts[0].address
        environment |= {"HEAD": head, "KVRAY_SECRET": os.urandom(32).hex(), "PYTHONPATH": str(ROOT)}
        board = ("--include-dashboard=true", f"--dashboard-host={head}", f"--dashboard-port={DASHBOARD_PORT}")
        nodes = [Node(hosts[0], environment, *board, is_head=True, python=str(python))]
        for host, role in zip(hosts[1:], ("prefill", "decode"), strict=True):
            nodes.append(Node(host, environment, f"--labels=kvray.io/pool={role}", python=str(python)))
        log = directory / "log"
        arguments = ("--config", str(config), "--kv-cache-memory", "32MiB", "--host", "0.0.0.0", "--port", "8000")
        try:
            for node in nodes:
                node.start()
            with log.open("w") as stream:
                process = subprocess.Popen(
                    [*hosts[0].prefix, python, "-m", "cluster.cli", "serve", *arguments],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment | {"RAY_ADDRESS": f"{head}:{GCS_PORT}"},
                    text=True,
                    cwd=ROOT,
                )
            served = Served(process, HTTP_PORT, log)
            served.url = f"http://{head}:{HTTP_PORT}"
            served.wait_until_ready()
            served.wait_until_whole(1, 2, 60)
            discovered = next(Path(environment["RAY_TMPDIR"]).glob("**/prom_metrics_service_discovery.json"))
            scrape_configs = [
                {"job_name": "ray", "file_sd_configs": [{"files": [str(discovered)]}]},
                {"job_name": "kvray", "static_configs": [{"targets": [f"{head}:{HTTP_PORT}"]}]},
            ]
            yield Deployment(served, f"http://{head}:{DASHBOARD_PORT}", environment["RAY_AUTH_TOKEN"], scrape_configs)
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            for node in nodes:
                node.kill()


async def test_page_status_and_metrics_agree_with_the_workers_within_a_period(deployment):
    await deployment.talk(24)
    await _nobody_writes(deployment)
    await asyncio.sleep(STATUS_AGE_S)
    page, status, metrics = deployment.page_data(), deployment.served.status(), deployment.get("/metrics")
    seen = _seen(page, status, metrics)
    assert all(len(set(values)) == 1 for values in seen.values()), seen
    assert len(seen) >= 4  # three workers, and a node cache or more
    owners = {owner["worker_id"]: owner for owner in page["owners"]}
    hosts = {worker["role"]: worker["address"].rpartition("@")[2].split(":")[0] for worker in status["workers"]}
    assert hosts["prefill"] != hosts["decode"]
    assert all(owner["is_in_step"] and owner["is_answering"] for owner in owners.values())
    hottest = page["prefixes"][0]
    assert hottest["text"].startswith("<")  # of the chat template
    assert hottest["num_requests"] > 8
    assert sum(page["prompt_tokens"].values()) > 24 * 200
    status, body = _dashboard_get(deployment, "/kvray/cache/data")
    assert status == 200
    assert {owner["worker_id"] for owner in json.loads(body)["owners"]} == set(owners)


async def _nobody_writes(deployment: Deployment) -> None:
    """Wait until the owners' own numbers stay: what was computed may still be on its way to a node cache."""
    before = None
    ends_s = time.monotonic() + 30
    while (now := _held(deployment.served.status())) != before:
        assert time.monotonic() < ends_s, now
        before = now
        await asyncio.sleep(2 * STATUS_AGE_S)


def _held(status: dict) -> dict[str, float]:
    """Blocks held by each owner, as it tells itself."""
    owners = (*status["workers"], *status["caches"])
    return {one["worker_id"]: one["values"].get("kvray_cache_blocks_held", -1.0) for one in owners}


def _seen(page: dict, status: dict, metrics: str) -> dict[str, tuple[float, ...]]:
    """Blocks held by each owner, as told by page, router (by way of the page), `kvray status` and Prometheus."""
    told = {one["worker_id"]: one["values"] for one in (*status["workers"], *status["caches"])}
    seen = {}
    for owner in page["owners"]:
        name = owner["worker_id"]
        tier = "host" if owner["role"] == "cache" else "device"
        sample = re.search(rf'^kvray_cache_blocks_held\{{[^}}]*worker="{name}"[^}}]*\}} (\S+)', metrics, re.MULTILINE)
        row = owner["tiers"][tier]
        values = (
            row["blocks"],
            row["known_blocks"],
            told[name]["kvray_cache_blocks_held"],
            sample and float(sample[1]),
        )
        seen[f"{name} {tier}"] = values
    return seen


def _dashboard_get(deployment: Deployment, path: str) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {deployment.token}"}
    request = urllib.request.Request(deployment.dashboard_url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as response:
        return response.status, response.read().decode()


async def _whole(seen: Watched, address: str) -> None:
    await seen.page.goto(address)
    await seen.page.get_by_text("Live").wait_for()
    await seen.page.get_by_role("rowheader", name="decode-").first.wait_for()
    assert await seen.page.locator("#owners tr.node").count() >= 1  # these hosts have one name
    assert not await seen.scrolls_sideways()
    for body in ("owners", "prefixes"):
        region = seen.page.locator(f"#{body}").locator("xpath=ancestor::div[1]")
        assert await region.evaluate("one => one.scrollWidth <= one.clientWidth"), body
    assert seen.foreign == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_both_pages_show_it_in_a_browser_and_axe_finds_nothing(deployment, scheme):
    async with browser() as chromium:
        async with watched(chromium, deployment.url, scheme) as seen:
            await _whole(seen, f"{deployment.url}/cache")
            await deployment.talk(16)
            await asyncio.sleep(4.5)
            await seen.page.locator("#prefixes button").first.click()
            dialog = seen.page.get_by_role("dialog")
            await dialog.get_by_role("region", name="Who holds it now").wait_for()
            assert await seen.violations() == []
            await seen.page.keyboard.press("Escape")
            if folder := os.environ.get("KVRAY_SCREENSHOTS"):
                await seen.page.evaluate("scrollTo(0, 0)")
                await seen.page.screenshot(path=Path(folder) / f"cache-page-{scheme}.png")
        async with watched(chromium, deployment.dashboard_url, scheme) as seen:
            cookie = {"name": "ray-authentication-token", "value": deployment.token, "url": deployment.dashboard_url}
            await seen.page.context.add_cookies([{**cookie, "httpOnly": True, "sameSite": "Strict"}])
            await _whole(seen, f"{deployment.dashboard_url}/kvray")
            assert await seen.violations() == []


@needs_prometheus
async def test_every_panel_of_the_grafana_dashboard_has_series(deployment, tmp_path):
    with prometheus(tmp_path, deployment.scrape_configs) as seen:
        wanted = dict(asked_by_panels())
        ends_s = time.monotonic() + 90
        while wanted:
            assert time.monotonic() < ends_s, f"nothing for {wanted}"
            await deployment.talk(8)
            await asyncio.sleep(2)
            wanted = {title: expr for title, expr in wanted.items() if not seen.query(expr)}
