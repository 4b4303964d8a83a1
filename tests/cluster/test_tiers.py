"""A served cluster with tiers: what was asked once comes back from host and disk, through kills, token for token."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import signal
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.cluster.asking import Ask, ask_all, mixed_asks
from tests.models import DEEPSEEK, make_tiny_model
from tests.nodecache.remote.swift import Swift
from tests.reference import Reference
from tests.served import Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

NUM_KILLS = 6
#: Small pools and tiers, so that blocks move all the time; the model needs 1.5 KiB a token.
SIZES = ["--kv-cache-memory", "4MiB", "--host-memory", "3MiB", "--disk-capacity", "64MiB"]
SLOW_SIZES = ["--kv-cache-memory", "8MiB", "--host-memory", "8MiB", "--disk-capacity", "64MiB"]

#: Kinds of KV besides Llama's: by which each block has other bytes, or layers of several kinds.
FAMILIES = {
    "qwen3": {},
    "gemma3_text": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v3": DEEPSEEK,
    "gpt2": {"num_key_value_heads": None, "head_dim": None, "n_positions": 2048},
}


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    """Where a bucket of a real S3 server lies."""
    root = tmp_path_factory.mktemp("swift")
    (root / "devices").mkdir()
    try:
        os.setxattr(root / "devices", "user.kvray", b"1")
    except OSError:
        pytest.skip(f"no user attributes on {root}, which Swift wants")
    if importlib.util.find_spec("swift") is None:
        pytest.skip("OpenStack Swift is not installed")
    server = Swift(root, root / "devices")
    server.raw().create_dir("bucket")
    yield server.uri("bucket")
    server.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """One that takes so long to compute that loading is worth it."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 2048}
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", **sizes)


@pytest.fixture
def arguments(model_dir):
    return [str(model_dir), "--dtype", "float32", "--prefill", "1", "--decode", "2", *SIZES]


@pytest.fixture(scope="module")
def slow_arguments(tmp_path_factory):
    """Of a model that takes a second or so for a prompt whose KV has 4 MB: any tier is quicker."""
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 8, "max_position_embeddings": 2048}
    model_dir = make_tiny_model(tmp_path_factory.mktemp("models") / "slow", **sizes)
    return [str(model_dir), "--dtype", "float32", "--prefill", "1", "--decode", "1", *SLOW_SIZES]


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


