"""Commands that run while somebody waits for them, and may have enough of it."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable
from typing import TypeAlias

from cluster.launch import Stopped

_POLL_S = 0.1

Say: TypeAlias = Callable[[str], None]  #: takes a line for people, on any thread


def run_child(command: list[str], stop: threading.Event, say: Say | None = None) -> tuple[int, list[str]]:
    """Run `command`; return its exit code and its lines on stderr. `say` gets each line on its stdout.

    Raises:
        Stopped: `stop` was set, and the command was killed.
    """
    with tempfile.TemporaryFile() as errors:
        output = subprocess.DEVNULL if say is None else subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, text=True, errors="replace"
        )

        def tell() -> None:
            for line in process.stdout or ():
                if say is not None:
                    say(line.strip())

        reader = threading.Thread(target=tell)
        reader.start()
        try:
            while process.poll() is None:
                if stop.wait(_POLL_S):
                    raise Stopped
        finally:
            process.kill()
            process.wait()
            reader.join()
            if process.stdout is not None:
                process.stdout.close()
        if stop.is_set():  # Ctrl-C reaches both: it may have ended of that
            raise Stopped
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines()
        return process.returncode, [line.strip() for line in lines if line.strip()]
