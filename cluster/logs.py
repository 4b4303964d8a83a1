"""Logging: one line per record (a traceback adds its own), text or JSON, to stderr.

On a Ray of our own stdout and stderr of each process are a file of its name, and the command line shows what is written
there (`cluster/log_tail.py`): whatever a process says, native code's last words too, and a terminal that stands still
stops nobody.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

#: our rooms; everything else keeps its own level and handlers
ROOMS = ("messages", "kvcache", "transport", "nodecache", "engine", "prefill", "decode", "kvrouter", "cluster")

#: Of a log file, after which another one is begun; one former file is kept.
_MAX_BYTES = 64 * 2**20
FORMER = ".1"  #: is added to its name

_STDOUT, _STDERR = 1, 2

_log_file: Path | None = None  #: where stdout and stderr of this process lead, if it is a file of ours

#: Control characters as Python writes them: a message cannot forge a line or move the cursor.
ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._start = f"{process} | " if process else ""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = record.getMessage().translate(ESCAPES)
        line = f"{self._start}{clock} {record.levelname.lower():7} {record.name}: {text}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._start = {"worker": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            **self._start,
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logging(level: str, style: str, process: str = "") -> None:
    """Let our rooms log from `level` ("debug", ...) on, in `style` ("text" or "json"). The last call counts.

    `process` is said in each line where several processes write to one place.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(process) if style == "json" else _TextFormatter(process))
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def open_process_log(level: str, style: str, directory: str | None, name: str) -> None:
    """Send all that this process writes to a file of `name` in `directory`, and configure logging.

    Without a directory stdout and stderr stay what they are, Ray's files, and each line says the name.
    """
    global _log_file
    if directory is not None:
        _log_file = Path(directory) / f"{name}.log"
        _lead_to(_log_file)
    configure_logging(level, style, "" if directory is not None else name)


def turn_over_log() -> None:
    """Begin another file where that of this process has become too large; call it now and then."""
    if _log_file is None or os.fstat(_STDERR).st_size < _MAX_BYTES:
        return
    # The next file has the name only when nothing more goes to the former: a reader that sees it has all of that.
    following = _log_file.with_name(f"{_log_file.name}.next")
    with contextlib.suppress(OSError):  # a full disk, or a session that is cleaned: go on as before
        _lead_to(following)
        _log_file.replace(_log_file.with_name(_log_file.name + FORMER))
        following.replace(_log_file)


def _lead_to(path: Path) -> None:
    """Let stdout and stderr of this process, and of those that it starts, be the file at `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for stream in (_STDOUT, _STDERR):
        os.dup2(descriptor, stream)
    os.close(descriptor)
