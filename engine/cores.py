"""The cores of a node: how many this process may use, and how the workers of the node share them.

Who has something to compute has a part of the cores, and all of them while the others have nothing. No core is shared:
a worker takes one more only once the other has given it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

#: Of a process that computes a model: how often a thread of torch's looks for work before it sleeps, for some 0.1 ms.
#: Longer than the way from one operator to the next, so that nothing is lost alone, and much shorter than the kernel
#: lets another thread run meanwhile. libgomp's own is 30 times that; 1,000, or sleeping at once, costs a quarter of the
#: tokens/s (docs/LOG.md).
OMP_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
#: A file that every process of the node can read and none can replace: only locked, never read.
_FILE = Path("/sys/devices/system/cpu/online")
#: `struct flock` of <fcntl.h>, 64 bits: type, from where, first byte, number of bytes, process.
_FLOCK = "hhqqi4x"
#: A worker's bytes begin at a multiple of so many, more than there are cores.
_PLACE_BYTES = 1 << 16
#: Those of workers that share the same cores lie within so many.
_SHARED_BYTES = 1 << 40
#: For a core to come free: as long as a layer of a large chunk takes. A worker that stands still gives none back.
_MAX_WAIT_S = 0.02
_POLL_S = 0.0002


def num_cores(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Count the cores that this process may use at a time, at least one: those it is bound to, within its quotas.

    Kubernetes sets a limit of CPUs as a quota of time in each period: threads beyond it would all be stopped at once.
    Part of a core counts as one. `cgroups` is where the kernel shows control groups, of either version; a container
    sees its own there.
    """
    quotas = map(_quota, _groups(cgroups, membership))
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *quotas])))


def _groups(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> list[Path]:
    """Return the control groups that this process is in, which may limit its cores."""
    groups: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                root = cgroups / "cpu" if controllers else cgroups
                group = root / path.lstrip("/")
                groups += [each for each in (group, *group.parents) if each == root or root in each.parents]
    return groups


def _whose_cores() -> int:
    """Number the cores that this process may use, 22 bits: the same for all that share them, within the same quotas."""
    limits = [group for group in _groups() if _quota(group) < math.inf]
    told = repr((sorted(os.sched_getaffinity(0)), [(at.st_dev, at.st_ino) for at in map(os.stat, limits)]))
    return zlib.crc32(told.encode()) >> 10


def _quota(group: Path) -> float:
    """Return the cores that a control group may use at a time; infinity where it has no limit."""
    with contextlib.suppress(OSError, ValueError):  # version 2; "max" is no limit
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1; -1 is no limit
        quota_us = int((group / "cpu.cfs_quota_us").read_text())
        return quota_us / int((group / "cpu.cfs_period_us").read_text()) if quota_us > 0 else math.inf
    return math.inf


def fair_share(num_cores: int, num_workers: int, rank: int) -> int:
    """Return the cores of that worker, 0 to `num_workers` - 1, which has at least one; the first get what is left."""
    return max(1, (num_cores + num_workers - 1 - rank) // num_workers)


class NodeCores:
    """One worker's part of the cores of its node. All calls from one thread at a time.

    What a worker has is told by a lock on bytes of a file, which the kernel drops when the process ends, however it
    ends:

        bytes   place                     it has something to compute
                place + 1 ... place + n   on n cores

    Workers that are bound to other cores, or have quotas of their own, look at other bytes: what one of them takes the
    others do not lack. Each takes all that it may use, as do those that do not see each other's locks, in containers of
    their own, and all where the kernel has no such locks.
    """

    def __init__(self, num_cores: int, file: Path = _FILE, *, max_wait_s: float = _MAX_WAIT_S) -> None:
        self.num_cores = num_cores
        self._max_wait_s = max_wait_s
        self._begin = _whose_cores() * _SHARED_BYTES  # of the bytes of those that share these cores
        self._place = self._begin + secrets.randbelow(_SHARED_BYTES // _PLACE_BYTES) * _PLACE_BYTES
        self._num_taken = 0
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self._unlock(0)

    def take(self, wanted: int) -> int:
        """Take up to so many cores, at least one; who asked before gives back what is more than its part now.

        Returns:
            How many it has. It waits only where it has none and none is free, and not for long.
        """
        if self._file is None:
            return wanted
        if not self._num_taken:
            self._lock(1)  # the others see it, and give back
        until_s = time.monotonic() + self._max_wait_s
        while True:
            others = dict(self._others())
            rank = sum(place < self._place for place in others)
            share = min(wanted, fair_share(self.num_cores, len(others) + 1, rank))
            before = self._num_taken
            self._tell(min(share, max(before, self._num_free(others))))
            if self._num_taken > max(before, self._num_free(dict(self._others()))):
                self._tell(before)  # another took at the same time
            if self._num_taken or len(others) >= self.num_cores or time.monotonic() >= until_s:
                break
            time.sleep(_POLL_S)
        self._tell(max(1, self._num_taken))
        return self._num_taken

    def give_back(self) -> None:
        """Have nothing to compute."""
        if self._file is not None and self._num_taken:
            self._unlock(0)
        self._num_taken = 0

    def close(self) -> None:
        """Give back, and be seen no more."""
        self._num_taken = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _num_free(self, others: dict[int, int]) -> int:
        """Return how many of the cores no other worker computes on."""
        return max(0, self.num_cores - sum(others.values()))

    def _tell(self, num_taken: int) -> None:
        if num_taken > self._num_taken:
            self._lock(1 + num_taken)
        elif num_taken < self._num_taken:
            self._unlock(1 + num_taken)
        self._num_taken = num_taken

    def _others(self) -> Iterator[tuple[int, int]]:
        """Yield of each other worker that has something to compute its place, and on how many cores it computes."""
        ranges = [(self._begin, self._begin + _SHARED_BYTES)]
        while ranges:
            begin, end = ranges.pop()
            kind, place, length = self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, begin, end - begin)
            if kind != fcntl.F_UNLCK:  # any lock of the range, not the first
                yield place, length - 1
                ranges += [(a, b) for a, b in ((begin, place), (place + length, end)) if a < b]

    def _lock(self, length: int) -> None:
        self._call(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, self._place, length)

    def _unlock(self, begin: int) -> None:
        self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, self._place + begin, _PLACE_BYTES - begin)

    def _call(self, command: int, kind: int, begin: int, length: int) -> tuple[int, int, int]:
        assert self._file is not None
        answer = fcntl.fcntl(self._file, command, struct.pack(_FLOCK, kind, os.SEEK_SET, begin, length, 0))
        found, _, place, size, _ = struct.unpack(_FLOCK, answer)
        return found, place, size
