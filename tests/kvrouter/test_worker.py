import asyncio
import subprocess
import sys
import time

import msgspec
import pytest

from kvrouter.router import TimePassed
from kvrouter.worker import RouterWorker
from messages.fleet import (
    GetStats,
    KvEvents,
    LoadReport,
    NodeCacheFound,
    SpareBlocks,
    Stats,
    Subscribe,
    WorkerInfo,
)
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from transport.channel import ChannelClient, ChannelConfig, ChannelServer
from transport.secret import ClusterSecret

SECRET = ClusterSecret(b"\x05" * 32)
CHANNEL = ChannelConfig(heartbeat_s=0.1, lost_after_s=0.5, connect_timeout_s=1.0)


def worker_info(worker_id, address, role="decode"):
    return WorkerInfo(
        worker_id=worker_id, role=role, address=address, node_id="n", fingerprint=b"f", block_size=16,
        num_blocks=100, block_bytes=1000, max_model_len=1000, max_num_seqs=8, roads=("shm",),
    )  # fmt: skip


def load(worker_id):
    return LoadReport(
        worker_id=worker_id, queued_s=0.0, num_waiting=0, num_running=0, free_blocks=100,
        decode_step_s=0.05,
    )  # fmt: skip


def names(num_blocks):
    return b"".join(i.to_bytes(16, "big") for i in range(num_blocks))


class FakeWorker:
    """Answers Subscribe with a snapshot of `held` blocks, and takes note of what else it is told."""

    def __init__(self, worker_id, held=0, role="decode"):
        self.worker_id = worker_id
        self.held = held
        self.num_subscribed = 0
        self.peer = None
        self.told = []
        self.lost = []
        self.channel = ChannelServer(SECRET, "127.0.0.1", self._on_message, self.lost.append, CHANNEL)
        self.info = worker_info(worker_id, self.channel.address, role)

    def say(self, message):
        self.channel.send(self.peer, message)

    def _on_message(self, peer, message):
        if not isinstance(message, Subscribe):
            self.told.append(message)
            return
        self.peer = peer
        self.num_subscribed += 1
        self.channel.send(peer, KvEvents(worker_id=self.worker_id, seq=0, cleared=True, stored=names(self.held)))
        self.channel.send(peer, load(self.worker_id))


class FakeIngress:
    def __init__(self, address):
        self.answers = asyncio.Queue()
        self.channel = ChannelClient(SECRET, address, self.answers.put_nowait, lambda reason: None, config=CHANNEL)

    async def ask(self, message):
        self.channel.send(message)
        return await asyncio.wait_for(self.answers.get(), 5)

    async def route(self, request_id="r"):
        return await self.ask(RouteRequest(request_id=request_id, names=names(10), num_prompt_tokens=165, max_tokens=5))


@pytest.fixture
async def setting():
    router = RouterWorker("router-1", SECRET, "127.0.0.1", CHANNEL)
    ingress = FakeIngress(router.address)
    closing = [router, ingress.channel]
    yield router, ingress, closing
    for item in closing:
        item.close()


