"""A real Prometheus scrapes a real fleet, with a key, under the alert rules that are shipped."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvicorn

from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.fleet_metrics import HELP
from cluster.openai.app import create_app
from cluster.openai.backend import ServedModel
from cluster.openai.callers import Callers
from cluster.openai.exposition import families, labels_of, page
from cluster.openai.metrics import HttpMetrics
from engine.scheduling.waits import QueueWaits
from kvrouter.worker import RouterWorker
from nodecache.cache import CacheLimits, NodeCache
from nodecache.loopback import LoopbackStore
from tests.models import EOS, VOCAB_SIZE
from tests.nodecache.blocks import checksum, pool_of
from tests.prometheus import Prometheus, needs_prometheus, needs_promtool, prometheus, promtool
from tests.served import STATUS_AGE_S, Served, free_port, serving
from tests.workers import CHANNEL, SECRET, running_pair, worker_options
from text.tokenizer import Tokenizer
from tools.monitoring.prometheus_rule import RULES

KEY = "a-key-of-the-operator"
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 8


def everything() -> bytes:
    """A page with every name that anything tells."""
    queue = QueueWaits().stats()
    values = {name: 1.0 for name in HELP if name != "kvray_queue_seconds"}
    cache = NodeCache(pool_of(4), {"disk": LoopbackStore(4, checksum)}, CacheLimits(lease_s=1.0))
    sources = [
        ({"worker": "d1", "role": "decode"}, values | queue),
        ({"worker": "c1", "role": "cache"}, cache.stats()),
    ]
    surface = HttpMetrics("i1", tenants={1: "gold"})
    return surface.text(families(sources, HELP))


@needs_promtool
def test_promtool_finds_nothing_to_complain_of_in_any_name():
    assert promtool("check", "metrics", text=everything().decode()) == ""


@needs_promtool
def test_promtool_would_complain():
    with pytest.raises(AssertionError, match="counter metrics should have"):
        promtool("check", "metrics", text="# HELP kvray_x X\n# TYPE kvray_x counter\nkvray_x 1\n")


def test_a_page_of_nothing_is_empty():
    assert page([]) == b""


async def eventually(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.1)


@needs_prometheus
@needs_promtool
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("one_thread")
async def test_prometheus_scrapes_the_fleet_with_a_key_and_takes_the_rules(model_dir, tmp_path):
    (tmp_path / "key").write_text(KEY)
    metrics = HttpMetrics("ingress-1")
    tokenizer = Tokenizer.load(model_dir)
    async with running_pair(worker_options(model_dir), worker_options(model_dir)) as pair:
        infos = [worker._worker.info(worker._worker.server.address) for worker in (pair.decode, pair.prefill)]
        router = RouterWorker("router-1", SECRET, "127.0.0.1", CHANNEL)
        router.set_fleet(infos)
        dispatcher = Dispatcher(
            DispatchOptions(
                ingress_id="ingress-1", secret=SECRET, channel=CHANNEL, request_timeout_s=60.0, max_ttft_s=20.0
            ),
            metrics.values,
        )
        for info in infos:
            dispatcher.set_workers(info.role, [info])
        dispatcher.set_routers([router.address])
        app = create_app(
            dispatcher,
            ServedModel(
                names=("tiny",),
                max_model_len=1024,
                max_prompt_tokens=1023,
                vocab_size=VOCAB_SIZE,
                eos_token_ids=(tokenizer.backend.token_to_id(EOS),),
                created_s=0,
            ),
            tokenizer,
            version="1",
            callers=Callers.of_keys([KEY]),
            metrics=metrics,
        )
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        serving_task = asyncio.create_task(server.serve())
        await eventually(lambda: server.started)
        try:
            await ask(port)
            with contextlib.ExitStack() as stack:  # entered beside the loop, which has a fleet to carry on
                starting = prometheus(tmp_path, [scraped(port, tmp_path / "key")], [RULES])
                seen = await asyncio.to_thread(stack.enter_context, starting)
                await eventually(lambda: seen.query("kvray_requests_running"))
                await asyncio.to_thread(check, seen)
            async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as http:
                text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
            assert await asyncio.to_thread(promtool, "check", "metrics", text=text) == ""
        finally:
            server.should_exit = True
            await serving_task
            dispatcher.close()
            router.close()


def scraped(port: int, key_file: Path) -> dict[str, object]:
    """A scrape_config of what answers at `port`, with the key in `key_file`."""
    targets = [{"targets": [f"127.0.0.1:{port}"]}]
    return {"job_name": "kvray", "authorization": {"credentials_file": str(key_file)}, "static_configs": targets}


async def ask(port: int) -> None:
    prompt = [random.Random(1).randrange(5, 250) for _ in range(PROMPT_TOKENS)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "temperature": 0}
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=20) as http:
        answer = await http.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


def check(seen: Prometheus) -> None:
    """What was scraped is what was asked, of everybody who tells something, and no rule is broken."""
    assert seen.query("sum(kvray_prompt_tokens_total)") == [({}, PROMPT_TOKENS)]
    assert seen.query("sum(kvray_generation_tokens_total)") == [({}, OUTPUT_TOKENS)]
    assert seen.query("sum(kvray_generated_tokens_total)") == [({}, OUTPUT_TOKENS)]
    assert seen.query("kvray_time_to_first_token_seconds_count")[0][1] == 1
    assert seen.query("kvray_request_prefill_time_seconds_count")[0][1] == 1
    assert {labels.get("role") for labels, _ in seen.query("kvray_process_resident_memory_bytes")} >= {
        "decode",
        "prefill",
        "router",
    }
    roles = {labels["role"]: value for labels, value in seen.query("kvray_fleet_workers_answering")}
    assert roles == {"decode": 1, "prefill": 1}
    assert seen.target()["lastError"] == ""
    rules = [rule for group in seen.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, "unknown: not evaluated yet"
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


#: Of a worker's numbers those that do not change while nobody asks anything.
STILL = re.compile("kvray_(blocks|cache|worker_prompt_tokens|generated_tokens|transfer_bytes|evictions|router_index)")


@needs_prometheus
@pytest.mark.alone
@pytest.mark.long
def test_prometheus_and_everybodys_own_numbers_agree_within_a_reporting_period(tmp_path):
    (tmp_path / "key").write_text("none")
    with serving("--host-memory", "64MiB", log_dir=tmp_path) as served:
        port = int(served.url.rpartition(":")[2])
        with prometheus(tmp_path, [scraped(port, tmp_path / "key")], [RULES]) as seen:
            for number in range(6):
                body = {"prompt": f"{number % 3} " + "a quiet morning " * 60, "max_tokens": 16}
                assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code == 200
            served.wait_until_idle()
            ends_s = time.monotonic() + 30  # the node cache may still be starting
            while (told := told_by(served)) != scraped_by(seen) or len({worker for worker, _, _ in told}) < 4:
                assert time.monotonic() < ends_s, set(told.items()) ^ set(scraped_by(seen).items())
                time.sleep(STATUS_AGE_S)
            assert seen.target()["lastError"] == ""
            assert sum(value for _, value in seen.query("kvray_choices_finished_total")) == 6
            assert seen.query('ALERTS{alertstate="firing"}') == []


@pytest.mark.alone
@pytest.mark.long
def test_with_observability_off_nothing_is_counted_and_everything_is_served(tmp_path):
    (tmp_path / "kvray.yaml").write_text("observability: {level: off}\n")
    with serving("--config", str(tmp_path / "kvray.yaml"), log_dir=tmp_path) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200
        page_answer = httpx.get(f"{served.url}/metrics", timeout=10)
        assert page_answer.status_code == 404
        assert "observability.level is off" in page_answer.text
        assert all(worker["is_answering"] for worker in served.status()["workers"])


Numbers = dict[tuple[str, str, frozenset[tuple[str, str]]], float]  #: by whose, which, and their own labels


def told_by(served: Served) -> Numbers:
    """What workers, router and node cache say of themselves."""
    status = served.status()
    return {
        (one["worker_id"], name.partition("{")[0], frozenset(labels_of(name).items())): value
        for kind in ("workers", "caches", "routers")
        for one in status[kind]
        for name, value in one["values"].items()
        if STILL.match(name)
    }


def scraped_by(seen: Prometheus) -> Numbers:
    """The same numbers as Prometheus has them."""
    return {
        (labels["worker"], labels["__name__"], frozenset(labels.items() - common(labels))): value
        for labels, value in seen.query('{__name__=~"kvray_.+",worker!=""}')
        if STILL.match(labels["__name__"])
    }


def common(labels: dict[str, str]) -> set[tuple[str, str]]:
    """Of a series' labels those that its worker did not put on it."""
    return {(name, labels[name]) for name in ("__name__", "worker", "role", "instance", "job")}
