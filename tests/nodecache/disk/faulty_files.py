"""Files that fail or hang where a test says so, and are the real ones otherwise."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from nodecache.disk.files import Files


class FaultyFiles(Files):
    """`failing`: names of calls to the error number that they raise; calls in `held` wait until `release`."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.bad_offsets: set[int] = set()  #: reads that touch one of them fail with EIO
        self.held: set[str] = set()
        self._released = threading.Event()
        self.num_waiting = 0
        self._count = threading.Condition()

    def release(self) -> None:
        self.held.clear()
        self._released.set()

    def wait_for_waiting(self, number: int) -> None:
        with self._count:
            assert self._count.wait_for(lambda: self.num_waiting >= number, 30)

    def _meet(self, call: str) -> None:
        if call in self.held:
            with self._count:
                self.num_waiting += 1
                self._count.notify_all()
            assert self._released.wait(60)
        if call in self.failing:
            raise OSError(self.failing[call], os.strerror(self.failing[call]))

    def open(self, path: Path, flags: int) -> int:
        self._meet("open")
        return super().open(path, flags)

    def read(self, fd: int, target: memoryview, offset: int) -> int:
        self._meet("read")
        if any(offset <= bad < offset + len(target) for bad in self.bad_offsets):
            raise OSError(5, os.strerror(5))
        return super().read(fd, target, offset)

    def write(self, fd: int, source: memoryview, offset: int) -> None:
        self._meet("write")
        super().write(fd, source, offset)

    def allocate(self, fd: int, num_bytes: int) -> None:
        self._meet("allocate")
        super().allocate(fd, num_bytes)

    def sync(self, fd: int) -> None:
        self._meet("sync")
        super().sync(fd)

    def sync_directory(self, path: Path) -> None:
        self._meet("sync_directory")
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._meet("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._meet("unlink")
        super().unlink(path)
