"""The node's shared memory: the puller maps the owner's region, and copies and hashes in one pass by itself.

Reaches processes of the same user in the same pid namespace; pods do not see each other this way. A region in a
device's memory is mapped by devices (CUDA IPC), beside a page of host memory that tells whether it is still published.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Protocol, cast

import msgspec
import numpy as np

from messages.handoff import RegionInfo
from transport.memory import Memory, SharedView, as_host_memory
from transport.protocol import (
    Arrived,
    Copies,
    Copy,
    CopyWatch,
    Link,
    MappedRegion,
    RegionError,
    RegionMemory,
    TransferError,
    check_ranges,
)

logger = logging.getLogger(__name__)

#: Regions mapped writable, by nonce: who opens one again gets the same mapping, whose pages may be locked by now.
_writable: weakref.WeakValueDictionary[bytes, SharedView] = weakref.WeakValueDictionary()

#: What is told at once of what arrived: 2 to 4 ms of copying. A batch costs about 10 us: with 4 MiB, 5 % of a pull.
_BATCH_BYTES = 32 << 20
#: Up to here a copy takes 1 to 2 ms; the way to a thread and back takes 0.4, and much longer on a busy machine.
_INLINE_BYTES = 8 << 20
_INLINE_COPIES = 256
_NUM_THREADS = 2
_HEADER_BYTES = 1  #: of the host memory that belongs to a device's


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """Where a region's file is found, and by whom."""

    node: str
    pid: int
    fd: int
    device: bytes = b""  #: of a device's memory: what it exported; `fd` is that of its header then


class DeviceRegionMemory(RegionMemory, Protocol):
    """A device's memory, which other processes of the node can map."""

    @property
    def header(self) -> Memory:
        """Host memory of the same nonce."""
        ...

    def export(self) -> bytes:
        """Describe the memory to `open`; RegionError where that cannot be."""
        ...

    def open(self, handle: bytes, num_bytes: int, header: SharedView) -> MappedRegion:
        """Map what another process's `export` described; RegionError where it cannot be reached."""
        ...


class ShmTransport:
    """The `Transport` of road "shm". One-sided; a pull that was given up has stopped writing when it returns."""

    road = "shm"
    is_one_sided = True
    is_direct = True

    def __init__(self) -> None:
        self._registered: dict[bytes, tuple[RegionMemory, Memory]] = {}  # nonce -> own memory, what tells of it
        self._opened: dict[bytes, MappedRegion] = {}  # nonce -> a peer's
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="shm-pull")
        self._jobs: set[_CopyJob] = set()
        self._links: dict[Link, set[bytes]] = {}  # nonces opened for a peer
        self._is_closed = False

    def can_fill(self, memory: RegionMemory) -> bool:
        """Tell that pulls can land in any memory: a device's takes what is mapped here by itself."""
        return True

    def register(self, memory: RegionMemory) -> RegionInfo:
        """Make `memory` readable by peers of this node; the answer describes it to them. Idempotent.

        Raises:
            RegionError: it is a device's and cannot be exported, or the transport is closed.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        exported = b""
        if memory.is_host:
            published = as_host_memory(memory, self.road)
        else:
            of_device = cast(DeviceRegionMemory, memory)
            exported, published = of_device.export(), of_device.header
        published.publish()
        self._registered[memory.nonce] = memory, published
        handle = _Handle(_node_identity(), os.getpid(), published.fd, exported)
        return RegionInfo(
            road=self.road, handle=msgspec.msgpack.encode(handle), num_bytes=memory.num_bytes, nonce=memory.nonce
        )

    async def pull(
        self,
        link: Link,
        source: RegionInfo,
        copies: Sequence[Copy],
        target: RegionMemory,
        stall_s: float,
        on_arrived: Arrived | None = None,
    ) -> None:
        """Carry out all copies, in order; return when the last byte has landed. A dead owner's memory can be read, too.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: no byte was copied for `stall_s` seconds, or this transport was closed.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        opened = self._open(link, source, target)
        rows = Copies.of(copies)
        check_ranges(rows, source.num_bytes, target.num_bytes)
        job = _CopyJob(opened, rows, target, on_arrived)
        if target.is_host and len(rows) <= _INLINE_COPIES and rows.num_bytes <= _INLINE_BYTES:
            job.run()
        else:
            await self._run_in_thread(job, stall_s)

    def on_message(self, link: Link, body: bytes) -> None:
        """Drop the message with a warning: this road is one-sided, and its ends say nothing over the link."""
        logger.warning("shm: a message of %d bytes that nobody wanted", len(body))

    def on_link_lost(self, link: Link) -> None:
        """Unmap the peer's regions; a dead owner's memory is freed only when all its readers have."""
        for nonce in self._links.pop(link, ()):
            self._opened.pop(nonce, None)

    def carriers(self, link: Link) -> str:
        """Return "memcpy": this process's CPU copies."""
        return "memcpy"

    def close(self) -> None:
        """Withdraw what was registered and unmap what was opened. Pulls under way end with TransferError."""
        self._is_closed = True
        for _, published in self._registered.values():
            published.withdraw()
        self._registered.clear()
        self._opened.clear()
        for job in self._jobs:
            job.watch.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, link: Link, source: RegionInfo, target: RegionMemory) -> MappedRegion:
        opened = self._opened.get(source.nonce)
        if opened is None:
            handle = _handle_of(source)
            if not handle.device:
                # Pages that are mapped to be read only cannot be locked for a device; nobody writes to these either.
                opened = open_region(source, is_writable=not target.is_host)
            elif target.is_host:
                raise RegionError("shm: a device's memory cannot be pulled into a host's")
            else:
                header = _mapped(handle, _HEADER_BYTES, source.nonce, is_writable=False)
                opened = cast(DeviceRegionMemory, target).open(handle.device, source.num_bytes, header)
            target.prepare(opened)
            self._opened[source.nonce] = opened
            if not link.is_lost:
                self._links.setdefault(link, set()).add(source.nonce)
        elif not opened.is_current():
            del self._opened[source.nonce]
            raise RegionError("the region was withdrawn by its owner")
        elif opened.num_bytes != source.num_bytes:
            raise RegionError(f"the region has {opened.num_bytes} bytes, {source.num_bytes} were described")
        return opened

    async def _run_in_thread(self, job: _CopyJob, stall_s: float) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        self._jobs.add(job)
        future = self._threads.submit(job.run)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
        try:
            num_bytes = -1
            while not ended.is_set() and num_bytes != job.watch.num_bytes:  # one look per `stall_s`
                num_bytes = job.watch.num_bytes
                with suppress(TimeoutError):
                    async with asyncio.timeout(stall_s):
                        await ended.wait()
        finally:
            if not ended.is_set():
                job.watch.stop()
                future.cancel()  # for a job that no thread has begun
                await _settled(ended)
            self._jobs.discard(job)
        try:
            future.result()
        except CancelledError:
            error = TransferError(f"shm: not begun within {stall_s:g} s, or closed")
            error.is_busy = not self._is_closed
            raise error from None


