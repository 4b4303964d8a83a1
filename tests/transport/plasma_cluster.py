"""Run by test_plasma.py: two nodes of a Ray of its own, a producer on one, a puller on the other.

Prints one JSON object: what each scenario saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import msgspec
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from messages.handoff import RegionInfo
from transport.memory import Memory
from transport.plasma.actor import RayVaults
from transport.plasma.road import PlasmaTransport, _Handle, _handle_of
from transport.plasma.vault import VaultLimits
from transport.protocol import Copy, Link, TransferError

BLOCK = 256 << 10
NUM_BLOCKS = 256
SIZE = BLOCK * NUM_BLOCKS
#: 64 scattered blocks, 16 MiB
PICKED = random.Random(2).sample(range(NUM_BLOCKS), 64)
COPIES = [Copy(i * BLOCK, j * BLOCK, BLOCK) for j, i in enumerate(PICKED)]
ALL = [Copy(0, 0, SIZE)]
LIMITS = VaultLimits(max_bytes=96 << 20, max_wait_s=1.0, hold_s=5.0, idle_s=2.0)


def contents(seed: int) -> bytes:
    return random.Random(seed).randbytes(SIZE)


class Producer:
    """Has a region, and dies when it is killed."""

    def __init__(self, seed: int) -> None:
        self._memory = Memory.allocate(SIZE)
        self._memory.view[:] = contents(seed)
        self._road = PlasmaTransport(RayVaults(LIMITS))

    def register(self) -> RegionInfo:
        return self._road.register(self._memory)

    def pid(self) -> int:
        return os.getpid()


class KillingVaults(RayVaults):
    """Kills the vault between an export and the fetch of its segments."""

    is_armed = True

    async def segment(self, reference: object) -> object:
        if self.is_armed:
            self.is_armed = False
            for name in vault_names():
                ray.kill(ray.get_actor(name, namespace="kvray"))
            await asyncio.sleep(0.5)
        return await super().segment(reference)


def vault_names() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith("kvray-vault-")]


class Puller:
    """An asyncio actor, as a Serve replica is one."""

    def __init__(self) -> None:
        self._road = PlasmaTransport(RayVaults(LIMITS))
        self._memory = Memory.allocate(SIZE)
        self._link = Link(lambda road, body: True)

    async def pull(self, region: RegionInfo, copies: list[Copy], stall_s: float = 30.0) -> dict[str, object]:
        """Pull, and how it went."""
        self._memory.view[:] = bytes(SIZE)
        told: list[int] = []
        lags: list[float] = []
        watch = asyncio.create_task(self._watch(lags))
        began_s = time.perf_counter()
        try:
            await self._road.pull(self._link, region, copies, self._memory, stall_s, told.append)
            error = ""
        except TransferError as failure:
            error = f"{type(failure).__name__}: {failure.message}"
        seconds = time.perf_counter() - began_s
        watch.cancel()
        return {
            "error": error,
            "seconds": seconds,
            "told": sorted(told) == list(range(len(copies))),
            "lag_ms": max(lags, default=0) * 1e3,
        }

    async def _watch(self, lags: list[float]) -> None:
        while True:
            began_s = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - began_s - 0.001)

    async def is_exact(self, seed: int, copies: list[Copy]) -> bool:
        source = contents(seed)
        whole = bytearray(SIZE)
        for copy in copies:
            whole[copy.target_offset : copy.target_offset + copy.num_bytes] = source[
                copy.source_offset : copy.source_offset + copy.num_bytes
            ]
        return bytes(self._memory.view) == bytes(whole)

    async def kill_the_vault_and_pull(self, region: RegionInfo) -> dict[str, object]:
        """The vault dies when the segments are there and not yet fetched."""
        kept, self._road = self._road, PlasmaTransport(KillingVaults(LIMITS))
        result = await self.pull(region, ALL)
        self._road = kept
        return result

    async def kill_the_producer_and_fetch(self, region: RegionInfo, pid: int) -> bool:
        """Whether the segments can be fetched when whom they were read from is dead."""
        vaults = RayVaults(LIMITS)
        handle = _handle_of(region)
        wanted = [[(0, 1 << 20)], [(5 << 20, 1 << 20)]]
        references = await vaults.export(handle.node_id, b"x" * 16, handle.region, wanted)
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(1)
        segments = [await vaults.segment(reference) for reference in references]
        vaults.release(handle.node_id, b"x" * 16)
        source = contents(2)
        return [bytes(segment) for segment in segments] == [source[: 1 << 20], source[5 << 20 : 6 << 20]]

    async def cancel(self, region: RegionInfo) -> bool:
        """Whether nothing lands after pulls that were cancelled at all kinds of moments."""
        for delay_s in (0.0, 0.005, 0.02, 0.05, 0.1, 0.2):
            pull = asyncio.ensure_future(self._road.pull(self._link, region, ALL, self._memory, 30.0))
            await asyncio.sleep(delay_s)
            pull.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pull
            self._memory.view[:] = bytes([5]) * SIZE
            await asyncio.sleep(0.3)
            if bytes(self._memory.view) != bytes([5]) * SIZE:
                return False
        return True

    async def at_once(self, region: RegionInfo, num_pulls: int) -> list[str]:
        """The errors of pulls that need more room in the vault than there is."""
        part = NUM_BLOCKS // num_pulls * BLOCK
        pulls = [
            self._road.pull(self._link, region, [Copy(i * part, i * part, part)], self._memory, 30.0)
            for i in range(num_pulls)
        ]
        return [repr(error) for error in await asyncio.gather(*pulls, return_exceptions=True) if error is not None]


def on_node(actor: type, node_id: str) -> object:
    return ray.remote(actor).options(
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    )


def wait_until_gone(timeout_s: float) -> float:
    began_s = time.monotonic()
    while vault_names():
        if time.monotonic() - began_s > timeout_s:
            return -1
        time.sleep(0.1)
    return time.monotonic() - began_s


def elsewhere(region: RegionInfo) -> RegionInfo:
    """The same region, said to be on a node that is none."""
    handle = _Handle("e" * 56, _handle_of(region).region)
    return msgspec.structs.replace(region, handle=msgspec.msgpack.encode(handle))


class Seen(dict[str, object]):
    """Says on stderr where it is: for whoever wonders why it takes so long."""

    def __setitem__(self, name: str, value: object) -> None:
        print(f"{time.process_time():6.2f} {name} {str(value)[:300]}", file=sys.stderr, flush=True)
        super().__setitem__(name, value)


def main() -> dict[str, object]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20, "include_dashboard": False},
    )
    cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    here, there = (node["NodeID"] for node in ray.nodes())
    puller = on_node(Puller, here).remote()
    first, second = on_node(Producer, there).remote(1), on_node(Producer, there).remote(2)
    region, doomed = ray.get([first.register.remote(), second.register.remote()])
    seen = Seen()
    seen["vaults_before"] = vault_names()
    seen["first_pull"] = ray.get(puller.pull.remote(region, COPIES))
    seen["is_there"] = vault_names() == [f"kvray-vault-{there}"]
    seen["is_exact"] = ray.get(puller.is_exact.remote(1, COPIES))
    seen["small_pulls"] = [ray.get(puller.pull.remote(region, COPIES[:1])) for _ in range(5)]
    seen["large_pulls"] = [ray.get(puller.pull.remote(region, ALL)) for _ in range(4)]
    seen["is_large_exact"] = ray.get(puller.is_exact.remote(1, ALL))
    seen["at_once"] = ray.get(puller.at_once.remote(region, 4))
    seen["is_at_once_exact"] = ray.get(puller.is_exact.remote(1, ALL))
    seen["is_cancelled_quiet"] = ray.get(puller.cancel.remote(region))
    seen["after_cancel"] = ray.get(puller.pull.remote(region, COPIES))
    pid = ray.get(second.pid.remote())
    seen["outlives_producer"] = ray.get(puller.kill_the_producer_and_fetch.remote(doomed, pid))
    seen["dead_producer"] = ray.get(puller.pull.remote(doomed, COPIES))
    seen["killed_vault"] = ray.get(puller.kill_the_vault_and_pull.remote(region))
    seen["after_kill"] = ray.get(puller.pull.remote(region, COPIES))
    seen["is_there_after_kill"] = vault_names() == [f"kvray-vault-{there}"]
    seen["is_exact_after_kill"] = ray.get(puller.is_exact.remote(1, COPIES))
    seen["gone_after_s"] = wait_until_gone(30)
    seen["after_idle"] = ray.get(puller.pull.remote(region, COPIES))
    seen["unknown_node"] = ray.get(puller.pull.remote(elsewhere(region), COPIES, 5.0))
    seen["logs"] = [
        line
        for path in Path(ray._private.worker._global_node.get_session_dir_path(), "logs").glob("worker-*.err")
        for line in path.read_text(errors="replace").splitlines()
        if "Traceback" in line or "never retrieved" in line or "InvalidState" in line
    ]
    ray.shutdown()
    cluster.shutdown()
    return seen


if __name__ == "__main__":
    print(json.dumps(main()))
    sys.stdout.flush()
    os._exit(0)
