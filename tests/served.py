"""`kvray serve` as a user starts it: a real process tree, its own Ray, its own temporary directories."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

START_TIMEOUT_S = 120.0
STATUS_AGE_S = 1.05  #: numbers of workers are that old at most


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def own_environment() -> Iterator[dict[str, str]]:
    """Environment variables of a Ray that shares nothing with any other; its directory is removed at the end."""
    # Not pytest's tmp_path: Ray puts unix sockets there, whose paths may not be longer than 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="kv-", dir="/tmp"))
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    variables |= {
        "RAY_TMPDIR": str(directory),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Caches (built kernels) stay where they are; Ray's token and the like go to a home of their own.
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        "HOME": str(directory),
        "PYTHONUNBUFFERED": "1",
    }
    try:
        yield variables
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Served:
    """A `kvray` command that runs."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._asked_s = 0.0

    def wait_until_ready(self) -> None:
        ends_s = time.monotonic() + START_TIMEOUT_S
        while "Ctrl-C ends everything" not in self.log.read_text():
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.log.read_text()}"
            assert time.monotonic() < ends_s, f"not ready in {START_TIMEOUT_S} s: {self.log.read_text()}"
            time.sleep(0.2)

    def descendants(self) -> list[psutil.Process]:
        """All processes it started, directly or not."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas."""
        found = []
        for child in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"ServeReplica:kvray:{deployment}" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def status(self) -> dict:
        """The status as of now: waits until what it saw last is too old to be given again."""
        time.sleep(max(0.0, self._asked_s + STATUS_AGE_S - time.monotonic()))
        try:
            with urllib.request.urlopen(f"{self.url}/status", timeout=10) as response:
                return json.load(response)
        finally:
            self._asked_s = time.monotonic()

    def num_pinned(self) -> int:
        """Blocks pinned anywhere."""
        return sum(int(worker["values"]["kvray_blocks_pinned"]) for worker in self.status()["workers"])

    def wait_until_idle(self, timeout_s: float = 15.0) -> None:
        """Until every worker answers and none has a block pinned."""
        ends_s = time.monotonic() + timeout_s
        while True:
            workers = self.status()["workers"]
            pinned = [worker["values"].get("kvray_blocks_pinned") for worker in workers]
            if not any(pinned) and None not in pinned:
                return
            assert time.monotonic() < ends_s, f"blocks still pinned: {pinned}"
            time.sleep(0.2)

    def wait_until_whole(self, num_prefill: int, num_decode: int, timeout_s: float) -> float:
        """Until all workers and the router answer; the seconds it took."""
        started_s = time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                status = self.status()
                roles = [worker["role"] for worker in status["workers"] if worker["is_answering"]]
                if (
                    roles.count("prefill") == num_prefill
                    and roles.count("decode") == num_decode
                    and status["is_routing_by_cache"]
                ):
                    return time.monotonic() - started_s
            assert time.monotonic() - started_s < timeout_s, f"not whole again after {timeout_s} s"
            time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = 20.0) -> float:
        """Send `number` and wait until it and all it started are gone; the seconds it took."""
        started_s = time.monotonic()
        family = self.descendants()
        self.process.send_signal(number)
        self.process.wait(timeout_s)
        _, alive = psutil.wait_procs(family, timeout=max(0.1, timeout_s - (time.monotonic() - started_s)))
        assert not alive, f"left running: {alive}"
        return time.monotonic() - started_s

    def kill(self) -> None:
        """End it without asking."""
        family = [psutil.Process(self.process.pid), *self.descendants()] if self.process.poll() is None else []
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)


def kvray_command(*arguments: str) -> list[str]:
    """The command line as a user's shell would find it."""
    return [sys.executable, "-m", "cluster.cli", *arguments]


def takes_interrupts() -> None:
    """For `preexec_fn`: whoever runs tests in the background has SIGINT ignored, and so have all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def serving(*arguments: str, log_dir: Path, extra_environment: dict[str, str] | None = None) -> Iterator[Served]:
    """`kvray serve` with `arguments`, ready for requests; ended when the block ends."""
    port = free_port()
    log = log_dir / f"serve-{port}.log"
    with own_environment() as variables, log.open("w") as stream:
        process = subprocess.Popen(
            kvray_command("serve", "--port", str(port), *arguments),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=variables | (extra_environment or {}),
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        served = Served(process, port, log)
        try:
            served.wait_until_ready()
            yield served
        finally:
            served.kill()


def run_kvray(
    *arguments: str, timeout_s: float = 120.0, extra_environment: dict[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a command to its end; also the command lines of what it left running."""
    with own_environment() as variables:
        finished = subprocess.run(
            kvray_command(*arguments),
            capture_output=True,
            env=variables | (extra_environment or {}),
            text=True,
            timeout=timeout_s,
            cwd=Path(__file__).parent.parent,
            check=False,
        )
        time.sleep(0.5)
        return finished, [" ".join(process.cmdline()) for process in using(variables["RAY_TMPDIR"])]


def using(directory: str) -> list[psutil.Process]:
    """Processes other than this one that belong to the Ray whose RAY_TMPDIR is `directory`.

    By what they were started with and by their open files: Ray's workers overwrite their environment with a title.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and (
                process.environ().get("RAY_TMPDIR") == directory
                or any(f"{directory}/" in word for word in process.cmdline())
                or any(file.path.startswith(f"{directory}/") for file in process.open_files())
            ):
                found.append(process)
    return found
