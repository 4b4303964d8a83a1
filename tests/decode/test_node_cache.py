"""Decode workers with a node cache in a process of its own, and a router: what left a pool comes back."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import time
from contextlib import asynccontextmanager
from unittest.mock import ANY

import pytest

from kvcache.names import block_names, pack_tokens
from kvrouter.router import RouterConfig
from kvrouter.worker import RouterWorker
from messages.fleet import WorkerInfo
from messages.price import MovePrice
from messages.request import HeldRun
from messages.route import Placement, RouteRequest
from nodecache.process import CacheOptions, CacheSettings
from nodecache.supervisor import Supervisor
from tests.models import make_tiny_model
from tests.workers import (
    CHANNEL,
    SECRET,
    Steps,
    borrower_of,
    engine_of,
    running_decode,
    until,
    worker_options,
)
from transport.channel import ChannelClient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BLOCK_SIZE = 16


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 250) for _ in range(length)]


def options_of(model_dir, *, engine=None, **settings):
    cache = CacheSettings(**{"host_memory_bytes": 4 << 20} | settings)
    return worker_options(model_dir, has_lower_tiers=True, cache=cache, **engine or {})


class Node:
    """A machine: whoever first wants its node cache starts it."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self._start: asyncio.Task[WorkerInfo] | None = None

    async def find(self, options: CacheOptions) -> WorkerInfo:
        if self._start is None:
            self.supervisor = Supervisor(options, SECRET)
            self._start = asyncio.get_running_loop().create_task(self.supervisor.start())
        await asyncio.shield(self._start)
        await until(lambda: self.supervisor.info, timeout_s=30)
        return self.supervisor.info

    async def close(self) -> None:
        if self.supervisor is not None:
            await self.supervisor.close()


class Router:
    """A router that subscribed to some workers."""

    def __init__(self, *workers: WorkerInfo) -> None:
        self.worker = RouterWorker("router", SECRET, "127.0.0.1", CHANNEL, RouterConfig(max_ttft_s=math.inf))
        self.worker.set_fleet(workers)
        self._answers: asyncio.Queue = asyncio.Queue()
        self._client = ChannelClient(
            SECRET, self.worker.address, self._answers.put_nowait, lambda _: None, config=CHANNEL
        )
        self._fingerprint = workers[0].fingerprint

    async def held(self, prompt: list[int]) -> tuple[HeldRun, ...]:
        """Where it says that blocks of this prompt lie; nobody is reserved for it."""
        names = block_names(self._fingerprint, b"", pack_tokens(prompt), BLOCK_SIZE)
        self._client.send(RouteRequest(request_id="asked", names=names, num_prompt_tokens=len(prompt), max_tokens=1))
        placement = await asyncio.wait_for(self._answers.get(), 5)
        assert isinstance(placement, Placement), placement
        return placement.held

    async def hears(self, prompt: list[int], tiers: set[str]) -> tuple[HeldRun, ...]:
        """Wait until all full blocks of this prompt lie in each of these tiers, and in no other."""
        async with asyncio.timeout(20):
            while True:
                held = await self.held(prompt)
                end = held[-1].end if held else 0
                if end == len(prompt) // BLOCK_SIZE and all({at.tier for at in run.copies} == tiers for run in held):
                    return held
                await asyncio.sleep(0.02)

    def close(self) -> None:
        self._client.close()
        self.worker.close()


def load_for_nothing(worker) -> None:
    """Let loading seem to cost nothing: the tiny model computes a block in a tenth of a millisecond."""
    scheduler = engine_of(worker).scheduler
    price_of = scheduler._sourcing.price_of
    free = MovePrice(source="", road="", fixed_s=0.0, byte_s=0.0, handoff_s=0.0)
    scheduler.set_prices(lambda copy: None if price_of(copy) is None else free)