class _CopyJob:
    """The copies of one pull; another thread can tell it to stop."""

    def __init__(self, source: MappedRegion, copies: Copies, target: RegionMemory, on_arrived: Arrived | None) -> None:
        self._source = source
        self._target = target
        self._copies = copies
        self._on_arrived = on_arrived
        self.watch = CopyWatch()

    def run(self) -> None:
        first = 0
        for batch in batches(self._copies, _BATCH_BYTES):
            checksums = self._target.fill(self._source, batch, self.watch)
            if self._on_arrived is not None:
                for position, checksum in enumerate(checksums, first):
                    self._on_arrived(position, checksum)
            if len(checksums) < len(batch):
                raise TransferError("shm: given up, nothing was copied for too long, or closed")
            first += len(batch)


async def _settled(ended: asyncio.Event) -> None:
    """Wait until the thread writes no more, through any cancellation, which is then passed on."""
    cancelled: asyncio.CancelledError | None = None
    while not ended.is_set():
        try:
            await ended.wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def batches(copies: Copies, max_bytes: int) -> Iterator[Copies]:
    """Yield the same copies in the same order, together at most `max_bytes`, or one that has more."""
    ends = np.cumsum(copies.table[:, 2])
    begin = num_bytes = 0
    while begin < len(copies):
        end = max(begin + 1, int(np.searchsorted(ends, num_bytes + max_bytes, "right")))
        yield copies[begin:end]
        begin, num_bytes = end, int(ends[end - 1])


def open_region(source: RegionInfo, *, is_writable: bool = False) -> SharedView:
    """Map another process's region; to write in it takes the owner's leave, which no road asks for. One thread.

    Raises:
        RegionError: the region is not there, not on this node, or not the one described.
    """
    handle = _handle_of(source)
    if handle.device:
        raise RegionError("shm: a device's memory cannot be mapped by a CPU")
    known = _writable.get(source.nonce) if is_writable else None
    if known is not None and known.num_bytes == source.num_bytes and known.is_current():
        return known
    opened = _mapped(handle, source.num_bytes, source.nonce, is_writable=is_writable)
    if is_writable:
        _writable[source.nonce] = opened
    return opened


def _handle_of(source: RegionInfo) -> _Handle:
    if source.road != ShmTransport.road:
        raise RegionError(f"a region of road {source.road!r} cannot be read by shm")
    try:
        handle = msgspec.msgpack.decode(source.handle, type=_Handle)
    except msgspec.DecodeError as error:
        raise RegionError(f"shm: the handle cannot be read: {error}") from error
    if handle.node != _node_identity():
        raise RegionError("shm: the region's owner is on another node or in another pid namespace")
    return handle


def _mapped(handle: _Handle, num_bytes: int, nonce: bytes, *, is_writable: bool) -> SharedView:
    try:
        return SharedView.open(handle.pid, handle.fd, num_bytes, nonce, is_writable=is_writable)
    except (OSError, ValueError) as error:
        raise RegionError(f"shm: the region of process {handle.pid} cannot be opened: {error}") from error


@cache
def _node_identity() -> str:
    """Return what is equal exactly where one process's /proc shows the other: same boot, same pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