async def eventually(predicate, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while True:
            if predicate():
                return
            await asyncio.sleep(0.01)


def num_workers(router):
    return router.router.stats()["kvray_router_workers"]


def num_names(router):
    return router.router.stats()["kvray_router_index_names"]


async def test_prompt_goes_to_the_worker_that_holds_it(setting):
    router, ingress, closing = setting
    workers = [FakeWorker("cold"), FakeWorker("warm", held=10)]
    closing += [worker.channel for worker in workers]
    assert isinstance(await ingress.route(), RouteFailed)
    router.set_fleet([worker.info for worker in workers])
    await eventually(lambda: num_workers(router) == 2 and num_names(router) == 10)
    placement = await ingress.route()
    assert isinstance(placement, Placement)
    assert (placement.decode_worker, placement.decode_match_tokens) == ("warm", 160)


async def test_gap_makes_it_subscribe_again(setting):
    router, _, closing = setting
    worker = FakeWorker("w")
    closing.append(worker.channel)
    router.set_fleet([worker.info])
    await eventually(lambda: worker.num_subscribed == 1)
    worker.held = 5
    worker.channel.send(worker.peer, KvEvents(worker_id="w", seq=7))
    await eventually(lambda: worker.num_subscribed == 2 and num_names(router) == 5)


async def test_fleet_change_drops_who_left_and_keeps_who_stays(setting):
    router, ingress, closing = setting
    workers = [FakeWorker("a", held=10), FakeWorker("b")]
    closing += [worker.channel for worker in workers]
    router.set_fleet([worker.info for worker in workers])
    await eventually(lambda: num_names(router) == 10 and num_workers(router) == 2)
    router.set_fleet([workers[1].info])
    placement = await ingress.route()
    assert (placement.decode_worker, placement.decode_match_tokens) == ("b", 0)
    assert workers[1].num_subscribed == 1


async def test_worker_whose_channel_breaks_is_dropped_and_taken_back_when_it_answers(setting):
    router, _, closing = setting
    worker = FakeWorker("w", held=3)
    router.set_fleet([worker.info])
    await eventually(lambda: num_names(router) == 3)
    worker.channel.close()
    await eventually(lambda: num_workers(router) == 0)
    host, port = worker.info.address.rpartition("@")[2].split(":")
    relay_target = FakeWorker("w", held=4)
    closing.append(relay_target.channel)
    relay = await _relay(host, int(port), relay_target.info.address)
    try:
        await eventually(lambda: num_workers(router) == 1 and relay_target.num_subscribed == 1)
    finally:
        router.set_fleet([])
        relay.close()


async def test_ingress_that_vanishes_leaves_no_reservation(setting):
    router, ingress, closing = setting
    worker = FakeWorker("w")
    closing.append(worker.channel)
    router.set_fleet([worker.info])
    await eventually(lambda: num_workers(router) == 1)
    await ingress.route("a")
    await ingress.route("b")
    ingress.channel.send(RequestEnded(request_id="a"))
    await eventually(lambda: router.router.stats()["kvray_router_requests"] == 1)
    ingress.channel.close()
    await eventually(lambda: router.router.stats()["kvray_router_requests"] == 0)
    router.router.check_invariants()


async def test_stats_answer_by_name(setting):
    _, ingress, _ = setting
    await ingress.route()
    stats = await ingress.ask(GetStats(query_id="q"))
    assert isinstance(stats, Stats)
    assert (stats.query_id, stats.worker_id, stats.role) == ("q", "router-1", "router")
    assert stats.values['kvray_router_refused_total{kind="CapacityError"}'] == 1


async def test_workers_are_told_what_is_spare(setting):
    router, _, closing = setting
    workers = [FakeWorker("a", held=2), FakeWorker("b")]
    closing += [worker.channel for worker in workers]
    router.set_fleet([worker.info for worker in workers])
    await eventually(lambda: num_workers(router) == 2 and num_names(router) == 2)
    workers[1].say(KvEvents(worker_id="b", seq=1, stored=names(1)))
    await eventually(lambda: workers[0].told)
    assert workers[0].told == [SpareBlocks(spare=names(1))]
    workers[1].say(KvEvents(worker_id="b", seq=2, removed=names(1)))
    await eventually(lambda: len(workers[0].told) == 2)
    assert workers[0].told[1] == SpareBlocks(kept=names(1))


async def test_the_node_cache_that_a_worker_found_is_listened_to_until_its_worker_leaves_or_loses_it(setting):
    router, ingress, closing = setting
    workers, cache = [FakeWorker("a"), FakeWorker("b")], FakeWorker("cache", held=10, role="cache")
    closing += [*(worker.channel for worker in workers), cache.channel]
    router.set_fleet([worker.info for worker in workers])
    await eventually(lambda: all(worker.num_subscribed for worker in workers))
    for worker in workers:
        worker.say(NodeCacheFound(worker_id=worker.worker_id, info=cache.info))
    await eventually(lambda: num_workers(router) == 3 and num_names(router) == 10)
    assert cache.num_subscribed == 1
    cache.say(Stats(query_id="", worker_id="cache", role="cache", values={"kvray_blocks": 64.0}))
    cache.say(Stats(query_id="", worker_id="a", role="decode", values={}))  # not its own: ignored
    await eventually(lambda: router._cache_stats)
    placement = await ingress.route()
    assert {copy.address for run in placement.held for copy in run.copies} == {cache.info.address}
    (told,) = (await ingress.ask(GetStats(query_id="q"))).caches
    assert (told.info, told.values) == (cache.info, {"kvray_blocks": 64.0})
    workers[0].say(NodeCacheFound(worker_id="a", info=None))
    await eventually(lambda: list(router._caches) == ["b"])
    assert num_workers(router) == 3  # the other one has it still
    router.set_fleet([workers[0].info])
    await eventually(lambda: cache.lost)
    assert num_workers(router) == 1
    assert (await ingress.ask(GetStats(query_id="q2"))).caches == ()


async def test_a_successor_of_a_node_cache_takes_its_place(setting):
    router, _, closing = setting
    worker = FakeWorker("w")
    caches = [FakeWorker("first", held=3, role="cache"), FakeWorker("second", held=5, role="cache")]
    closing += [worker.channel, *(cache.channel for cache in caches)]
    router.set_fleet([worker.info])
    await eventually(lambda: worker.num_subscribed == 1)
    for cache in caches:
        worker.say(NodeCacheFound(worker_id="w", info=cache.info))
        await eventually(lambda cache=cache: cache.num_subscribed == 1)
    await eventually(lambda: caches[0].lost)
    router.router.on_event(TimePassed(), time.monotonic())
    await eventually(lambda: num_names(router) == 5)
    assert num_workers(router) == 2


WORKER_PROCESS = """
import asyncio, sys, msgspec
from messages.fleet import KvEvents
from transport.channel import ChannelServer
from transport.secret import ClusterSecret

async def main():
    def answer(peer, message):
        server.send(peer, KvEvents(worker_id="w", seq=0, cleared=True, stored=bytes(16)))
    server = ChannelServer(ClusterSecret(bytes([5]) * 32), "127.0.0.1", answer, lambda peer: None)
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def worker_process():
    process = subprocess.Popen([sys.executable, "-c", WORKER_PROCESS], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


async def test_killed_worker_is_not_placed_on_a_moment_later(setting, worker_process):
    router, ingress, _ = setting
    router.set_fleet([worker_info("w", worker_process.stdout.readline().strip())])
    await eventually(lambda: num_names(router) == 1)
    worker_process.kill()
    await eventually(lambda: num_workers(router) == 0, timeout_s=0.8)
    failed = await ingress.route()
    assert isinstance(failed, RouteFailed)
    assert failed.error.status == 503


def test_worker_info_survives_as_metadata():
    info = worker_info("w", "tcp://127.0.0.1:1")
    assert msgspec.convert(msgspec.to_builtins(info), WorkerInfo) == info


async def _relay(host, port, target):
    """A plain TCP listener at host:port that passes bytes on to `target`: the worker came back at its old address."""
    target_host, target_port = target.rpartition("@")[2].split(":")

    async def pass_on(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        writer.close()

    async def serve(reader, writer):
        to_target = await asyncio.open_connection(target_host, int(target_port))
        await asyncio.gather(pass_on(reader, to_target[1]), pass_on(to_target[0], writer))

    return await asyncio.start_server(serve, host, port)
