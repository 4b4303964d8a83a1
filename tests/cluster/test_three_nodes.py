"""Three Ray nodes, each on a host of its own: links go down and come back, nodes die, answers stay right."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.cluster.chaos import CONFIG, Load
from tests.hosts import Host, hosts_on_a_switch
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.served import Served, kvray_command, own_environment

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parent.parent.parent
GCS_PORT = 6379
HTTP_PORT = 8000
NUM_PREFILL = NUM_DECODE = 2
GIVEN_UP_S = 180.0


class Node:
    """A Ray node on a host."""

    def __init__(
        self,
        host: Host,
        environment: dict[str, str],
        *arguments: str,
        is_head: bool = False,
        python: str = sys.executable,
    ) -> None:
        self.host = host
        self._environment = environment
        self._python = python
        # No CPUs on the head: the workers, which want one each, are on the others.
        where = ["--head", f"--port={GCS_PORT}", "--num-cpus=0"]
        self._start = where if is_head else [f"--address={environment['HEAD']}:{GCS_PORT}", "--num-cpus=4"]
        self._start += arguments

    def start(self) -> None:
        command = [self._python, "-m", "ray.scripts.scripts", "start", *self._start]
        command += [f"--node-ip-address={self.host.address}", f"--object-store-memory={2**27}", "--disable-usage-stats"]
        subprocess.run(
            [*self.host.prefix, *command], env=self._environment, cwd=ROOT, check=True, capture_output=True, timeout=120
        )

    def processes(self) -> list[psutil.Process]:
        """All that runs on the host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.host.name], check=False, capture_output=True, text=True
        ).stdout
        found = []
        for word in listed.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(word)))
        return found

    def has(self, title: str) -> bool:
        """Whether a process of that title runs on the host."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    return True
        return False

    def kill(self) -> None:
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def is_alive(self) -> bool:
        return self.has("raylet/raylet")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def cluster(model_dir, tmp_path_factory) -> Iterator[tuple[Served, list[Node]]]:
    directory = tmp_path_factory.mktemp("served")
    config = directory / "kvray.yaml"
    pools = {"prefill": NUM_PREFILL, "decode": NUM_DECODE, "ingress": 2, "cpus_per_worker": 1}
    config.write_text(yaml.safe_dump(CONFIG | {"pools": pools}))
    with hosts_on_a_switch(3) as hosts, own_environment() as environment:
        environment |= {"HEAD": hosts[0].address, "RAY_worker_niceness": "0", "KVRAY_SECRET": os.urandom(32).hex()}
        nodes = [Node(hosts[0], environment, "--include-dashboard=false", is_head=True)]
        nodes += [Node(host, environment) for host in hosts[1:]]
        log = directory / "log"
        arguments = [str(model_dir), "--config", str(config), "--dtype", "float32", "--max-model-len", "4352"]
        arguments += ["--kv-cache-memory", "16MiB", "--host", "0.0.0.0", "--port", str(HTTP_PORT)]
        try:
            for node in nodes:
                node.start()
            with log.open("w") as stream:
                process = subprocess.Popen(
                    [*hosts[0].prefix, *kvray_command("serve", *arguments)],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment | {"RAY_ADDRESS": f"{hosts[0].address}:{GCS_PORT}"},
                    text=True,
                    cwd=ROOT,
                )
            served = Served(process, HTTP_PORT, log)
            served.url = f"http://{hosts[0].address}:{HTTP_PORT}"
            served.wait_until_ready()
            served.wait_until_whole(NUM_PREFILL, NUM_DECODE, 60)
            yield served, nodes
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            for node in nodes:
                node.kill()


@pytest.mark.parametrize(
    "fault",
    [
        "link down for 5 s",
        pytest.param("link down for 30 s", marks=pytest.mark.long),
        "killed",
    ],
)
async def test_a_node_that_is_cut_off_or_killed_costs_no_token_and_no_hang(cluster, model_dir, fault):
    served, nodes = cluster
    node = nodes[1]
    load = Load(served.url, fault)
    losses = []
    async with load.running():
        await asyncio.sleep(2)
        began_s = time.monotonic()
        has_ingress = node.has("ServeReplica:kvray:Ingress")
        if fault == "killed":
            node.kill()
        else:
            node.host.set_link("down")
            await asyncio.sleep(float(fault.split()[-2]))
            node.host.set_link("up")
        await asyncio.to_thread(served.wait_until_whole, NUM_PREFILL, NUM_DECODE, GIVEN_UP_S)
        whole_s = time.monotonic() - began_s
        if has_ingress:
            losses.append((began_s, time.monotonic()))
        await asyncio.sleep(3)
    verdict = load.verdict(Reference(model_dir), losses)
    print(f"{fault}: whole again after {whole_s:.1f} s; {load.summary()}")
    assert not verdict.wrong
    assert not verdict.hung
    assert not verdict.failed
    served.wait_until_idle(60)
    if not node.is_alive():  # Ray takes a node for dead for good
        node.kill()
        node.start()
