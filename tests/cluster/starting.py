"""A `kvray serve` that is looked at while it starts, and what it leaves behind; a Ray that it finds there."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.served import free_port, kvray_command, own_environment, using

ROOT = Path(__file__).parent.parent.parent


class Starting:
    """`kvray serve` while it starts."""

    def __init__(self, model: Path, directory: Path, environment: dict[str, str], port: int | None = None) -> None:
        self.log = directory / "log"
        self._directory = environment["RAY_TMPDIR"]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                kvray_command("serve", str(model), "--port", str(port or free_port())),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,  # a process group of its own, as a shell gives it
            )

    def wait_for(self, text: str, timeout_s: float = 200.0) -> None:
        ends_s = time.monotonic() + timeout_s
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends_s, self.log.read_text()
            time.sleep(0.02)

    def survivors(self) -> list[psutil.Process]:
        return using(self._directory)

    def clean(self) -> None:
        for process in self.survivors():
            process.kill()


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    ends_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_s, f"not so after {timeout_s} s"
        time.sleep(0.2)


@contextlib.contextmanager
def started_ray(credentials: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a shell on a machine where `ray start --head` ran, with a token in the home directory.

    `credentials`: what the environment of the node has of ours.
    """
    with own_environment() as environment:
        token_file = Path(environment["HOME"]) / ".ray" / "auth_token"
        token_file.parent.mkdir()
        token_file.write_text(environment["RAY_AUTH_TOKEN"])
        environment |= {"RAY_AUTH_TOKEN": ""} | credentials
        # The cluster's processes find our rooms here; on a real one the package is installed.
        environment |= {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2"]
        command += [f"--port={free_port()}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={128 * 2**20}"]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        try:
            yield environment
        finally:
            for process in using(environment["RAY_TMPDIR"]):
                process.kill()