@asynccontextmanager
async def running(model_dir, node: Node, *, engine=None, **settings):
    """A decode worker of this node, an ingress of it, and a router, after the node cache was found."""
    async with running_decode(options_of(model_dir, engine=engine, **settings), node.find) as (worker, ingress):
        load_for_nothing(worker)
        router = Router(ingress.info)
        await until(lambda: cache_of(worker), timeout_s=30)
        yield worker, ingress, router
        router.close()


def cache_of(worker) -> WorkerInfo | None:
    """The node cache that it uses, once it said where its blocks lie."""
    info = worker._worker._cache
    return info if info is not None and worker._worker.borrower.peers.layout_of(info.address) else None


@pytest.fixture
async def nodes():
    """Makes nodes; all are gone at the end."""
    made: list[Node] = []

    def make() -> Node:
        made.append(Node())
        return made[-1]

    yield make
    for node in made:
        await node.close()


async def ask(ingress, request_id: str, prompt: list[int], held=()) -> tuple[list[int], object]:
    answer = ingress.send(request_id, prompt, held=held)
    (token_ids,) = await ingress.finish(answer)
    return token_ids, answer.sources


async def test_what_left_the_pool_comes_back_from_host_also_to_another_worker_and_after_the_cache_was_killed(
    model_dir, reference, nodes
):
    node, prompt = nodes(), prompt_of(1, 330)
    wanted = reference.greedy(prompt, 16)
    async with running(model_dir, node) as (worker, ingress, router):
        tokens, sources = await ask(ingress, "cold", prompt)
        assert (tokens, sources.computed) == (wanted, 330)
        await router.hears(prompt, {"device", "host"})
        engine_of(worker).pool.clear()
        held = await router.hears(prompt, {"host"})
        tokens, sources = await ask(ingress, "from host", prompt, held)
        assert (tokens, sources.host, sources.computed) == (wanted, 320, 10)

        async with running_decode(options_of(model_dir), node.find) as (other, its_ingress):
            load_for_nothing(other)
            tokens, sources = await ask(its_ingress, "from host", prompt, held)
            assert (tokens, sources.host) == (wanted, 320)

        first = cache_of(worker)
        os.kill(node.supervisor.pid, signal.SIGKILL)
        fresh = prompt_of(2, 100)
        assert (await ask(ingress, "meanwhile", fresh))[0] == reference.greedy(fresh, 16)
        engine_of(worker).pool.clear()
        tokens, sources = await ask(ingress, "from nowhere", prompt, held)  # or from its successor, if it was quick
        assert tokens == wanted
        await until(lambda: cache_of(worker) not in (None, first), timeout_s=30)
        engine_of(worker).pool.clear()
        held = await router.hears(prompt, {"host"})
        assert held[0].copies[0].address == cache_of(worker).address != first.address
        tokens, sources = await ask(ingress, "from the successor", prompt, held)
        assert (tokens, sources.host, sources.computed) == (wanted, 320, 10)
        await until(lambda: not engine_of(worker).pool.num_used)
        assert (await ingress.stats())['kvray_blocks_rejected_total{reason="checksum"}'] == 0


@pytest.mark.parametrize("compression", ["off", "lossless", "int8"])
async def test_what_everybody_forgot_comes_back_from_the_bucket_to_who_keeps_it_alike(
    model_dir, reference, nodes, tmp_path, compression
):
    prompt = prompt_of(5, 330)
    wanted = reference.greedy(prompt, 16)
    remote = {"remote": str(tmp_path), "remote_compression": compression}
    node = nodes()
    async with running(model_dir, node, **remote) as (_, ingress, router):
        assert (await ask(ingress, "cold", prompt))[0] == wanted
        await router.hears(prompt, {"device", "host", "remote"})
        fingerprint = ingress.info.fingerprint
    await node.close()  # and lists what it wrote
    async with running(model_dir, nodes(), **remote) as (_, ingress, router):
        assert ingress.info.fingerprint == fingerprint
        held = await router.hears(prompt, {"remote"})
        tokens, sources = await ask(ingress, "from the bucket", prompt, held)
        assert (sources.remote, sources.computed) == (320, 10)
        assert tokens == wanted or compression == "int8"
    other = {"remote": str(tmp_path), "remote_compression": "int8" if compression != "int8" else "lossless"}
    async with running(model_dir, nodes(), **other) as (worker, ingress, router):
        assert await router.held(prompt) == ()
        tokens, sources = await ask(ingress, "cold", prompt)
        assert (tokens, sources.computed) == (wanted, 330)
        await until(lambda: not engine_of(worker).pool.num_used)


