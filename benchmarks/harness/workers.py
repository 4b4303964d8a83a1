"""Starts worker processes without Ray or HTTP (harness.worker_process), and hears what they say."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.worker import WorkerOptions
from messages.fleet import WorkerInfo
from transport.secret import ClusterSecret

SCRIPT = Path(__file__).resolve().parent / "worker_process.py"


@dataclass(slots=True)
class WorkerProcess:
    """A worker that runs in a process of its own."""

    process: subprocess.Popen[str]
    info: WorkerInfo
    said: list[dict[str, Any]] = field(default_factory=list)  #: grows as the worker tells

    def last_said(self, key: str) -> float:
        """Return the newest value that the worker said of `key`; StopIteration before the first."""
        return float(next(line[key] for line in reversed(self.said) if key in line))


@contextlib.contextmanager
def running_worker(
    role: str,
    options: WorkerOptions,
    secret: ClusterSecret,
    *,
    host: str = "127.0.0.1",
    prefix: tuple[str, ...] = (),
    script: tuple[str, ...] = (str(SCRIPT),),
    is_traced: bool = False,
) -> Iterator[WorkerProcess]:
    """Run a worker in a process of its own until the block ends.

    `prefix`: of the command line, as `ip netns exec h1`. `script`: another one that ends up in worker_process.main.
    """
    job = {
        "role": role,
        "worker_id": f"{role}-{host}",
        "host": host,
        "options": msgspec.to_builtins(options),
        "secret": secret.hex(),
        "is_traced": is_traced,
    }
    process = subprocess.Popen(
        [*prefix, sys.executable, *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        first = process.stdout.readline()
        if not first:
            raise RuntimeError(f"the {role} worker ended with {process.wait()}")
        worker = WorkerProcess(process, msgspec.convert(json.loads(first), WorkerInfo))

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    worker.said.append(json.loads(line))
                else:
                    sys.stderr.write(line)  # UCX writes its log there

        threading.Thread(target=listen, daemon=True).start()
        yield worker
    finally:
        with contextlib.suppress(OSError, ValueError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
