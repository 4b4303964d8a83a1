"""Moves blocks between a device's pool and host memory, beside the steps.

    out    [pool] --gathered--> [staging] --runs--> [host]       each direction is a stream with a buffer of its own
    in     [host] --runs--> [staging] --scattered--> [pool]      and the checksums of what was moved are computed there

A run is what lies in a row at both ends: one copy. Host memory whose pages are locked is copied to and from as it lies,
other memory through small locked buffers. All that is gathered, scattered or copied at once is small: a step that is
launched meanwhile waits for no more than some 0.1 ms of it, and its thread for nothing.

What a step wrote is seen here after the step: `note_step` and `end_step` say when. Nothing is written into a block, by
whatever road, before all steps that have ended are done on the device, too: `await_steps`. The other way, a step may
use what was copied in once `copy_in` has returned, for that waits. Whoever gives blocks to be filled gives none that a
step has which was launched and has not ended. Waits here have no deadline of their own, as what was queued may still be
written: a device that hangs does so in the next step, too, whose deadline ends the worker.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from engine.memory.block_moves import gather, scatter
from engine.memory.device import Device, Event, Stream
from engine.memory.device_checksum import checksum_words, unsigned
from engine.memory.page_locks import PageLocks, address_of
from transport.checksum import checksum
from transport.protocol import Copies, CopyWatch, MappedRegion

#: Gathered or scattered by one kernel: 10 us of a GPU.
_STAGING_BYTES = 8 << 20
#: Of one copy between host and device: 80 us at 50 GB/s, for which a step's own inputs may have to wait.
_COPY_BYTES = 4 << 20
_NUM_BOUNCES = 2  #: one is copied by the CPU while the other is by the device


class PendingChecksums:
    """Checksums that a device computes. Any thread."""

    def __init__(self, words: torch.Tensor, event: Event) -> None:
        """Wait for `event` to read `words`, `[n]` int64, on the host."""
        self._words = words
        self._event = event

    def values(self) -> list[int]:
        """Return them, in the order of the blocks, once they are there."""
        self._event.wait()
        words: list[int] = self._words.tolist()
        return unsigned(words)


class DeviceCopies:
    """The ways in and out of one device's pool. Any thread, but for the three methods that belong to the steps'."""

    def __init__(self, device: Device, rows: torch.Tensor) -> None:
        """Copy from and to `rows`, `[num_blocks, block_bytes]` uint8, contiguous, on `device`."""
        self.device = device
        self._rows = rows
        self.page_locks = PageLocks(device)
        self._launched: deque[Event] = deque()  # behind each step that was launched and has not ended
        self._ended: Event | None = None  # behind the last one that has ended
        self._publishing = device.new_stream()  # used by the steps' thread alone
        self._checking = device.new_stream()
        self._check_lock = threading.Lock()
        self._out = _Direction(device, rows.shape[1])
        self._in = _Direction(device, rows.shape[1])
        self._try_all()

    def _try_all(self) -> None:
        """Do once, without a change, all that compiles or uploads something when it is done first: no step waits."""
        self.checksums([0])
        self._in.gather(self._rows, np.zeros(1, np.int64))
        self._in.scatter(self._rows, np.zeros(1, np.int64))
        self._in.settle()

    # ---------------------------------------------------------------------------------------------- the steps' thread

    def note_step(self) -> None:
        """Note that a step was launched: what it writes is there when all is done that this thread has launched."""
        self._launched.append(self.device.step_stream().record())

    def begin_checksums(self, block_ids: Sequence[int]) -> PendingChecksums:
        """Begin to compute the checksums of what the step noted last writes to these blocks. Waits for nothing."""
        self._publishing.wait(self._launched[-1])
        return self._begin_checksums(self._publishing, self._rows, block_ids)

    def end_step(self) -> None:
        """Note that the oldest step noted has ended: from now on others may be told of the blocks that it wrote."""
        self._ended = self._launched.popleft()

    # ----------------------------------------------------------------------------------------------------- any thread

    def are_steps_done(self) -> bool:
        """Tell whether the device is done with all steps that have ended, as it mostly is."""
        return self._ended is None or self._ended.is_done()

    def await_steps(self) -> None:
        """Block until the device is done with all steps that have ended."""
        if self._ended is not None:
            self._ended.wait()

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        """Compute the checksums of what these blocks hold now; blocks until they are there."""
        if not block_ids:
            return []
        self.await_steps()
        with self._check_lock:
            pending = self._begin_checksums(self._checking, self._rows, block_ids)
        return pending.values()

    def copy_out(self, block_ids: Sequence[int], target: memoryview, offsets: Sequence[int]) -> list[int]:
        """Copy blocks to these offsets of `target`; return their checksums, in order. Blocks until all is there.

        Nobody may write these blocks meanwhile.
        """
        if not block_ids:
            return []
        self.await_steps()
        host = torch.frombuffer(target, dtype=torch.uint8)
        places = np.argsort(np.asarray(offsets), kind="stable")  # neighbours are copied as one
        ids, into = np.asarray(block_ids, np.int64)[places], np.asarray(offsets, np.int64)[places]
        with self._out.turn:
            try:
                pending = self._begin_checksums(self._out.stream, self._rows, block_ids)
                for begin, end in self._out.pieces(len(ids)):
                    staging = self._out.gather(self._rows, ids[begin:end])
                    for first, last in _runs(into[begin:end], self._rows.shape[1]):
                        at, num_bytes = int(into[begin + first]), (last - first) * self._rows.shape[1]
                        self._to_host(staging[first:last].view(-1), host[at : at + num_bytes])
            finally:  # nothing may be written to the target once this has returned or raised
                self._out.settle()
        return pending.values()

    def copy_in(self, rows: torch.Tensor, source: MappedRegion, copies: Copies, watch: CopyWatch) -> list[int]:
        """Carry out `copies` out of `source` into `rows`, as `transport.protocol.RegionMemory.fill`. Blocks meanwhile.

        Args:
            rows: `[num_rows, row_bytes]` uint8 on the device, the pool or other memory.
            source: host memory, or a device's that is mapped; may be memory that others write.
            copies: the targets are offsets into all rows. Whole rows go in many at once.
            watch: is asked before anything is copied.
        """
        if watch.is_stopped:
            return []
        self.await_steps()
        begins, targets, lengths = copies.table.T
        row_bytes = rows.shape[1]
        there = source.view if isinstance(source.view, torch.Tensor) else _host_tensor(source.view)
        with self._in.turn:
            if row_bytes == self._rows.shape[1] and (lengths == row_bytes).all() and not (targets % row_bytes).any():
                pending = self._rows_in(rows, there, begins, targets // row_bytes)
                self._in.settle()
                sums = pending.values()
            else:
                sums = [self._bytes_in(rows.view(-1), there, *copy) for copy in copies]
        watch.words[0] += copies.num_bytes
        return sums

    def close(self) -> None:
        """Unlock host memory, once copies that still run have ended. What begins after that goes through buffers."""
        with self._out.turn, self._in.turn:
            self.page_locks.close()

    # --------------------------------------------------------------------------------------------------------- inside

    def _rows_in(
        self,
        rows: torch.Tensor,
        source: torch.Tensor,
        begins: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
    ) -> PendingChecksums:
        """Queue copies of whole rows from these offsets of the `source` to the rows `ids`."""
        row_bytes = rows.shape[1]
        places = np.argsort(begins, kind="stable")
        for begin, end in self._in.pieces(len(ids)):
            some = places[begin:end]
            for first, last in _runs(begins[some], row_bytes):
                at, num_bytes = int(begins[some[first]]), (last - first) * row_bytes
                self._to_device(source[at : at + num_bytes], self._in.staging[first:last].view(-1))
            self._in.scatter(rows, ids[some])
        return self._begin_checksums(self._in.stream, rows, ids)

    def _bytes_in(self, flat: torch.Tensor, source: torch.Tensor, begin: int, into: int, num_bytes: int) -> int:
        """Copy some bytes, whatever they are, and return their checksum."""
        if num_bytes == 0:
            return checksum(b"")
        target = flat[into : into + num_bytes]
        self._to_device(source[begin : begin + num_bytes], target)
        row = self._in.stream.buffer(num_bytes).view(1, num_bytes)
        self._in.stream.run(partial(row[0].copy_, target))  # aligned, as words want it
        pending = self._begin_checksums(self._in.stream, row, [0])
        self._in.settle()
        return pending.values()[0]

    def _begin_checksums(
        self, stream: Stream, rows: torch.Tensor, block_ids: Sequence[int] | npt.NDArray[np.int64]
    ) -> PendingChecksums:
        ids = _uploaded(self.device, block_ids)
        words = self.device.host_buffer(8 * len(block_ids)).view(torch.int64)

        def compute() -> None:
            wanted = ids.to(rows.device, non_blocking=True)
            words.copy_(checksum_words(rows, wanted), non_blocking=True)

        stream.run(compute)
        return PendingChecksums(words, stream.record())

    def _to_host(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for begin, end, is_locked in self.page_locks.cut(target.data_ptr(), len(target), _COPY_BYTES):
            if is_locked:
                self._out.stream.run(partial(target[begin:end].copy_, source[begin:end], non_blocking=True))
            else:
                self._out.bounce_out(source[begin:end], target[begin:end])

    def _to_device(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.is_cuda:  # a peer's, which the device reads as it lies
            self._in.stream.run(partial(target.copy_, source, non_blocking=True))
            return
        for begin, end, is_locked in self.page_locks.cut(source.data_ptr(), len(source), _COPY_BYTES):
            if is_locked:
                self._in.stream.run(partial(target[begin:end].copy_, source[begin:end], non_blocking=True))
            else:
                self._in.bounce_in(source[begin:end], target[begin:end])


class _Direction:
    """One stream, with a buffer on the device and small locked ones on the host. Whoever uses it holds `turn`."""

    def __init__(self, device: Device, row_bytes: int) -> None:
        self._device = device
        self.turn = threading.Lock()
        self.stream = device.new_stream()
        self._num_rows = max(1, _STAGING_BYTES // row_bytes)
        self.staging = self.stream.buffer(self._num_rows * row_bytes).view(self._num_rows, row_bytes)
        #: buffers in the order of their use, each with what must be done before it can be used again
        self._bounces: deque[tuple[torch.Tensor, Callable[[], object]]] = deque()

    def pieces(self, num_rows: int) -> list[tuple[int, int]]:
        """Cut so many rows into what the buffer holds: begins and ends."""
        return [(begin, min(begin + self._num_rows, num_rows)) for begin in range(0, num_rows, self._num_rows)]

    def gather(self, rows: torch.Tensor, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Queue to bring these rows into the buffer; return the part of it that they lie in then."""
        wanted, staging = _uploaded(self._device, ids), self.staging[: len(ids)]

        self.stream.run(lambda: gather(rows, wanted.to(rows.device, non_blocking=True), staging))
        return staging

    def scatter(self, rows: torch.Tensor, ids: npt.NDArray[np.int64]) -> None:
        """Queue to bring what the buffer begins with into these rows."""
        wanted, staging = _uploaded(self._device, ids), self.staging[: len(ids)]

        self.stream.run(lambda: scatter(rows, wanted.to(rows.device, non_blocking=True), staging))

    def bounce_out(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Queue a copy out to memory whose pages are not locked, which ends with `settle`."""
        buffer = self._next_bounce()
        self.stream.run(partial(buffer[: len(source)].copy_, source, non_blocking=True))
        event = self.stream.record()

        def finish() -> None:
            event.wait()
            target.copy_(buffer[: len(target)])

        self._bounces.append((buffer, finish))

    def bounce_in(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Queue a copy in out of memory whose pages are not locked."""
        buffer = self._next_bounce()
        buffer[: len(source)].copy_(source)
        self.stream.run(partial(target.copy_, buffer[: len(source)], non_blocking=True))
        self._bounces.append((buffer, self.stream.record().wait))

    def settle(self) -> None:
        """Block until all that was queued is done."""
        for _ in range(len(self._bounces)):
            buffer, finish = self._bounces.popleft()
            finish()
            self._bounces.append((buffer, _nothing))
        self.stream.record().wait()

    def _next_bounce(self) -> torch.Tensor:
        if len(self._bounces) < _NUM_BOUNCES:
            return self._device.host_buffer(_COPY_BYTES)
        buffer, finish = self._bounces.popleft()
        finish()
        return buffer


def _nothing() -> None:
    """Wait for nothing."""


def _uploaded(device: Device, ids: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
    """Put ids into page-locked memory, `[n]` int64, from where a stream gets them while nobody waits."""
    locked = device.host_buffer(8 * len(ids)).view(torch.int64)
    locked.copy_(torch.from_numpy(np.asarray(ids, np.int64)))
    return locked


def _runs(offsets: npt.NDArray[np.int64], step: int) -> list[tuple[int, int]]:
    """Return begins and ends, as indexes, of those of the ascending `offsets` that follow each other by `step`."""
    borders = np.flatnonzero(np.diff(offsets) != step) + 1
    ends = [*borders.tolist(), len(offsets)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _host_tensor(view: memoryview) -> torch.Tensor:
    """Return the bytes of `view` as a tensor; nobody writes them through it, though torch does not know that."""
    pointer = (ctypes.c_uint8 * view.nbytes).from_address(address_of(view))
    return torch.frombuffer(pointer, dtype=torch.uint8)