async def test_what_everybody_forgot_comes_back_from_disk(model_dir, reference, nodes, tmp_path):
    prompt = prompt_of(3, 330)
    wanted = reference.greedy(prompt, 16)
    disk = {"disk_dir": str(tmp_path), "disk_capacity_bytes": 64 << 20}
    node = nodes()
    async with running(model_dir, node, **disk) as (_, ingress, router):
        assert (await ask(ingress, "cold", prompt))[0] == wanted
        await router.hears(prompt, {"device", "host", "disk"})
    await node.close()
    async with running(model_dir, nodes(), **disk) as (worker, ingress, router):
        held = await router.hears(prompt, {"disk"})
        tokens, sources = await ask(ingress, "from disk", prompt, held)
        assert (tokens, sources.disk, sources.computed) == (wanted, 320, 10)
        await until(lambda: not engine_of(worker).pool.num_used)


async def test_without_a_router_the_nodes_cache_is_asked_after_a_restart_and_when_it_is_killed_it_is_computed(
    model_dir, reference, nodes, tmp_path
):
    prompt = prompt_of(4, 330)
    wanted = reference.greedy(prompt, 16)
    disk = {"disk_dir": str(tmp_path), "disk_capacity_bytes": 64 << 20}
    node = nodes()
    async with running(model_dir, node, **disk) as (worker, ingress, router):
        assert (await ask(ingress, "cold", prompt, None))[0] == wanted
        await router.hears(prompt, {"device", "host", "disk"})
        engine_of(worker).pool.clear()
        tokens, sources = await ask(ingress, "from host", prompt, None)
        assert (tokens, sources.host, sources.computed) == (wanted, 320, 10)
    await node.close()
    node = nodes()
    async with running(model_dir, node, **disk) as (worker, ingress, _):
        tokens, sources = await ask(ingress, "from disk", prompt, None)
        assert (tokens, sources.disk + sources.host, sources.computed) == (wanted, 320, 10)
        os.kill(node.supervisor.pid, signal.SIGSTOP)
        engine_of(worker).pool.clear()
        tokens, sources = await ask(ingress, "from nowhere", prompt, None)
        assert tokens == wanted
        await until(lambda: not engine_of(worker).pool.num_used)


async def test_what_a_waiting_sequence_wants_of_a_disk_lies_in_the_pool_when_it_is_admitted(
    model_dir, reference, nodes, tmp_path
):
    first, second, third = prompt_of(5, 100), prompt_of(6, 130), prompt_of(7, 130)
    disk = {"disk_dir": str(tmp_path), "disk_capacity_bytes": 64 << 20}
    node = nodes()
    async with running(model_dir, node, **disk) as (_, ingress, router):
        for prompt in (second, third):
            await ask(ingress, f"cold {prompt[0]}", prompt)
            await router.hears(prompt, {"device", "host", "disk"})
    await node.close()
    node = nodes()
    async with running(model_dir, node, engine={"max_num_seqs": 1}, **disk) as (worker, ingress, router):
        steps = Steps(worker)
        steps.hold("first", after=1)
        running_first = ingress.send("first", first)
        await until(lambda: steps.is_holding)
        answer = ingress.send("second", second, held=await router.hears(second, {"disk"}))
        left = ingress.send("third", third, held=await router.hears(third, {"disk"}))
        for prompt in (second, third):
            held = await router.hears(prompt, {"disk", "host", "device"})
            addresses = {at.address for run in held for at in run.copies}
            assert addresses == {cache_of(worker).address, ingress.info.address}
        assert engine_of(worker).pool.num_used == 7  # the first one's: who waits pins nothing
        ingress.cancel("third")
        steps.go_on()
        assert await ingress.finish(running_first, answer) == [reference.greedy(p, 16) for p in (first, second)]
        assert (answer.sources.host, answer.sources.disk, answer.sources.computed) == (128, 0, 2)
        assert left.token_ids == []
        await until(lambda: not engine_of(worker).pool.num_used)
        assert not borrower_of(worker)._book._loans


