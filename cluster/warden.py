"""The warden of a process: a small one beside it that kills it once it does nothing any more. `python warden.py PID`.

A process that was stopped (SIGSTOP, an operator's slip), or whose event loop hangs, answers nobody, and whoever asks it
to end waits for it: its CPUs and GPUs stay taken, and where the cluster has no others its successor finds no place.
Another process of the same node can kill it, and then all the rest goes on as after any loss.

It is a child of the process, and reads its beats from standard input: a byte now and then from its event loop. Whoever
has not begun to beat is starting, which may take as long as it likes. Imports little: there is one per process.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import Final

_LOOK_MS: Final = 500
# Looks in a row, not seconds by the clock, which runs on while a machine sleeps.
_FROZEN_LOOKS: Final = 8
_SILENT_LOOKS: Final = 20
_BEATS: Final = 0  #: standard input


def watch(watched: int) -> None:
    """Look after the process `watched`, the parent of this one, until it has ended."""
    try:
        descriptor = os.pidfd_open(watched)
    except ProcessLookupError:
        return
    if os.getppid() != watched:
        return  # it had ended before: the number may be another's by now
    os.set_blocking(_BEATS, False)
    end = select.poll()
    end.register(descriptor, select.POLLIN)
    num_frozen = num_silent = 0
    has_begun = False
    while not end.poll(_LOOK_MS):
        has_beaten = _take_beats()
        has_begun |= has_beaten
        num_frozen = num_frozen + 1 if _is_stopped(watched) else 0
        num_silent = num_silent + 1 if has_begun and not has_beaten else 0
        if num_frozen >= _FROZEN_LOOKS or num_silent >= _SILENT_LOOKS:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _take_beats() -> bool:
    """Tell whether there were beats since the last time."""
    try:
        return bool(os.read(_BEATS, 4096))
    except BlockingIOError:
        return False


def _is_stopped(process: int) -> bool:
    """Tell whether all of `process` was stopped by a signal; one that a debugger holds is not."""
    with open(f"/proc/{process}/stat", "rb") as file:  # noqa: PTH123 - pathlib takes longer than all the rest to import
        return file.read().rpartition(b")")[2].split()[0] == b"T"


if __name__ == "__main__":
    watch(int(sys.argv[1]))
