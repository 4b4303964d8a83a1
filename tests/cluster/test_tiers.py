"""A served cluster with tiers: what was asked once comes back from host and disk, through kills, token for token."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import httpx
import openai
import psutil
import pytest

from tests.cluster.asking import ask_all, mixed_asks
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.served import Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

NUM_KILLS = 6
#: Small pools and tiers, so that blocks move all the time; the model needs 1.5 KiB a token.
SIZES = ["--kv-cache-memory", "4MiB", "--host-memory", "3MiB", "--disk-capacity", "64MiB"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """One that takes so long to compute that loading is worth it."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 2048}
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", **sizes)


@pytest.fixture(scope="module")
def reference(model_dir):
    return Reference(model_dir)


@pytest.fixture
def arguments(model_dir, tmp_path):
    return [str(model_dir), "--dtype", "float32", "--prefill", "1", "--decode", "2", *SIZES]


def ask(served: Served, prompt: list[int]) -> tuple[list[int], dict[str, int]]:
    """The tokens that follow, and where the prompt's came from."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    reply = httpx.post(f"{served.url}/v1/completions", json=body | {"return_prompt_sources": True}, timeout=60)
    reply.raise_for_status()
    return reply.json()["choices"][0]["token_ids"], reply.json()["kvray"]["prompt_sources"]


def node_cache(served: Served) -> psutil.Process:
    """The node cache's process, once there is one."""
    ends_s = time.monotonic() + 30
    while True:
        found = [child for child in served.descendants() if "nodecache" in " ".join(_command(child))]
        if found:
            return found[0]
        assert time.monotonic() < ends_s, "there is no node cache"
        time.sleep(0.2)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for_cache(served: Served, metric: str, at_least: float) -> None:
    """Until the node cache tells of so much."""
    ends_s = time.monotonic() + 30
    while True:
        caches = served.status()["caches"]
        values = [cache["values"].get(metric, 0.0) for cache in caches]
        if values and max(values) >= at_least:
            return
        assert time.monotonic() < ends_s, f"{metric} is {values}, not {at_least}: {caches}"


def test_a_prompt_comes_back_from_disk_after_every_process_was_killed(arguments, reference, tmp_path):
    prompt = [random.Random(7).randrange(5, 250) for _ in range(1600)]
    disk = ["--disk-dir", str(tmp_path / "disk")]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with serving(*arguments, *disk, log_dir=tmp_path / "one") as served:
        cold, sources = ask(served, prompt)
        assert sources["computed"] == len(prompt)
        wait_for_cache(served, "kvray_disk_blocks", len(prompt) // 16)
        served.kill()
    with serving(*arguments, *disk, log_dir=tmp_path / "two") as served:
        wait_for_cache(served, "kvray_disk_blocks", len(prompt) // 16)
        warm, sources = ask(served, prompt)
        assert sources["disk"] > 0, "all of it was computed again"
        assert warm == cold
        again, sources = ask(served, prompt)
        assert sources["disk"] == 0, "what came up stays up"
        assert again == cold
        served.wait_until_idle()


def test_every_answer_is_right_while_blocks_move_and_node_caches_are_killed_and_stopped(arguments, reference, tmp_path):
    asks = [ask for ask in mixed_asks(120, seed="tiers") if len(ask.prompt) < 1900] * 2
    with serving(*arguments, "--disk-dir", str(tmp_path / "disk"), log_dir=tmp_path) as served:

        async def kill_time_and_again() -> None:
            for number in range(NUM_KILLS):
                await asyncio.sleep(2.0)
                process = await asyncio.to_thread(node_cache, served)
                os.kill(process.pid, signal.SIGSTOP if number % 3 == 2 else signal.SIGKILL)

        async def ask_beside_kills():
            killing = asyncio.create_task(kill_time_and_again())
            async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=120) as client:
                answers = await ask_all(client, asks, concurrency=8)
            await killing
            return answers

        answers = asyncio.run(ask_beside_kills())
        for wanted, answer in zip(asks, answers, strict=True):
            assert answer == wanted.expected(reference, answer)
        prompt = [random.Random(8).randrange(5, 250) for _ in range(1600)]
        first, _ = ask(served, prompt)
        wait_for_cache(served, "kvray_cache_blocks_held", 1)  # a successor is there, and takes in what is new
        assert ask(served, prompt)[0] == first
        served.wait_until_idle()
