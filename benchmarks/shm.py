"""Pulling blocks over the node's shared memory, beside memcpy and a TCP socket, in the same run.

    python benchmarks/shm.py                    every cell
    python benchmarks/shm.py --quick            two cells, within 60 s
    python benchmarks/shm.py --record           also append to benchmarks/results/shm.jsonl

A cell is a block size and a number of blocks, pulled from random places of another process's pool into random places
of the own one; contenders take turns, medians count. memcpy copies between two pools of one process, block by block;
the socket is plain TCP on loopback, the sender waking up to send each block (sendall, recv_into).
Goal: at least 0.8 of memcpy, and the event loop never waits longer than 20 ms for a pull (99th percentile).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from statistics import median, quantiles

import msgspec
import numpy as np
from harness.report import ROOT, goal, hardware, parser, record

from messages.handoff import RegionInfo
from transport.memory import Memory
from transport.protocol import Copy
from transport.shm import ShmTransport

KIB, MIB = 1 << 10, 1 << 20
SEED = 1
MIN_OF_MEMCPY = 0.8
MAX_LAG_MS = 20.0


def own_pool(pool_bytes: int) -> None:
    """The other process: registers a pool, says where, then serves ranges of it over TCP until its input ends."""
    memory = Memory.allocate(pool_bytes)
    np.frombuffer(memory.view, np.uint8)[:] = 7
    listener = socket.create_server(("127.0.0.1", 0))
    region = msgspec.to_builtins(ShmTransport().register(memory))
    print(json.dumps({"region": region, "port": listener.getsockname()[1]}), flush=True)
    threading.Thread(target=serve_ranges, args=(listener, memory), daemon=True).start()
    sys.stdin.read()


def serve_ranges(listener: socket.socket, memory: Memory) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    requests = connection.makefile("r")
    for line in requests:
        for offset, length in json.loads(line):
            connection.sendall(memory.view[offset : offset + length])


class Puller:
    """The measuring side: one target pool, three ways to fill it."""

    def __init__(self, region: RegionInfo, port: int, pool_bytes: int) -> None:
        self.region = region
        self.transport = ShmTransport()
        self.target = Memory.allocate(pool_bytes)
        self.into = np.frombuffer(self.target.view, np.uint8)
        self.local = np.frombuffer(Memory.allocate(pool_bytes).view, np.uint8)
        self.local[:] = 7
        self.into[:] = 0
        self.connection = socket.create_connection(("127.0.0.1", port))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def shm(self, copies: list[Copy]) -> None:
        """What the product does."""
        await self.transport.pull(self.region, copies, self.target, timeout_s=60)

    async def memcpy(self, copies: list[Copy]) -> None:
        """Within this process."""
        for source, target, length in copies:
            self.into[target : target + length] = self.local[source : source + length]

    async def tcp(self, copies: list[Copy]) -> None:
        """Ask, then receive each block where it belongs."""
        self.connection.sendall(json.dumps([(copy.source_offset, copy.num_bytes) for copy in copies]).encode() + b"\n")
        for _, target, length in copies:
            view = self.target.view[target : target + length]
            while view:
                view = view[self.connection.recv_into(view) :]


async def measure(puller: Puller, block_bytes: int, num_blocks: int, budget_s: float) -> dict[str, float]:
    """Median GB/s of each contender, which take turns."""
    rng = random.Random(SEED)
    places = puller.target.num_bytes // block_bytes
    seconds: dict[str, list[float]] = {"memcpy": [], "shm": [], "tcp": []}
    ends_s = time.perf_counter() + budget_s
    while time.perf_counter() < ends_s or len(seconds["tcp"]) < 5:
        sources, targets = rng.sample(range(places), num_blocks), rng.sample(range(places), num_blocks)
        copies = [
            Copy(source * block_bytes, target * block_bytes, block_bytes)
            for source, target in zip(sources, targets, strict=True)
        ]
        for name, taken in seconds.items():
            started = time.perf_counter()
            await getattr(puller, name)(copies)
            taken.append(time.perf_counter() - started)
    num_bytes = block_bytes * num_blocks
    # The first turns touch pages for the first time.
    return {name: num_bytes / median(taken[1:]) / 1e9 for name, taken in seconds.items()}


async def loop_lag_ms(puller: Puller) -> float:
    """99th percentile of how late a 1 ms sleep comes back while 64 MiB are pulled over and over."""
    stop = asyncio.Event()

    async def pull() -> None:
        while not stop.is_set():
            await puller.shm([Copy(0, 0, 64 * MIB)])

    task = asyncio.create_task(pull())
    lags = []
    for _ in range(500):
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        lags.append(1e3 * (time.perf_counter() - started - 0.001))
    stop.set()
    await task
    return quantiles(lags, n=100)[98]


@contextlib.contextmanager
def other_process(pool_bytes: int) -> Iterator[tuple[RegionInfo, int]]:
    """A process that owns a pool."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--own-pool", str(pool_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        described = json.loads(process.stdout.readline())
        yield msgspec.convert(described["region"], RegionInfo), described["port"]
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    options = parser(__doc__, "shm", quick="two cells")
    options.add_argument("--own-pool", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.own_pool:
        own_pool(args.own_pool)
        return
    cells = [(size, num) for size in (64 * KIB, 512 * KIB, 2 * MIB) for num in (1, 16, 256)]
    if args.quick:
        cells = [(512 * KIB, 16), (512 * KIB, 256)]
    pool_bytes = 256 * MIB if args.quick else 1024 * MIB
    results: dict[str, dict[str, float]] = {}
    with other_process(pool_bytes) as (region, port):
        puller = Puller(region, port, pool_bytes)
        print(
            f"{hardware()}; GB/s, medians\n{'block':>9}{'blocks':>8}{'memcpy':>9}{'shm':>9}{'tcp':>9}{'of memcpy':>11}"
        )
        for block_bytes, num_blocks in cells:
            rates = asyncio.run(measure(puller, block_bytes, num_blocks, budget_s=2 if args.quick else 8))
            results[f"{block_bytes // KIB} KiB x {num_blocks}"] = rates
            columns = "".join(f"{rate:9.2f}" for rate in rates.values())
            share = rates["shm"] / rates["memcpy"]
            print(f"{block_bytes // KIB:5d} KiB{num_blocks:8d}{columns}{share:11.2f}", flush=True)
        lag_ms = asyncio.run(loop_lag_ms(puller))
        puller.connection.close()
        puller.transport.close()
    if args.record:
        record("shm", {"cells": results, "loop_lag_p99_ms": lag_ms})
    for cell, rates in results.items():
        share = rates["shm"] / rates["memcpy"]
        print(goal(f"shm of memcpy, {cell}", share, at_least=MIN_OF_MEMCPY))
    print(goal("event loop lag while pulling", lag_ms, under=MAX_LAG_MS, unit=" ms"))


if __name__ == "__main__":
    main()
