"""The node's shared memory: the puller maps the owner's region and copies by itself.

Reaches processes of the same user in the same pid namespace; pods do not see each other this way.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from messages.handoff import RegionInfo
from transport.memory import Memory, SharedView
from transport.protocol import Copy, RegionError, TransferError

#: Between two looks at the deadline: about 1 ms of copying.
_STRIDE_BYTES = 4 << 20
#: Up to here a copy takes about 0.1 ms; so does the way to a thread and back, and much longer on a busy machine.
_INLINE_BYTES = 1 << 20
_INLINE_COPIES = 256
_NUM_THREADS = 2

Bytes = npt.NDArray[np.uint8]


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """Where a region's file is found, and by whom."""

    node: str
    pid: int
    fd: int


class ShmTransport:
    """See `transport.protocol.Transport`. One-sided; a pull that was given up has stopped writing when it returns."""

    road = "shm"
    is_one_sided = True
    can_abort_safely = True

    def __init__(self) -> None:
        self._registered: dict[bytes, Memory] = {}  # nonce -> own memory
        self._opened: dict[bytes, SharedView] = {}  # nonce -> a peer's
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="shm-pull")
        self._jobs: set[_CopyJob] = set()
        self._is_closed = False

    def register(self, memory: Memory) -> RegionInfo:
        """Make `memory` readable by peers of this node; the answer describes it to them. Idempotent."""
        if self._is_closed:
            raise RegionError("the transport is closed")
        memory.publish()
        self._registered[memory.nonce] = memory
        handle = _Handle(_node_identity(), os.getpid(), memory.fd)
        return RegionInfo(
            road=self.road, handle=msgspec.msgpack.encode(handle), num_bytes=memory.num_bytes, nonce=memory.nonce
        )

    async def pull(self, source: RegionInfo, copies: Sequence[Copy], target: Memory, timeout_s: float) -> None:
        """Carry out all copies, in order; return when the last byte has landed.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: it made no end within `timeout_s` seconds, or this transport was closed.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        opened = self._open(source)
        check_ranges(copies, source.num_bytes, target.num_bytes)
        job = _CopyJob(opened, copies, target, deadline_s=time.monotonic() + timeout_s)
        if len(copies) <= _INLINE_COPIES and sum(copy.num_bytes for copy in copies) <= _INLINE_BYTES:
            job.run()
        else:
            await self._run_in_thread(job, timeout_s)

    def forget(self, source: RegionInfo) -> None:
        """Unmap `source`; a dead owner's memory is freed only when all its readers have."""
        self._opened.pop(source.nonce, None)

    def close(self) -> None:
        """Withdraw what was registered and unmap what was opened. Pulls under way end with TransferError."""
        self._is_closed = True
        for memory in self._registered.values():
            memory.withdraw()
        self._registered.clear()
        self._opened.clear()
        for job in self._jobs:
            job.stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, source: RegionInfo) -> SharedView:
        opened = self._opened.get(source.nonce)
        if opened is None:
            opened = _open_region(source)
            self._opened[source.nonce] = opened
        elif not opened.is_current():
            self.forget(source)
            raise RegionError("the region was withdrawn by its owner")
        elif opened.num_bytes != source.num_bytes:
            raise RegionError(f"the region has {opened.num_bytes} bytes, {source.num_bytes} were described")
        return opened

    async def _run_in_thread(self, job: _CopyJob, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        self._jobs.add(job)
        future = self._threads.submit(job.run)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await ended.wait()
        finally:
            if not ended.is_set():
                job.stop.set()  # seen within one stride
                future.cancel()  # for a job that no thread has begun
                await _settled(ended)
            self._jobs.discard(job)
        try:
            future.result()
        except CancelledError:
            raise TransferError("shm: not begun within the deadline, or closed") from None


class _CopyJob:
    """One pull's copies, in strides; can be told to stop from another thread."""

    def __init__(self, source: SharedView, copies: Sequence[Copy], target: Memory, deadline_s: float) -> None:
        self._source: Bytes = np.frombuffer(source.view, dtype=np.uint8)
        self._target: Bytes = np.frombuffer(target.view, dtype=np.uint8)
        self._copies = copies
        self._deadline_s = deadline_s
        self.stop = threading.Event()

    def run(self) -> None:
        for source, target, length in strides(self._copies, _STRIDE_BYTES):
            if self.stop.is_set() or time.monotonic() > self._deadline_s:
                raise TransferError("shm: no end within the deadline, or closed")
            # One plain slice assignment per run of bytes is memcpy without the GIL (the fastest form measured).
            self._target[target : target + length] = self._source[source : source + length]


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


def strides(copies: Sequence[Copy], max_bytes: int) -> Iterator[Copy]:
    """The same bytes in the same order, at most `max_bytes` at a time."""
    for source, target, length in copies:
        for done in range(0, length, max_bytes):
            yield Copy(source + done, target + done, min(max_bytes, length - done))


def check_ranges(copies: Sequence[Copy], source_bytes: int, target_bytes: int) -> None:
    """Raise RegionError unless every copy lies within both regions."""
    for copy in copies:
        if (
            copy.num_bytes < 0
            or not 0 <= copy.source_offset <= source_bytes - copy.num_bytes
            or not 0 <= copy.target_offset <= target_bytes - copy.num_bytes
        ):
            raise RegionError(f"{copy} is out of bounds: source {source_bytes} bytes, target {target_bytes} bytes")


def _open_region(source: RegionInfo) -> SharedView:
    if source.road != ShmTransport.road:
        raise RegionError(f"a region of road {source.road!r} cannot be read by shm")
    try:
        handle = msgspec.msgpack.decode(source.handle, type=_Handle)
    except msgspec.DecodeError as error:
        raise RegionError(f"shm: the handle cannot be read: {error}") from error
    if handle.node != _node_identity():
        raise RegionError("shm: the region's owner is on another node or in another pid namespace")
    try:
        return SharedView.open(handle.pid, handle.fd, source.num_bytes, source.nonce)
    except (OSError, ValueError) as error:
        raise RegionError(f"shm: the region of process {handle.pid} cannot be opened: {error}") from error


@cache
def _node_identity() -> str:
    """Equal exactly where one process's /proc shows the other: same boot, same pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
