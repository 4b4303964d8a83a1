"""The Ray cluster that a kustomization describes, on hosts of their own: a head and a node for each worker group."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.hosts import Host, hosts_on_a_switch
from tests.manifests.objects import Objects
from tests.served import own_environment

ROOT = Path(__file__).parents[2]
GCS_PORT, DASHBOARD_PORT, HTTP_PORT, METRICS_PORT = 6379, 8265, 8000, 8080
DEPLOYED_S = 120.0

#: As in a new pod, nothing is there of Ray's.
_NEW_POD = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$RAY_TMPDIR" && exec "$@"', "sh")


class RayNode:
    """A node of Ray on a host, started with what KubeRay gives `ray start` for a group."""

    def __init__(self, host: Host, environment: dict[str, str], group: dict[str, Any], head: Host) -> None:
        self.host = host
        self.environment = environment
        is_head = host is head
        where = ["--head", f"--port={GCS_PORT}", "--dashboard-host=0.0.0.0"] if is_head else []
        self._arguments = [*where] if is_head else [f"--address={head.address}:{GCS_PORT}"]
        self._arguments += [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        self._arguments += [f"--num-cpus={0 if is_head else 1}", f"--metrics-export-port={METRICS_PORT}"]
        self._arguments += [f"--labels={name}={value}" for name, value in group.get("labels", {}).items()]

    def start(self) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *self._arguments]
        command += [f"--node-ip-address={self.host.address}", "--object-store-memory=100000000"]
        done = subprocess.run(
            [*self.host.prefix, *_NEW_POD, *_once(command)],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self) -> list[psutil.Process]:
        """All that runs on the host."""
        listed = subprocess.run(["ip", "netns", "pids", self.host.name], check=False, capture_output=True, text=True)
        found = []
        for word in listed.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(word)))
        return found

    def titles(self) -> list[str]:
        titles = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                titles.append(" ".join(process.cmdline()))
        return titles

    def kill(self) -> None:
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def listening(self) -> dict[int, str]:
        """Who listens on which TCP port: the process's name, by port."""
        shown = subprocess.run([*self.host.prefix, "ss", "-ltnpH"], check=True, capture_output=True, text=True).stdout
        ports = {}
        for line in shown.splitlines():
            _, _, _, local, _, *users = line.split()
            ports[int(local.rpartition(":")[2])] = users[0].split('"')[1] if users else ""
        return ports


def _once(arguments: list[str]) -> list[str]:
    """Return the arguments, of options that stand there twice the last."""
    return list({argument.partition("=")[0]: argument for argument in arguments}.values())


class RayCluster:
    """The nodes, and the application on them."""

    def __init__(self, nodes: dict[str, RayNode], environment: dict[str, str]) -> None:
        self.nodes = nodes
        self._environment = environment
        self.url = f"http://{nodes['head'].host.address}:{HTTP_PORT}"

    def deploy(self, document: dict[str, Any]) -> None:
        """Hand an application to Serve as KubeRay does, and wait until it runs."""
        self._ask("PUT", document)
        ends_s = time.monotonic() + DEPLOYED_S
        while (application := self.application()).get("status") != "RUNNING":
            assert application.get("status") != "DEPLOY_FAILED", application
            assert time.monotonic() < ends_s, application
            time.sleep(0.5)

    def application(self) -> dict[str, Any]:
        """Return what Serve says of the application."""
        return self._ask("GET")["applications"].get("kvray", {})

    def num_replicas(self) -> dict[str, int]:
        """Return how many replicas run of each deployment."""
        return {
            name: sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
            for name, deployment in self.application()["deployments"].items()
        }

    def _ask(self, method: str, document: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://{self.nodes['head'].host.address}:{DASHBOARD_PORT}/api/serve/applications/",
            method=method,
            data=None if document is None else json.dumps(document).encode(),
            headers={
                "Authorization": f"Bearer {self._environment['RAY_AUTH_TOKEN']}",
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")


@contextlib.contextmanager
def running(objects: Objects, redis: tuple[int, str] | None = None) -> Iterator[RayCluster]:
    """Start the nodes of a cluster, its head with a Redis at a port of this machine, by its password.

    Skips where hosts of their own cannot be made.
    """
    groups = {"head": objects.service["rayClusterConfig"]["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in objects.groups}
    with hosts_on_a_switch(len(groups)) as hosts, own_environment() as environment:
        environment |= {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT)}
        head = environment
        if redis is not None:
            # As KubeRay has it.
            gateway = f"{hosts[0].address.rpartition('.')[0]}.254"
            head = environment | {"RAY_REDIS_ADDRESS": f"{gateway}:{redis[0]}", "REDIS_PASSWORD": redis[1]}
            head["RAY_external_storage_namespace"] = "kvray"
            groups["head"]["rayStartParams"]["redis-password"] = redis[1]
            environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
        nodes = {
            name: RayNode(host, head if host is hosts[0] else environment, group, hosts[0])
            for host, (name, group) in zip(hosts, groups.items(), strict=True)
        }
        try:
            for node in nodes.values():
                node.start()
            yield RayCluster(nodes, environment)
        finally:
            for node in nodes.values():
                node.kill()


def with_credentials(text: str, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a serveConfigV2 with a secret in `directory`, without API keys, and with `sections` laid over its own."""
    document = yaml.safe_load(text)
    arguments = document["applications"][0]["args"]
    secret = directory / "secret"
    secret.write_text(secrets.token_hex(32))
    secret.chmod(0o600)
    arguments["network"]["secret_file"] = str(secret)
    del arguments["http"]["api_key_file"]
    for section, values in sections.items():
        arguments[section] = {**arguments.get(section, {}), **values}
    return document
