"""A head that is lost comes back with what it knew, from Redis, as gcsFaultToleranceOptions have it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.chaos import CONFIG, Load
from tests.manifests.kustomizations import built
from tests.manifests.objects import Objects
from tests.manifests.ray_cluster import RayCluster, running, with_credentials
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.served import free_port

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

PASSWORD = "not-to-be-guessed"
AWAY_S = 5.0
BACK_S = 180.0


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[int]:
    """A Redis that all hosts reach, on the port that it gives."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not here")
    port = free_port()
    options = ["--port", str(port), "--bind", "0.0.0.0", "--requirepass", PASSWORD, "--dir", str(directory)]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)


async def test_a_head_that_is_lost_comes_back_and_workers_were_there_all_the_time(tmp_path):
    objects = Objects(built("overlays/cpu-demo"))
    model_dir = make_tiny_model(tmp_path / "model", max_position_embeddings=8192)
    document = with_credentials(
        objects.service["serveConfigV2"],
        tmp_path,
        model={"path": str(model_dir), "dtype": "float32", "max_model_len": 4352},
        engine={"kv_cache_memory": "16MiB"},
        tiers={"host_memory": "16MiB"},
        http=CONFIG["http"],
    )
    with redis(tmp_path) as port, running(objects, (port, PASSWORD)) as cluster:
        cluster.deploy(document)
        workers = {name: replica_pids(cluster, name) for name in ("prefill", "decode")}
        load = Load(f"http://{cluster.nodes['decode'].host.address}:8000", "head")
        async with load.running():
            await asyncio.sleep(2)
            began_s = time.monotonic()
            cluster.nodes["head"].kill()
            await asyncio.sleep(AWAY_S)
            await asyncio.to_thread(cluster.nodes["head"].start)
            await asyncio.to_thread(wait_until_served, cluster)
            back_s = time.monotonic()
            await asyncio.sleep(5)
        verdict = load.verdict(Reference(model_dir), [(began_s, back_s)])
        print(f"served again {back_s - began_s:.1f} s after the loss; {load.summary()}")
        # With an ingress or a router in place of the head's, perhaps.
        assert all(pids <= replica_pids(cluster, name) for name, pids in workers.items())
        assert not verdict.wrong
        assert not verdict.hung
        assert not verdict.failed


def replica_pids(cluster: RayCluster, node: str) -> set[int]:
    found = set()
    for process in cluster.nodes[node].processes():
        if "ServeReplica:kvray:" in " ".join(process.cmdline()):
            found.add(process.pid)
    return found


def wait_until_served(cluster: RayCluster) -> None:
    ends_s = time.monotonic() + BACK_S
    for name in ("decode", "head"):
        url = f"http://{cluster.nodes[name].host.address}:8000/v1/models"
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=5).status_code == 200:
                    break
            assert time.monotonic() < ends_s, f"{name} does not serve"
            time.sleep(0.5)
