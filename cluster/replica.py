"""What every replica of ours does before anything else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from cluster import warden
from cluster.logs import turn_over_log
from messages.errors import KvrayError

logger = logging.getLogger(__name__)

_BEAT_S = 0.5


@contextlib.contextmanager
def prepared(open_log: Callable[[str], None], name: str) -> Iterator[None]:
    """Open the log of this process, called `name`, and have it killed if it, or the running event loop, ever hangs.

    What is raised in the block, in which it starts, is logged with its traceback; errors of ours say all in one line,
    which reaches the terminal by way of Serve.
    """
    open_log(name)
    start_warden()
    try:
        yield
    except KvrayError:
        raise
    except Exception:
        logger.exception("%s cannot start", name)
        raise


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
        turn_over_log()
        loop.call_later(_BEAT_S, beat)

    loop.call_soon(beat)
