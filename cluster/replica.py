"""What every replica of ours does before anything else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys

from cluster import warden
from cluster.logs import configure_logging

_BEAT_S = 0.5


def prepare_replica(level: str, style: str) -> None:
    """Log from `level` on, in `style`, and have this process killed if it, or the running event loop, ever hangs."""
    configure_logging(level, style)
    start_warden()


def start_warden() -> None:
    """Start the warden of this process, which ends with it, and beat for it on the running loop."""
    beats, sent = os.pipe()
    os.set_blocking(sent, False)
    subprocess.Popen(
        [sys.executable, "-I", "-S", warden.__file__, str(os.getpid())],  # -S: nothing but the interpreter, 10 MB
        stdin=beats,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    os.close(beats)
    loop = asyncio.get_running_loop()

    def beat() -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # it hangs itself, or was killed
            os.write(sent, b".")
        loop.call_later(_BEAT_S, beat)

    loop.call_soon(beat)
