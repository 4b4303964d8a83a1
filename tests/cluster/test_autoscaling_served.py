"""Numbers of real workers follow a real load, and nobody's answer is cut off on the way down."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.config import DEMO_MODEL
from tests.cluster.starting import ROOT, started_ray, wait_until
from tests.served import Served, free_port, run_kvray, serving
from transport.secret import ClusterSecret

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(300)]

#: Four slots a worker: three rows and more want a second one, two leave one alone.
SECTIONS = {
    "engine": {"max_num_seqs": 4, "num_threads": 1, "kv_cache_memory": "32MiB"},
    "tiers": {"host_memory": "64MiB"},
    "pools": {"prefill": 1, "decode": 1},
    "autoscaling": {"max_decode": 2, "ttft_s": 20, "itl_ms": 10_000, "grow_after_s": 1, "shrink_after_s": 3},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    config = directory / "kvray.yaml"
    config.write_text(yaml.safe_dump(SECTIONS))
    with serving("--config", str(config), log_dir=directory) as process:
        yield process


async def ask(http: httpx.AsyncClient, number: int, num_tokens: int) -> tuple[int, str | None]:
    """Stream so many tokens; how many came, and why it ended."""
    body = {"prompt": f"number {number}", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    came, reason = 0, None
    async with http.stream(
        "POST", "/v1/completions", json={**body, "stream": True, "return_token_ids": True}
    ) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                came += len(choice["token_ids"])
                reason = choice["finish_reason"] or reason
    return came, reason


async def until_decode_workers(served: Served, number: int, timeout_s: float) -> None:
    ends_s = time.monotonic() + timeout_s
    while True:
        status = await asyncio.to_thread(served.status)
        roles = [worker["role"] for worker in status["workers"] if worker["is_answering"]]
        if roles.count("decode") == number:
            return
        assert time.monotonic() < ends_s, f"{roles} after {timeout_s} s, wanted {number} for decode"


async def test_a_second_worker_comes_for_the_load_and_goes_without_cutting_a_stream_off(served):
    async with httpx.AsyncClient(base_url=served.url, timeout=200) as http:
        is_loaded = True

        async def client(number: int) -> None:
            while is_loaded:
                assert await ask(http, number, 100) == (100, "length")

        clients = [asyncio.create_task(client(number)) for number in range(6)]
        await until_decode_workers(served, 2, 60.0)
        long = [asyncio.create_task(ask(http, number, 4000)) for number in (10, 11)]
        await asyncio.sleep(0.5)
        is_loaded = False
        await asyncio.gather(*clients)
        assert not all(stream.done() for stream in long)
        await until_decode_workers(served, 1, 60.0)
        assert await asyncio.gather(*long) == [(4000, "length")] * 2
        assert await ask(http, 3, 5) == (5, "length")


def test_a_plan_takes_what_a_server_measured(served, tmp_path):
    row = {"input_length": 1024, "output_length": 20, "hash_ids": [0, 1]}
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"timestamp": 1000 * n, **row}) + "\n" for n in range(30)))
    done, _ = run_kvray("plan", str(trace), "--url", served.url, "--ttft", "30", "--itl", "5000", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["num_requests"], told["num_prefill"], told["num_decode"]) == (30, 1, 1)
    assert told["ttft_p90_s"] > 0.0


@pytest.mark.long
def test_an_application_from_a_serve_config_is_scaled_by_its_own_policy(tmp_path):
    port = free_port()
    document = {
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": None},
        "applications": [
            {
                "name": "kvray",
                "route_prefix": "/",
                "import_path": "cluster.app:build",
                "args": {**SECTIONS, "model": {"path": str(DEMO_MODEL)}, "network": {"host": "127.0.0.1"}},
                "autoscaling_policy": {"policy_function": "cluster.autoscaling_policy:ApplicationPolicy"},
            }
        ],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    with started_ray({"KVRAY_SECRET": ClusterSecret.generate().hex()}) as environment:
        directory = Path(environment["RAY_TMPDIR"]) / "ray"
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", "--blocking", str(path)],
            env=environment | {"RAY_ADDRESS": (directory / "ray_current_cluster").read_text()},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"

            def decode_workers() -> int:
                try:
                    workers = httpx.get(f"{url}/status", timeout=10).json()["workers"]
                except (httpx.HTTPError, ValueError, KeyError):
                    return 0
                return sum(worker["role"] == "decode" and worker["is_answering"] for worker in workers)

            wait_until(lambda: decode_workers() == 1, 120)

            async def load() -> None:
                async with httpx.AsyncClient(base_url=url, timeout=200) as http:
                    waited = asyncio.create_task(asyncio.to_thread(wait_until, lambda: decode_workers() == 2, 90))
                    while not waited.done():
                        assert await asyncio.gather(*(ask(http, n, 100) for n in range(6))) == [(100, "length")] * 6
                    await waited

            asyncio.run(load())
            wait_until(lambda: decode_workers() == 1, 60)
            logs = "".join(log.read_text() for log in directory.glob("session_latest/logs/serve/controller_*.log"))
            assert "Using custom autoscaling policy 'cluster.autoscaling_policy:ApplicationPolicy'" in logs
            assert "kvray: decode workers 1 -> 2: slots" in logs
            assert "the numbers of workers stay" not in logs
        finally:
            process.kill()
            process.wait(10)
