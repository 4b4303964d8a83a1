"""`kvray serve` as a user starts it, for as long as a block lasts: own processes, own Ray, own temporary directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.report import ROOT
from transport.secret import ClusterSecret

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 30.0
_IDLE_TIMEOUT_S = 30.0
#: What the command prints when it answers requests.
_READY_LINE = "Ctrl-C ends everything"
_STATUS_AGE_S = 1.05


@dataclass(frozen=True, slots=True)
class Served:
    """A `kvray serve` that answers requests."""

    url: str
    secret: ClusterSecret  #: for benchmarks that speak to a worker or the router directly
    pid: int

    def status(self) -> dict[str, Any]:
        """Return the document of `kvray status --json`, as of now: what was asked for last is given again for 1 s."""
        time.sleep(_STATUS_AGE_S)
        with urllib.request.urlopen(f"{self.url}/status", timeout=10) as response:
            document: dict[str, Any] = json.load(response)
        return document

    def addresses(self, role: str) -> list[str]:
        """Return where the workers of a role listen."""
        return [worker["address"] for worker in self.status()["workers"] if worker["role"] == role]

    def wait_until_idle(self) -> None:
        """Wait until no worker holds a block for anybody.

        Raises:
            TimeoutError: one still does.
        """
        ends_s = time.monotonic() + _IDLE_TIMEOUT_S
        while _total(self.status()["workers"], "kvray_blocks_pinned") > 0:
            if time.monotonic() > ends_s:
                raise TimeoutError(f"blocks are still pinned after {_IDLE_TIMEOUT_S:g} s")


def _total(workers: list[dict[str, Any]], metric: str) -> float:
    return sum(float(worker["values"].get(metric, 0.0)) for worker in workers)


@contextlib.contextmanager
def serving(*arguments: str, environment: Mapping[str, str] | None = None, checkout: Path = ROOT) -> Iterator[Served]:
    """Run `kvray serve` with `arguments` until the block ends; it begins when all workers are there.

    `checkout` is the source tree that is served with, for example one of an older commit.

    Raises:
        RuntimeError: the command ended, or did not get ready; with what it printed.
    """
    secret = ClusterSecret.generate().hex()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _own_directory() as directory:
        log = directory / "serve.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "serve", "--port", str(port), *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=_variables(directory)
                | {"KVRAY_SECRET": secret, "PYTHONPATH": str(checkout)}
                | dict(environment or {}),
                cwd=checkout,
                start_new_session=True,  # a Ctrl-C meant for the benchmark reaches it through `_end`
            )
        # `timeout` and the like end the benchmark by SIGTERM, which would leave a whole cluster behind.
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            _wait_until_ready(process, log, url)
            yield Served(url, ClusterSecret.from_hex(secret), process.pid)
        finally:
            _end(process)
            signal.signal(signal.SIGTERM, previous)


def _variables(directory: Path) -> dict[str, str]:
    """Make the environment of a Ray that shares nothing with any other."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return variables | {
        "RAY_ADDRESS": "local",  # never a cluster that happens to run here
        "RAY_TMPDIR": str(directory),
        "RAY_AUTH_MODE": "token",  # as users have it
        # Built kernels stay where they are; what Ray writes into a home goes to one of its own.
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        "HOME": str(directory),
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def _own_directory() -> Iterator[Path]:
    # Right below /tmp: Ray puts unix sockets there, whose paths may not be longer than 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="kvb-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """Return a port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, url: str) -> None:
    ends_s = time.monotonic() + _START_TIMEOUT_S
    while _READY_LINE not in log.read_text() or not _is_answering(url):
        if process.poll() is not None or time.monotonic() > ends_s:
            raise RuntimeError(f"kvray serve is not ready: {log.read_text()[-2000:]}")
        time.sleep(0.1)


def _is_answering(url: str) -> bool:
    """Tell whether the whole fleet is there, seen from outside."""
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=10) as response:
            status = json.load(response)
    except OSError:
        return False
    return bool(status["is_routing_by_cache"]) and all(worker["is_answering"] for worker in status["workers"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command by Ctrl-C, as a user would; what it leaves running is killed."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    if process.poll() is None:
        process.kill()
    process.wait()
