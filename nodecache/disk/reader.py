"""Reads blocks: what lies together in one go, several at a time, verified before any byte reaches the caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from typing import NamedTuple

import numpy as np

from nodecache.disk.files import Files, aligned, aligned_buffer
from nodecache.disk.index import DiskIndex, Place
from nodecache.disk.segment import Segment
from nodecache.disk.stats import DiskStats
from nodecache.disk.threads import Call, IoThreads
from nodecache.store import StoreError

#: As measured (docs/LOG.md): more or longer ones are not faster here.
NUM_THREADS = 4
READ_BYTES = 1 << 20  #: of one read at most, or one block


class Run(NamedTuple):
    """Blocks in consecutive rows of a segment."""

    segment: Segment
    first_row: int
    positions: list[int]  #: in what was asked, by row


def runs(places: Sequence[Place | None], max_blocks: int) -> Iterator[Run]:
    """Gather the places that are there into runs of at most `max_blocks`."""
    found = [(place.segment.segment_id, place.row, position) for position, place in enumerate(places) if place]
    run: Run | None = None
    for segment_id, row, position in sorted(found):
        place = places[position]
        assert place is not None
        is_next = run is not None and run.segment.segment_id == segment_id
        if (
            run is not None
            and is_next
            and row == run.first_row + len(run.positions)
            and len(run.positions) < max_blocks
        ):
            run.positions.append(position)
            continue
        if run is not None:
            yield run
        run = Run(place.segment, row, [position])
    if run is not None:
        yield run


def read_run(
    files: Files,
    segment: Segment,
    first_row: int,
    num_blocks: int,
    buffer: memoryview,
    checksum: Callable[[memoryview], int],
) -> list[bool]:
    """Read blocks into `buffer`, one each record_bytes, and tell which of them have their checksums.

    Raises:
        OSError: nothing of the segment can be read.
    """
    size, block_bytes = segment.geometry.record_bytes, segment.geometry.block_bytes
    target = buffer[: num_blocks * size]
    try:
        came = files.read(segment.fd, target, segment.geometry.offset_of(first_row))
    except OSError:
        if num_blocks == 1:
            files.read(segment.fd, target[: min(size, 4096)], 0)  # is it only here?
            return [False]
        parts = ((first_row + i, target[i * size : (i + 1) * size]) for i in range(num_blocks))
        return [read_run(files, segment, row, 1, part, checksum)[0] for row, part in parts]
    starts = range(0, num_blocks * size, size)
    return [
        start + block_bytes <= came
        and checksum(target[start : start + block_bytes]) == segment.checksums[first_row + number]
        for number, start in enumerate(starts)
    ]


class Reader:
    """Answers reads from an index's segments. Any thread may ask."""

    def __init__(
        self,
        index: DiskIndex,
        files: Files,
        block_bytes: int,
        checksum: Callable[[memoryview], int],
        stats: DiskStats,
        on_damaged: Callable[[bytes, Place], None],
    ) -> None:
        """`on_damaged` is called, by any thread, with each block that did not come whole."""
        self._index = index
        self._files = files
        self._block_bytes = block_bytes
        self._checksum = checksum
        self._stats = stats
        self._on_damaged = on_damaged
        self._threads = IoThreads("disk-read", NUM_THREADS)
        size = max(READ_BYTES, aligned(block_bytes))
        area = aligned_buffer(NUM_THREADS * size)  # as one, that it has huge pages
        self._buffers = deque(area[begin : begin + size] for begin in range(0, NUM_THREADS * size, size))

    def read(self, names: Sequence[bytes], targets: Sequence[memoryview], deadline_s: float) -> list[bool]:
        """As `BlockStore.read`."""
        self._threads.check()
        call = Call()
        came = [False] * len(names)
        places = self._index.pin(names)
        max_blocks = max(1, READ_BYTES // self._block_bytes)
        parts = list(runs(places, max_blocks))
        futures = []
        for number, run in enumerate(parts):
            try:
                futures.append(self._threads.submit(partial(self._answer, call, run, names, targets, came)))
            except StoreError:
                call.give_up()
                for unasked in parts[number:]:
                    self._index.unpin(unasked.segment, len(unasked.positions))
                raise
        if wait(futures, deadline_s).not_done and call.give_up():
            self._stats.count("timeouts")
            raise StoreError(f"{len(names)} blocks were not read from disk within {deadline_s:g} s")
        for future in futures:
            future.result()
        self._stats.count("read_blocks", sum(came))
        return came

    def stop(self, timeout_s: float) -> bool:
        """End the threads; False where some hang."""
        return self._threads.stop(timeout_s)

    def _answer(
        self, call: Call, run: Run, names: Sequence[bytes], targets: Sequence[memoryview], came: list[bool]
    ) -> None:
        segment, first_row, positions = run
        size = segment.geometry.record_bytes
        buffer = self._buffers.pop()  # there is one for each thread
        try:
            if call.is_given_up():
                return
            is_whole = read_run(self._files, segment, first_row, len(positions), buffer, self._checksum)
            for number, position in enumerate(positions):
                if not is_whole[number]:
                    self._on_damaged(names[position], Place(segment, first_row + number))
            if not call.begin():
                return
            try:
                # As arrays, so that the copies are made without the interpreter's lock.
                blocks = np.frombuffer(buffer, np.uint8)
                for number, position in enumerate(positions):
                    if is_whole[number]:
                        block = blocks[number * size : number * size + self._block_bytes]
                        np.frombuffer(targets[position], np.uint8)[:] = block
                        came[position] = True
            finally:
                call.end()
        except OSError as error:
            self._stats.count("errors")
            raise StoreError(f"disk segment {segment.path} cannot be read: {error.strerror}") from error
        finally:
            self._buffers.append(buffer)
            self._index.unpin(segment, len(positions))