async def test_a_cache_that_dies_while_who_waits_takes_in_from_it_leaves_that_to_be_computed(
    model_dir, reference, nodes
):
    first, second = prompt_of(5, 100), prompt_of(6, 130)
    node = nodes()
    async with running(model_dir, node, engine={"max_num_seqs": 1}) as (worker, ingress, router):
        await ask(ingress, "cold", second)
        await router.hears(second, {"device", "host"})
        engine_of(worker).pool.clear()
        held = await router.hears(second, {"host"})
        steps = Steps(worker)
        steps.hold("first", after=1)
        running_first = ingress.send("first", first)
        await until(lambda: steps.is_holding)
        os.kill(node.supervisor.pid, signal.SIGSTOP)
        answer = ingress.send("second", second, held=held)
        await until(lambda: engine_of(worker).pool.num_used == 7 + 8)  # it waits for the cache's answer
        await until(lambda: engine_of(worker).pool.num_used == 7)  # until that is lost
        steps.go_on()
        assert await ingress.finish(running_first, answer) == [reference.greedy(p, 16) for p in (first, second)]
        assert answer.sources.host == 0
        await until(lambda: not engine_of(worker).pool.num_used)
        assert not borrower_of(worker)._book._loans


@pytest.mark.long
@pytest.mark.timeout(3000)
async def test_128_k_tokens_come_back_from_host_and_from_disk(nodes, tmp_path):
    num_tokens = 128 << 10
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model_dir = make_tiny_model(
        tmp_path / "model", num_hidden_layers=2, max_position_embeddings=num_tokens + 64, **sizes
    )
    prompt = prompt_of(5, num_tokens)
    settings = {"host_memory_bytes": 64 << 20, "disk_dir": str(tmp_path / "disk"), "disk_capacity_bytes": 256 << 20}

    async def answer(ingress, request_id: str, held=()) -> tuple[list[int], object]:
        began_s = time.monotonic()
        asked = ingress.send(request_id, prompt, held=held)
        (tokens,) = await ingress.finish(asked, timeout_s=1500)
        print(f"{request_id}: {time.monotonic() - began_s:.3f} s")
        return tokens, asked.sources

    node = nodes()
    options = {"kv_cache_bytes": 48 << 20}
    async with running(model_dir, node, engine=options, **settings) as (worker, ingress, router):
        cold, sources = await answer(ingress, "computed")
        assert sources.computed == num_tokens
        await router.hears(prompt, {"device", "host", "disk"})
        assert await answer(ingress, "from the pool") == (cold, ANY)
        engine_of(worker).pool.clear()
        held = await router.hears(prompt, {"host", "disk"})
        tokens, sources = await answer(ingress, "from host", held)
        assert (tokens, sources.host) == (cold, num_tokens - 16)
    await node.close()
    async with running(model_dir, nodes(), engine=options, **settings) as (worker, ingress, router):
        held = await router.hears(prompt, {"disk"})
        tokens, sources = await answer(ingress, "from disk", held)
        assert (tokens, sources.disk) == (cold, num_tokens - 16)
        await until(lambda: not engine_of(worker).pool.num_used)
