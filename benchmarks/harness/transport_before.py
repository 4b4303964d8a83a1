"""The shm road of one checkout of kvray and of another, as contenders that take turns.

    async with build("before", directory, pool_bytes) as pulls:             {"before": ..., "before+sum": ...}
        seconds = await pulls["before+sum"](copies)

A checkout's modules, and its benchmark's way to pull, run in processes of their own: one owns a pool, the other pulls
into its own one and measures. What the first pulls bring is compared there. Only what is measured so may be compared
with it: what this process ran just before is not in that one's caches.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

from harness.transport_cells import SEED, SUM, Pull
from harness.transport_peer import PeerSpec, connected, open_all, peer_process
from harness.transport_pool import filled
from transport.memory import Memory
from transport.protocol import Copy
from transport.secret import ClusterSecret

_ROAD = "shm"


@contextlib.asynccontextmanager
async def build(name: str, directory: Path, pool_bytes: int) -> AsyncIterator[dict[str, Pull]]:
    """Run the two processes until the block ends. Pulls return the seconds that they took.

    Raises:
        RuntimeError: they did not start.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # or this file's directory would come first, with modules that others are named like
        __file__,
        str(directory),
        str(pool_bytes),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), str(directory / "benchmarks")])},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    writer, reader = process.stdin, process.stdout

    def pull_as(road: str) -> Pull:
        async def pull(copies: Sequence[Copy]) -> float:
            writer.write(msgspec.json.encode((road, copies)) + b"\n")
            return msgspec.json.decode(await reader.readline(), type=float)

        return pull

    try:
        if not await reader.readline():
            raise RuntimeError(f"the build in {directory} did not start; what it said stands above")
        yield {name: pull_as(_ROAD), name + SUM: pull_as(_ROAD + SUM)}
    finally:
        writer.close()
        await process.wait()


# ------------------------------------------------------------------------------------------- run by the other checkout


async def serve(directory: Path, pool_bytes: int) -> None:
    """Answer each line, a contender's name and its copies, with the seconds that they took, until the input ends."""
    secret = ClusterSecret.generate()
    spec = PeerSpec(secret=secret.hex(), pool_bytes=pool_bytes, seed=SEED, roads=(_ROAD,))
    source, target = filled(pool_bytes, SEED), Memory.allocate(pool_bytes)
    async with peer_process(spec) as hello:
        transports, _ = open_all(spec.roads, secret)
        peer = await connected(secret, hello.address, transports, target, Memory.allocate(1 << 20))
        pulls = _benchmark_of(directory).road_pulls(peer, _ROAD, target)
        for pull in pulls.values():  # every page is touched before anything counts
            await pull([Copy(0, 0, pool_bytes)])
            assert np.array_equal(np.frombuffer(target.view, np.uint8), np.frombuffer(source.view, np.uint8))
        print("ready", flush=True)
        while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
            name, copies = msgspec.json.decode(line, type=tuple[str, list[tuple[int, int, int]]])
            wanted = list(map(Copy._make, copies))
            started_s = time.perf_counter()
            await pulls[name](wanted)
            print(time.perf_counter() - started_s, flush=True)
        peer.close()


def _benchmark_of(directory: Path) -> Any:
    """Load benchmarks/transport.py, whose name is that of a room."""
    spec = importlib.util.spec_from_file_location("benchmark_before", directory / "benchmarks" / "transport.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
