"""Shows on the terminal what the processes of a Ray of our own write to their log files, a line each with its name."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from cluster.logs import ESCAPES

_LOOK_S: Final = 0.1
_MAX_LINE_BYTES: Final = 1 << 16  #: a longer one is shown in pieces
#: What is more than that behind is not shown: a terminal is slower than a process that writes without end.
_MAX_BEHIND_BYTES: Final = 4 * 2**20
_SUFFIX: Final = ".log"

#: What native code and libraries write cannot move the cursor either, but to the next tab stop.
LINE_ESCAPES: Final = {code: text for code, text in ESCAPES.items() if chr(code) != "\t"}


class LogTail:
    """Follows all log files of a directory, on a thread of its own, until it is closed."""

    def __init__(self, directory: Path, on_line: Callable[[str, str], None]) -> None:
        """Call `on_line` with the name of a process and each line that it has written, or writes from now on."""
        self._directory = directory
        self._on_line = on_line
        self._files: dict[str, _Followed] = {}  #: by name
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="logs", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Show all that was written by now, before this returns."""
        with self._lock:
            paths: list[Path] = []
            with contextlib.suppress(OSError):
                paths = sorted(self._directory.glob(f"*{_SUFFIX}"))
            for path in paths:
                name = path.name.removesuffix(_SUFFIX)
                if name not in self._files:
                    with contextlib.suppress(OSError):
                        self._files[name] = _Followed(path)
            for name, followed in self._files.items():
                for line in followed.lines():
                    self._on_line(name, line)

    def close(self) -> None:
        """Show what is left, half lines too, and let go of the files."""
        self._ending.set()
        self._thread.join()
        self.drain()
        for name, followed in self._files.items():
            if rest := followed.close():
                self._on_line(name, rest)

    def _follow(self) -> None:
        while not self._ending.wait(_LOOK_S):
            self.drain()


class _Followed:
    """One file, and the one that takes its name when it has become too large."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: IO[bytes] = path.open("rb")
        self._begun = b""  #: of a line

    def lines(self) -> list[str]:
        """Read on; return the lines that have ended since."""
        said = self._read()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino != os.fstat(self._stream.fileno()).st_ino:
                said += self._read()  # what came between; the former file is whole once another one has its name
                following = self._path.open("rb")
                self._stream.close()
                self._stream = following
                said += self._read()
        *ended, self._begun = (self._begun + said).split(b"\n")
        if len(self._begun) > _MAX_LINE_BYTES:
            end = _end_of_characters(self._begun)
            ended.append(self._begun[:end])
            self._begun = self._begun[end:]
        return [_plain(line) for line in ended]

    def close(self) -> str:
        """Let go of the file; return what was begun and has no end."""
        self._stream.close()
        return _plain(self._begun)

    def _read(self) -> bytes:
        num_behind = os.fstat(self._stream.fileno()).st_size - self._stream.tell()
        if num_behind < 0:  # somebody cut it off, as logrotate does
            self._stream.seek(0)
        elif num_behind > _MAX_BEHIND_BYTES:
            skipped = num_behind - _MAX_BEHIND_BYTES // 2
            self._stream.seek(skipped, os.SEEK_CUR)
            said = b"... %d bytes are not shown, they are in %s\n" % (skipped, os.fsencode(self._path))
            return said + self._stream.read()
        return self._stream.read()


def _end_of_characters(text: bytes) -> int:
    """Return where the last character ends that is in `text` as a whole."""
    for begin in range(len(text) - 1, max(len(text) - 4, -1), -1):
        if text[begin] & 0xC0 == 0xC0:  # the first byte of several
            return begin
        if text[begin] < 0x80:
            break
    return len(text)


def _plain(line: bytes) -> str:
    return line.rstrip(b"\r").decode("utf-8", "replace").translate(LINE_ESCAPES)


def terminal_line(name: str, line: str, style: str) -> str:
    """Write a process's line as the terminal shows it: after its name, or as JSON with its name in `worker`."""
    if style != "json":
        return f"{name} | {line}"
    fields = {}
    if line.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(line)
    if not isinstance(fields, dict) or "message" not in fields:  # not by way of logging
        fields = {"message": line}
    return json.dumps({"worker": name, **fields})
