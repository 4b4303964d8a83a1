"""On a Ray cluster that was there: what our processes write, as Ray's driver prints it, for the terminal.

Ray brings the lines of all nodes to its driver, each after "(ServeReplica:kvray:Decode pid=1, ip=10.0.0.2)"; whatever
else it prints, pages of logs of each process that was lost for one, is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from typing import Final, TextIO

from cluster.log_tail import LINE_ESCAPES, terminal_line

_OURS: Final = re.compile(
    r"(?:\x1b\[\d+m)*\((?:ServeReplica:kvray:(?P<role>\w+)|CacheActor) pid=(?P<pid>\d+)(?:, ip=(?P<host>[^)]+))?\)"
    r"(?:\x1b\[\d+m)* (?P<line>.*)"
)
_NAMED: Final = re.compile(r'[a-z]+-\S+ \| |\{"worker": ')


def shown_line(printed: str, style: str) -> str | None:
    """Return what the terminal shows of a line that Ray printed; None: nothing.

    Lines of our own logging say which process they are of, and stay as they are; others are said to be of a process of
    that role and id.
    """
    found = _OURS.fullmatch(printed)
    if found is None:
        return None
    if _NAMED.match(found["line"]):
        return found["line"]
    name = f"{(found['role'] or 'cache').lower()}-{found['pid']}" + (f"@{found['host']}" if found["host"] else "")
    return terminal_line(name, found["line"].translate(LINE_ESCAPES), style)


def filter_output(terminal: TextIO, style: str) -> None:
    """Let what this process prints go through `shown_line` to `terminal` from now on, on a thread of its own."""
    source, sink = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(sink, stream.fileno())
    os.close(sink)

    def follow() -> None:
        with open(source, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - a descriptor
            for line in lines:
                text = shown_line(line.rstrip("\r\n"), style)
                if text is not None:
                    with contextlib.suppress(OSError):  # a terminal that went: Ray must not wait for it
                        print(text, file=terminal, flush=True)

    threading.Thread(target=follow, name="ray-output", daemon=True).start()