def test_a_prompt_comes_back_from_disk_after_every_process_was_killed(slow_arguments, tmp_path):
    prompt = [random.Random(7).randrange(5, 250) for _ in range(1600)]
    disk = ["--disk-dir", str(tmp_path / "disk")]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with serving(*slow_arguments, *disk, log_dir=tmp_path / "one") as served:
        cold, sources = ask(served, prompt)
        assert sources["computed"] == len(prompt)
        wait_for_cache(served, "kvray_disk_blocks", len(prompt) // 16)
        served.kill()
    with serving(*slow_arguments, *disk, log_dir=tmp_path / "two") as served:
        wait_for_cache(served, "kvray_disk_blocks", len(prompt) // 16)
        warm, sources = ask(served, prompt)
        assert sources["disk"] >= len(prompt) // 2, "most of it was not computed again"
        assert warm == cold
        again, sources = ask(served, prompt)
        assert sources["disk"] == 0, "what came up stays up"
        assert again == cold
        served.wait_until_idle()


@pytest.mark.long
def test_a_prompt_comes_back_from_host_and_disk_while_no_router_is_there(slow_arguments, tmp_path):
    prompt = [random.Random(10).randrange(5, 250) for _ in range(1600)]
    with serving(*slow_arguments, "--disk-dir", str(tmp_path / "disk"), log_dir=tmp_path) as served:
        cold, sources = ask(served, prompt)
        assert sources["computed"] == len(prompt)
        for tier, cleared in (("host", ["device"]), ("disk", ["device", "host"])):
            wait_for_cache(served, "kvray_disk_blocks", len(prompt) // 16)
            answered, sources = ask_without_router(served, prompt, cleared)
            assert sources[tier] >= len(prompt) // 2, "most of it was not computed again"
            assert answered == cold
            served.wait_until_whole(1, 1, 60)
            wait_until_known(served, prompt, {"host", "disk"})  # the new router heard it from the node cache
            again, sources = ask(served, prompt)
            assert again == cold
            assert sources["computed"] < len(prompt) // 2
        served.wait_until_idle()


def ask_without_router(served: Served, prompt: list[int], cleared: list[str]) -> tuple[list[int], dict[str, int]]:
    """Kill the router, and ask before there is another one, when the prompt's blocks are gone from these tiers."""
    ends_s = time.monotonic() + 120
    while True:
        served.wait_until_whole(1, 1, 60)
        clear(served, prompt, cleared)
        [router] = served.replicas("Router")
        router.kill()
        router.wait(10)
        answered = ask(served, prompt)
        if not served.replicas("Router"):
            return answered
        assert time.monotonic() < ends_s, "a router is back sooner than a prompt is answered"


def clear(served: Served, prompt: list[int], tiers: list[str]) -> None:
    """Until nothing of the prompt lies in these tiers."""
    ends_s = time.monotonic() + 30
    while True:
        counts = post(served, "/v1/cache/clear", prompt=prompt, tiers=tiers, dry_run=False)["tiers"]
        if counts.keys() == set(tiers) and not any(one["blocks"] or one["in_use"] for one in counts.values()):
            return
        assert time.monotonic() < ends_s, counts
        time.sleep(0.1)


def wait_until_known(served: Served, prompt: list[int], tiers: set[str]) -> None:
    """Until the router knows the whole prompt in all these tiers."""
    ends_s = time.monotonic() + 30
    while not all((held := post(served, "/v1/cache/lookup", prompt=prompt)["tokens"]).get(t) == 1600 for t in tiers):
        assert time.monotonic() < ends_s, held
        time.sleep(0.2)


def post(served: Served, path: str, **body: object) -> dict:
    reply = httpx.post(f"{served.url}{path}", json=body, timeout=60)
    reply.raise_for_status()
    return reply.json()


@pytest.mark.long
def test_another_cluster_finds_in_a_bucket_what_this_one_computed(slow_arguments, swift, tmp_path):
    prompt = [random.Random(9).randrange(5, 250) for _ in range(1600)]
    remote = ["--remote", swift]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with serving(*slow_arguments, *remote, log_dir=tmp_path / "one") as served:
        cold, sources = ask(served, prompt)
        assert sources["computed"] == len(prompt)
        wait_for_cache(served, "kvray_remote_blocks", len(prompt) // 16)
        served.stop()
    with serving(*slow_arguments, *remote, log_dir=tmp_path / "two") as served:
        wait_for_cache(served, "kvray_remote_blocks", len(prompt) // 16)
        warm, sources = ask(served, prompt)
        assert sources["remote"] >= len(prompt) // 2, "most of it was not computed again"
        assert warm == cold
        served.wait_until_idle()


@pytest.mark.long
def test_every_answer_is_right_while_blocks_move_and_node_caches_are_killed_and_stopped(arguments, reference, tmp_path):
    asks = [ask for ask in mixed_asks(120, seed="tiers") if len(ask.prompt) < 1900] * 2
    check_beside_kills(arguments, reference, tmp_path, asks, NUM_KILLS)


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_of_every_kind_of_model_is_right_while_blocks_move(family, tmp_path):
    sizes = {"max_position_embeddings": 2048, **FAMILIES[family]}
    model_dir = make_tiny_model(tmp_path / "tiny", family, **sizes)
    memory = ["--kv-cache-memory", "6MiB", "--host-memory", "4MiB", "--disk-capacity", "64MiB"]
    arguments = [str(model_dir), "--dtype", "float32", "--prefill", "1", "--decode", "2", *memory]
    asks = [ask for ask in mixed_asks(230, seed=family) if len(ask.prompt) < 1900][:200] * 2
    check_beside_kills(arguments, Reference(model_dir), tmp_path, asks, num_kills=20)


def check_beside_kills(
    arguments: list[str], reference: Reference, tmp_path: Path, asks: list[Ask], num_kills: int
) -> None:
    """Ask all while the node cache is killed and stopped, time and again; no request fails, nothing is left behind."""
    with serving(*arguments, "--disk-dir", str(tmp_path / "disk"), log_dir=tmp_path) as served:

        async def kill_time_and_again() -> None:
            for number in range(num_kills):
                await asyncio.sleep(2.0)
                process = await asyncio.to_thread(node_cache, served)
                os.kill(process.pid, signal.SIGSTOP if number % 3 == 2 else signal.SIGKILL)

        async def ask_beside_kills():
            killing = asyncio.create_task(kill_time_and_again())
            answers = []
            async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=120) as client:
                while not answers or not killing.done():
                    answers = await ask_all(client, asks, concurrency=8)
                    for wanted, answer in zip(asks, answers, strict=True):
                        assert answer == wanted.expected(reference, answer)
            await killing

        asyncio.run(ask_beside_kills())
        prompt = [random.Random(8).randrange(5, 250) for _ in range(1600)]
        first, _ = ask(served, prompt)
        wait_for_cache(served, "kvray_cache_blocks_held", 1)  # a successor is there, and takes in what is new
        assert ask(served, prompt)[0] == first
        served.wait_until_idle()
