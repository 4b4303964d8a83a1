"""The warden of a process: a small one beside it that kills it once it stands still. `python warden.py PID`, its child.

A process that was stopped (SIGSTOP, a full disk's core dump, an operator's slip) answers nobody, and Ray, which asks a
process to end, waits for it as long as it lasts: its CPUs and GPUs stay taken, and where the cluster has no others its
successor finds no place. Another process of the same node can kill it, and then all the rest goes on as after any loss.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from typing import Final

_LOOK_MS: Final = 500
#: Looks at which it stood still, in a row; not by the clock, which runs on while a machine sleeps.
_FROZEN_LOOKS: Final = 8


def start_warden() -> None:
    """Start the warden of this process; it ends with it."""
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid())],  # -S: nothing but the interpreter, 10 MB
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )


def _watch(watched: int) -> None:
    """Look after the process `watched`, the parent of this one, until it has ended."""
    try:
        descriptor = os.pidfd_open(watched)
    except ProcessLookupError:
        return
    if os.getppid() != watched:
        return  # it had ended before: the number may be another's by now
    end = select.poll()
    end.register(descriptor, select.POLLIN)
    num_looks = 0
    while not end.poll(_LOOK_MS):
        num_looks = num_looks + 1 if _is_stopped(watched) else 0
        if num_looks == _FROZEN_LOOKS:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _is_stopped(process: int) -> bool:
    """Tell whether all of `process` was stopped by a signal; one that a debugger holds is not."""
    with open(f"/proc/{process}/stat", "rb") as file:  # noqa: PTH123 - pathlib takes longer than all the rest to import
        return file.read().rpartition(b")")[2].split()[0] == b"T"


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
