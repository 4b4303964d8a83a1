"""A `kvray serve` that is looked at while it starts, and what it leaves behind."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.served import free_port, kvray_command, using

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
