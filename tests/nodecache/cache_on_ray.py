"""Run by test_actor.py, in a Ray of its own: two workers of a node want its node cache. Prints what it saw as JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
from pathlib import Path

import msgspec
import ray

from messages.errors import ConfigError
from nodecache.actor import RayNodeCache
from tests.nodecache.blocks import content_of, names_of
from tests.nodecache.client import CacheClient
from tests.nodecache.test_process import BLOCK_BYTES, options_of
from transport.opening import RoadOptions
from transport.plasma.actor import RayVaults
from transport.plasma.road import PlasmaTransport
from transport.secret import ClusterSecret

_SECRET = ClusterSecret(bytes(32))


def read_secret() -> ClusterSecret:
    return _SECRET


def cache_processes() -> list[int]:
    """Ids of the processes of node caches on this machine that are of this Ray."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()
                variables = (folder / "environ").read_bytes()
            except OSError:
                continue
            if b"-m\0nodecache\0" in line and os.environb[b"RAY_TMPDIR"] in variables:
                found.append(int(folder.name))
    return found


async def pulled_by_way_of_a_vault(address: str, name: bytes) -> bool:
    road = PlasmaTransport(RayVaults())
    client = CacheClient(_SECRET, address, BLOCK_BYTES, transports=[road])
    await client.open()
    arrived = await client.fetch([name])
    client.close()
    return arrived == {name: content_of(name, BLOCK_BYTES)}


async def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    options = msgspec.structs.replace(options_of(32), roads=RoadOptions(names=("shm", "plasma")))
    one = RayNodeCache(options, read_secret, idle_s=10.0)
    other = RayNodeCache(options, read_secret, idle_s=10.0)
    first, second = await one.info(), await other.info()
    seen: dict[str, object] = {"is_one": first == second, "num_processes": len(cache_processes())}

    client = CacheClient(_SECRET, first.address, BLOCK_BYTES)
    await client.open()
    names = names_of(range(8))
    await client.write(names)
    os.kill(cache_processes()[0], signal.SIGKILL)
    await client.lost.wait()
    while (third := await one.info()).worker_id == first.worker_id:  # noqa: ASYNC110 - it is told by asking
        await asyncio.sleep(0.05)
    heir = CacheClient(_SECRET, third.address, BLOCK_BYTES)
    await heir.open()
    seen["is_back"] = await heir.fetch(names) == {name: content_of(name, BLOCK_BYTES) for name in names}
    seen["roads"] = third.roads
    seen["is_pulled_by_way_of_a_vault"] = await pulled_by_way_of_a_vault(third.address, names[0])
    for opened in (client, heir):
        opened.close()

    layout = dataclasses.replace(options.layout, fingerprint=b"another model", num_blocks=1 << 40)
    large = msgspec.structs.replace(options, layout=layout)
    try:
        await RayNodeCache(large, read_secret, idle_s=10.0).info()
    except ConfigError as error:
        seen["too_large"] = error.message

    async with asyncio.timeout(60):
        while cache_processes():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.2)
    seen["has_ended"] = True
    ray.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
