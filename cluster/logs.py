"""Logging: one line per record (a traceback adds its own), text or JSON, to stderr."""

from __future__ import annotations

import json
import logging
import sys
import time

#: our rooms; everything else keeps its own level and handlers
ROOMS = ("messages", "kvcache", "transport", "nodecache", "engine", "prefill", "decode", "kvrouter", "cluster")

#: Control characters as Python writes them: a message cannot forge a line or move the cursor.
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), 127)}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower():7} {record.name}: {record.getMessage().translate(_ESCAPES)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logging(level: str, style: str) -> None:
    """Let our rooms log from `level` ("debug", ...) on, in `style` ("text" or "json"). The last call counts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
