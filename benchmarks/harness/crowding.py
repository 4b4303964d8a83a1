"""What else a machine has to do while something is measured, or how little of it a container gets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000  # as Kubernetes has it


@contextmanager
def spinner() -> Iterator[None]:
    """Have one process run that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def cpu_quota(num_cores: float) -> Iterator[Callable[[], None] | None]:
    """Make a control group that gets so many cores' time, as Kubernetes does for a limit.

    What it yields moves a process into it (`preexec_fn`); None where this machine does not let us make one.
    """
    is_first_version = (_CGROUPS / "cpu" / "cpu.shares").exists()
    group = (_CGROUPS / "cpu" if is_first_version else _CGROUPS) / f"kvray-benchmark-{os.getpid()}"
    quota_us = int(num_cores * _PERIOD_US)
    try:
        group.mkdir()
        if is_first_version:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
    except OSError as error:
        print(f"no control group can be made here: {error}", file=sys.stderr)
        with suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        with suppress(OSError):
            group.rmdir()
