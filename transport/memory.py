"""Memory that other processes of the same node and user may read.

An anonymous file of the kernel (memfd): no name in /dev/shm, freed by the kernel when the last process that maps it
ends, however it ends. Peers reach it through the owner's /proc/<pid>/fd, which the kernel lets only the same user do.

    [data: num_bytes][padding to a page][header: magic, version, num_bytes, nonce][padding to a page][tail]
    ^ page aligned, aligned for huge pages where the kernel grants them

The header tells a reader that what it opened is what was described to it; it lies behind the data so that the data
begins where the mapping begins. What lies in the tail, if there is one, no peer maps: the owner's own notes, for the
process that adopts the file after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import secrets
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from messages.errors import ConfigError
from transport.checksum import copy_all_checked
from transport.protocol import Copies, CopyWatch, MappedRegion, RegionError, RegionMemory

_CGROUP = Path("/sys/fs/cgroup")


class _ControlGroup(NamedTuple):
    """Where a version of the kernel's control groups keeps its numbers, below _CGROUP."""

    limit: str
    used: str
    stat: str
    idle: str  #: in `stat`: of cached files


_CONTROL_GROUPS = (
    _ControlGroup("memory.max", "memory.current", "memory.stat", "inactive_file"),
    _ControlGroup(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)

PAGE_BYTES = mmap.PAGESIZE
NONCE_BYTES = 16

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; not in Python's mmap yet
_POPULATE_BYTES = 2 << 20  # at a time, about 1 ms
_MAX_POPULATED_BYTES = 16 << 30  # of another's memory: the tables of these pages take 32 MiB in each process

_HEADER = struct.Struct("<8sQQ16s")  # magic, layout version, num_bytes, nonce
_MAGIC = b"kvraymem"
_VERSION = 1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Memory:
    """Writable host memory that is mapped shared: a `transport.protocol.RegionMemory`.

    `Memory.allocate` makes it, `Memory.adopt` takes over what another process made.
    """

    is_host = True

    def __init__(self, fd: int, mapping: mmap.mmap, num_bytes: int) -> None:
        self._fd = fd
        self._mapping = mapping
        self.num_bytes = num_bytes
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        #: [num_bytes] uint8, writable, page aligned; stays valid as long as anyone refers to it
        self.view = memoryview(mapping)[:num_bytes]
        #: writable bytes that peers do not map, page aligned; at least as many as were asked for
        self.tail = memoryview(mapping)[_tail_offset(num_bytes) :]

    @classmethod
    def allocate(cls, num_bytes: int, *, tail_bytes: int = 0) -> Memory:
        """Allocate zeroed memory, every page of it reserved: writing to it later cannot fail (nor raise SIGBUS).

        Takes about 0.3 s per GiB, the kernel's zeroing; call it in a thread where a loop runs.

        Raises:
            ConfigError: there is not that much memory, or `num_bytes` is not positive.
        """
        if num_bytes < 1:
            raise ConfigError(f"memory of {num_bytes} bytes asked for: at least 1 wanted")
        # An anonymous file is bounded by nothing but the out-of-memory killer: look before reserving.
        available = available_bytes()
        if num_bytes + tail_bytes > available:
            raise ConfigError(
                f"memory of {num_bytes + tail_bytes:,} bytes asked for, {available:,} bytes are available"
            )
        total = _tail_offset(num_bytes) + tail_bytes
        fd = os.memfd_create("kvray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, total)
            # A file that cannot shrink cannot give its readers a SIGBUS either.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls._mapped(fd, num_bytes, total)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"memory of {num_bytes:,} bytes could not be reserved: {error.strerror}") from error

    @classmethod
    def adopt(cls, fd: int, num_bytes: int, *, tail_bytes: int = 0) -> Memory:
        """Take over memory that `allocate` made with the same arguments, in this process or another; `fd` is owned now.

        The bytes are as they were left; the nonce is another one, so that whoever opened the memory before finds out
        once it is published.

        Raises:
            ConfigError: `fd` is no such memory.
        """
        total = _tail_offset(num_bytes) + tail_bytes
        try:
            _check_file(fd, total, total)
            return cls._mapped(fd, num_bytes, total)
        except (OSError, ValueError) as error:
            raise ConfigError(f"descriptor {fd} is not the memory wanted: {error}") from error

    @classmethod
    def _mapped(cls, fd: int, num_bytes: int, total: int) -> Memory:
        mapping = mmap.mmap(fd, total, flags=mmap.MAP_SHARED)
        with contextlib.suppress(OSError):  # kernels without huge pages for shared memory refuse: nothing is lost
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return cls(fd, mapping, num_bytes)

    @property
    def fd(self) -> int:
        """Descriptor of the file behind the memory, valid until `close`."""
        if self._fd < 0:
            raise ValueError("the memory is closed")
        return self._fd

    def slice(self, offset: int, num_bytes: int) -> memoryview:
        """Return a view of `num_bytes` writable bytes from `offset` on."""
        return self.view[offset : offset + num_bytes]

    def fill(self, source: MappedRegion, copies: Copies, watch: CopyWatch) -> list[int]:
        """Carry out all copies out of `source`, in order; return the checksums of what each wrote. Any thread."""
        return copy_all_checked(self.view, source.view, copies, watch)

    def prepare(self, source: MappedRegion) -> None:
        """Begin to map every page of `source`, on a thread of its own."""
        threading.Thread(target=source.populate, name="populate-region", daemon=True).start()

    def populate(self) -> None:
        """Map every page, without changing a byte: the first touch of a page costs three copies of it.

        About 0.4 s per GiB; made for a thread beside others, as it stops often. Kernels before 5.14 cannot: no harm.
        """
        _populate(self._mapping, self.num_bytes, _MADV_POPULATE_WRITE, lambda: self._fd >= 0)

    def publish(self) -> None:
        """Write the header: from now on `SharedView.open` with this nonce succeeds."""
        header = _HEADER.pack(_MAGIC, _VERSION, self.num_bytes, self.nonce)
        offset = _header_offset(self.num_bytes)
        self._mapping[offset : offset + _HEADER.size] = header

    def withdraw(self) -> None:
        """Wipe the header: readers that opened it before find out at their next look."""
        offset = _header_offset(self.num_bytes)
        self._mapping[offset : offset + _HEADER.size] = bytes(_HEADER.size)

    def close(self) -> None:
        """Withdraw the memory and close its file. The bytes go when the last view of them does, here and at peers."""
        if self._fd < 0:
            return
        self.withdraw()
        os.close(self._fd)
        self._fd = -1

    def __repr__(self) -> str:
        return f"Memory(num_bytes={self.num_bytes})"


class SharedView:
    """Another process's `Memory`, without its tail. Stays readable after its owner died; check `is_current`."""

    def __init__(self, mapping: mmap.mmap, num_bytes: int, nonce: bytes) -> None:
        self._mapping = mapping
        self._nonce = nonce
        self.num_bytes = num_bytes
        #: [num_bytes] uint8, page aligned, read-only unless it was opened writable
        self.view = memoryview(mapping)[:num_bytes]

    @classmethod
    def open(cls, pid: int, fd: int, num_bytes: int, nonce: bytes, *, is_writable: bool = False) -> SharedView:
        """Map what process `pid` has open as `fd`, if it is the memory that was described.

        Raises:
            OSError: the process or the file is gone, or belongs to another user.
            ValueError: it is another file than the one described.
        """
        # Non-blocking: a recycled number may be a pipe, whose open would wait for a writer.
        mode = os.O_RDWR if is_writable else os.O_RDONLY
        own_fd = os.open(f"/proc/{pid}/fd/{fd}", mode | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            total = _tail_offset(num_bytes)
            _check_file(own_fd, total)
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
            mapping = mmap.mmap(own_fd, total, flags=mmap.MAP_SHARED, prot=prot)
        finally:
            os.close(own_fd)
        opened = cls(mapping, num_bytes, nonce)
        if not opened.is_current():
            raise ValueError("the nonce differs from the one described")
        return opened

    def populate(self) -> None:
        """As `Memory.populate`, of the first 16 GiB; ends early once the owner has withdrawn it."""
        advice = _MADV_POPULATE_READ if self.view.readonly else _MADV_POPULATE_WRITE
        _populate(self._mapping, min(self.num_bytes, _MAX_POPULATED_BYTES), advice, self.is_current)

    def is_current(self) -> bool:
        """Tell whether the owner still publishes this memory under the nonce it was opened with."""
        offset = _header_offset(self.num_bytes)
        expected = _HEADER.pack(_MAGIC, _VERSION, self.num_bytes, self._nonce)
        return self._mapping[offset : offset + _HEADER.size] == expected


def _populate(mapping: mmap.mmap, num_bytes: int, advice: int, is_wanted: Callable[[], bool]) -> None:
    with contextlib.suppress(OSError):
        for offset in range(0, num_bytes, _POPULATE_BYTES):
            if not is_wanted():
                return
            mapping.madvise(advice, offset, min(_POPULATE_BYTES, num_bytes - offset))
            time.sleep(0.001)  # madvise keeps the interpreter's lock


def as_host_memory(memory: RegionMemory, road: str) -> Memory:
    """Return `memory` itself, once it is known to be host memory.

    Raises:
        RegionError: it lies on an accelerator, which `road` does not reach.
    """
    if not isinstance(memory, Memory):
        raise RegionError(f"{road}: host memory is wanted, saw {type(memory).__name__}")
    return memory


def available_bytes() -> int:
    """Return the bytes that can be had without pushing anyone out of the machine's or the control group's memory."""
    available = psutil.virtual_memory().available
    for group in _CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # absent, or "max"
            counts = dict(line.split() for line in (_CGROUP / group.stat).read_text().splitlines())
            used = int((_CGROUP / group.used).read_text()) - int(counts[group.idle])  # cached files give way
            available = min(available, int((_CGROUP / group.limit).read_text()) - used)
    return max(available, 0)


def total_bytes() -> int:
    """Return the bytes of this machine's memory, or of the control group's limit where that is less."""
    total = psutil.virtual_memory().total
    for group in _CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            total = min(total, int((_CGROUP / group.limit).read_text()))
    return total


def _header_offset(num_bytes: int) -> int:
    return (num_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def _tail_offset(num_bytes: int) -> int:
    return _header_offset(num_bytes) + PAGE_BYTES


def _check_file(fd: int, min_bytes: int, max_bytes: float = math.inf) -> None:
    """Raise ValueError unless `fd` is a file of such a size that cannot shrink; OSError where it has no seals."""
    seen = os.fstat(fd)
    if not stat.S_ISREG(seen.st_mode) or not min_bytes <= seen.st_size <= max_bytes:
        raise ValueError(f"a file of {min_bytes} bytes wanted, one of {seen.st_size} bytes found")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise ValueError("the file could shrink under its reader")
