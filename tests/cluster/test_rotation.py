"""The cluster secret is exchanged for another one while requests go on, one process after the other."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from tests.cluster.chaos import Load
from tests.cluster.starting import Starting, started_ray
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.served import Served, free_port, using
from transport.secret import ClusterSecret

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

DEPLOYMENTS = ("Router", "Prefill", "Decode", "Ingress")
GIVEN_UP_S = 120.0


def processes(directory: str, deployment: str) -> list[psutil.Process]:
    return [found for found in using(directory) if f"ServeReplica:kvray:{deployment}" in " ".join(found.cmdline())]


async def test_a_secret_is_exchanged_while_requests_go_on(tmp_path):
    model_dir = make_tiny_model(tmp_path / "model", max_position_embeddings=8192)
    old, new = ClusterSecret.generate().hex(), ClusterSecret.generate().hex()
    secret_file = tmp_path / "secret"
    secret_file.write_text(old)
    secret_file.chmod(0o600)
    port = free_port()
    with started_ray({"KVRAY_SECRET_FILE": str(secret_file)}) as environment:
        directory = environment["RAY_TMPDIR"]
        starting = Starting(model_dir, tmp_path, environment | {"RAY_AUTH_MODE": ""}, port)
        try:
            await asyncio.to_thread(starting.wait_for, "Ctrl-C ends everything")
            served = Served(starting.process, port, starting.log)
            load = Load(served.url, "rotation")
            losses = []
            async with load.running():
                for valid in ((old, new), (new, old), (new,)):
                    secret_file.write_text("\n".join(valid))
                    for deployment in DEPLOYMENTS:
                        began_s = time.monotonic()
                        (victim,) = processes(directory, deployment)
                        victim.kill()
                        await asyncio.sleep(1)
                        await asyncio.to_thread(served.wait_until_whole, 1, 1, GIVEN_UP_S)
                        if deployment == "Ingress":
                            losses.append((began_s, time.monotonic()))
            verdict = load.verdict(Reference(model_dir), losses)
            print(load.summary())
            assert not verdict.wrong
            assert not verdict.hung
            assert not verdict.failed
        finally:
            starting.process.kill()
