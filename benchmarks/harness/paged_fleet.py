"""A large fleet as the placement page sees it: a router that knows millions of names, workers that tell their numbers.

Both are in a process of their own, as they are elsewhere in a deployment.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median

from kvcache.names import block_names, pack_tokens
from kvrouter.gauges import GAUGES
from kvrouter.router import RouterConfig, WorkerJoined
from kvrouter.worker import RouterWorker
from messages.fleet import GetStats, KvEvents, LoadReport, RoadStatus, Stats, WorkerInfo
from messages.price import ComputePrice
from messages.route import RequestEnded, RouteRequest
from messages.view import AskView
from transport.channel import ChannelConfig, ChannelServer, PeerId
from transport.secret import ClusterSecret

SECRET = ClusterSecret(b"\x07" * 32)
BLOCK_SIZE = 16
_EVENT_NAMES = 4096
_NUM_PROMPTS = 2000  #: placed before anybody looks, of as many conversations with one of ten system prompts
_PROMPT_BLOCKS = 128
_OTHER_NUMBERS = 60  #: that a worker tells besides those that the page shows


class ToldWorker:
    """A worker that answers with numbers, as many as a real one has."""

    def __init__(self, number: int, num_names: int) -> None:
        self.server = ChannelServer(SECRET, "127.0.0.1", self._on_message, lambda _: None)
        self.info = WorkerInfo(
            worker_id=f"decode-{number:08x}",
            role="prefill" if number % 4 == 0 else "decode",
            address=self.server.address,
            node_id=f"{number // 8:056x}",
            fingerprint=b"f",
            block_size=BLOCK_SIZE,
            num_blocks=2 * num_names,
            block_bytes=131072,
            max_model_len=131072,
            max_num_seqs=256,
            roads=("shm", "ucx", "socket"),
        )
        self._values = {f"kvray_other_{one}_total": float(one) for one in range(_OTHER_NUMBERS)}
        self._values |= {
            "kvray_cache_blocks_held": float(num_names),
            "kvray_blocks_hit_total": 12345.0,
            "kvray_blocks_evicted_total": 678.0,
            "kvray_blocks_free": 100.0,
            "kvray_decode_step_seconds": 0.01,
            'kvray_transfer_bytes_total{road="shm"}': 1e9,
            'kvray_transfer_seconds_total{road="shm"}': 1.0,
        }

    def _on_message(self, peer: PeerId, message: object) -> None:
        if isinstance(message, GetStats):
            roads = tuple(
                RoadStatus(peer=f"tcp://x{one}:1", road="shm", carriers="memcpy", bytes_per_s=1e9, num_failed=0)
                for one in range(8)
            )
            stats = Stats(
                query_id=message.query_id,
                worker_id=self.info.worker_id,
                role=self.info.role,
                values=self._values,
                roads=roads,
            )
            self.server.send(peer, stats)


@contextmanager
def paged_fleet(num_workers: int, num_names: int) -> Iterator[tuple[list[WorkerInfo], str, Connection]]:
    """Run them: the workers, the router's address, and a connection on which the router's figures can be asked for."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(there, num_workers, num_names))
    process.start()
    try:
        infos, address = here.recv()
        yield infos, address, here
        here.send("end")
    finally:
        process.join(5)
        process.kill()


def router_figures(connection: Connection) -> dict[str, float]:
    """Ask how long the router is held, in milliseconds."""
    connection.send("figures")
    figures: dict[str, float] = connection.recv()
    return figures


def _run(connection: Connection, num_workers: int, num_names: int) -> None:
    asyncio.run(_serve(connection, num_workers, num_names))


async def _serve(connection: Connection, num_workers: int, num_names: int) -> None:
    workers = [ToldWorker(number, num_names // num_workers) for number in range(num_workers)]
    router = RouterWorker("router-1", SECRET, "127.0.0.1", ChannelConfig(), RouterConfig(is_observed=True))
    count_us = _fill(router, workers, num_names // num_workers)
    connection.send(([worker.info for worker in workers], router.address))
    while True:
        while not connection.poll():  # noqa: ASYNC110 - a pipe, not a socket of this loop
            await asyncio.sleep(0.02)
        if connection.recv() == "end":
            return
        connection.send({**_figures(router, workers), "count_us": count_us})


def _fill(router: RouterWorker, workers: list[ToldWorker], num_names: int) -> float:
    """Have the router know all names, and place prompts; return the microseconds that counting one of these takes."""
    rng = random.Random(1)
    now_s = time.monotonic()
    systems = [[rng.randrange(50_000) for _ in range(64 * BLOCK_SIZE)] for _ in range(10)]
    prompts = []
    for _ in range(_NUM_PROMPTS):
        tail = [rng.randrange(50_000) for _ in range((_PROMPT_BLOCKS - 64) * BLOCK_SIZE)]
        prompts.append(block_names(b"f", b"", pack_tokens(rng.choice(systems) + tail), BLOCK_SIZE))
    for number, worker in enumerate(workers):
        info = worker.info
        router.router.on_event(WorkerJoined(info), now_s)
        stored = b"".join(prompts[number::4][:20]) + rng.randbytes(16 * num_names)
        for seq, begin in enumerate(range(0, len(stored), 16 * _EVENT_NAMES)):
            piece = stored[begin : begin + 16 * _EVENT_NAMES]
            event = KvEvents(worker_id=info.worker_id, seq=seq, cleared=seq == 0, stored=piece)
            router.router.on_event(event, now_s)
        report = LoadReport(
            worker_id=info.worker_id, queued_s=0.1, num_waiting=1, num_running=20, free_blocks=100,
            decode_step_s=0.01, compute=ComputePrice(step_s=0.001, token_s=1e-5),
        )  # fmt: skip
        router.router.on_event(report, now_s)
    for number, names in enumerate(prompts):
        asked = RouteRequest(
            request_id=f"r{number}", names=names, num_prompt_tokens=_PROMPT_BLOCKS * BLOCK_SIZE + 5, max_tokens=16
        )
        router.router.on_event(asked, now_s)
        router.router.on_event(RequestEnded(request_id=asked.request_id), now_s)
    hot = router.router._hot
    assert hot is not None
    begin_s = time.perf_counter()
    for number, names in enumerate(prompts):
        hot.count(names, f"r{number}", 0, BLOCK_SIZE, now_s)
    return 1e6 * (time.perf_counter() - begin_s) / len(prompts)


def _figures(router: RouterWorker, workers: list[ToldWorker]) -> dict[str, float]:
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(f"bench_{name}", tag_keys=kind.labels) for name, kind in GAUGES.items()}
    infos = {worker.info.worker_id: worker.info for worker in workers}

    def show() -> None:
        now_s = time.monotonic()
        told = router.router.view(AskView(query_id="", num_prefixes=5), now_s)
        for name, labels, value in router._gauges.samples(told, infos, [], now_s):
            gauges[name].set(value, labels)

    show()
    return {
        "view_ms": _timed_ms(lambda: router.router.view(AskView(query_id=""), time.monotonic())),
        "gauges_ms": _timed_ms(show),
        "names": float(router.router.stats()["kvray_router_index_names"]),
    }


def _timed_ms(call: object) -> float:
    assert callable(call)
    taken = []
    for _ in range(20):
        begin_s = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - begin_s))
    return median(taken)
