"""Files that note what is changed, so that any loss of power can be replayed."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import NamedTuple

from nodecache.disk.files import Files

_SECTOR_BYTES = 512


class Write(NamedTuple):
    file: int
    offset: int
    content: bytes


class Allocate(NamedTuple):
    file: int
    num_bytes: int


class Sync(NamedTuple):
    file: int


class Create(NamedTuple):
    name: str
    file: int


class Rename(NamedTuple):
    source: str
    target: str


class Unlink(NamedTuple):
    name: str


class SyncDirectory(NamedTuple):
    pass


class RecordingFiles(Files):
    """The real files, and a log of all changes to the one directory that they are in."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self._lock = threading.Lock()
        self._names: dict[str, int] = {}
        self._open: dict[int, int] = {}
        self._num_files = 0

    def note(self, entry: tuple) -> None:
        with self._lock:
            self.log.append(entry)

    def open(self, path: Path, flags: int) -> int:
        with self._lock:
            fd = super().open(path, flags)
            if flags & os.O_TRUNC:
                self._num_files += 1
                self._names[path.name] = self._num_files
                self.log.append(Create(path.name, self._num_files))
            self._open[fd] = self._names[path.name]
            return fd

    def write(self, fd: int, source: memoryview, offset: int) -> None:
        super().write(fd, source, offset)
        self.note(Write(self._open[fd], offset, bytes(source)))

    def allocate(self, fd: int, num_bytes: int) -> None:
        super().allocate(fd, num_bytes)
        self.note(Allocate(self._open[fd], num_bytes))

    def sync(self, fd: int) -> None:
        self.note(Sync(self._open[fd]))

    def sync_directory(self, path: Path) -> None:
        self.note(SyncDirectory())

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            super().rename(source, target)
            self._names[target.name] = self._names.pop(source.name)
            self.log.append(Rename(source.name, target.name))

    def unlink(self, path: Path) -> None:
        with self._lock:
            super().unlink(path)
            self._names.pop(path.name, None)
            self.log.append(Unlink(path.name))


def lose_power(log: list[tuple], rng: random.Random, directory: Path) -> None:
    """Make the directory as it may lie on disk when power is lost after `log`.

    What was synced is there. Of other writes any sectors are, in any order; of other changes to the directory any.
    """
    contents: dict[int, bytearray] = {}
    pending: dict[int, list[tuple]] = {}
    names: dict[str, int] = {}
    pending_names: list[tuple] = []
    for entry in log:
        match entry:
            case Write() | Allocate():
                pending.setdefault(entry.file, []).append(entry)
            case Sync():
                for earlier in pending.pop(entry.file, []):
                    _apply(contents, earlier)
            case Create() | Rename() | Unlink():
                pending_names.append(entry)
            case SyncDirectory():
                for earlier in pending_names:
                    _rename(names, earlier)
                pending_names.clear()
    share = rng.choice([0.0, 0.5, 0.9, 1.0])
    for entry in pending_names:
        if rng.random() < share:
            _rename(names, entry)
    for entries in pending.values():
        rng.shuffle(entries)
        for entry in entries:
            _apply_some(contents, entry, rng, share)
    directory.mkdir(parents=True)
    for name, file in names.items():
        (directory / name).write_bytes(contents.get(file, b""))


def _rename(names: dict[str, int], entry: tuple) -> None:
    match entry:
        case Create(name, file):
            names[name] = file
        case Rename(source, target) if source in names:
            names[target] = names.pop(source)
        case Unlink(name):
            names.pop(name, None)


def _apply(contents: dict[int, bytearray], entry: Write | Allocate) -> None:
    content = contents.setdefault(entry.file, bytearray())
    end = entry.num_bytes if isinstance(entry, Allocate) else entry.offset + len(entry.content)
    content.extend(bytes(max(0, end - len(content))))
    if isinstance(entry, Write):
        content[entry.offset : end] = entry.content


def _apply_some(contents: dict[int, bytearray], entry: Write | Allocate, rng: random.Random, share: float) -> None:
    if isinstance(entry, Allocate):
        if rng.random() < share:
            _apply(contents, entry)
        return
    for begin in range(0, len(entry.content), _SECTOR_BYTES):
        if rng.random() < share:
            piece = entry.content[begin : begin + _SECTOR_BYTES]
            _apply(contents, Write(entry.file, entry.offset + begin, piece))
