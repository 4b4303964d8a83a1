"""One segment: a file of blocks, and what is kept of them in memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nodecache.disk.files import ALIGN_BYTES, Files, aligned, aligned_buffer
from nodecache.disk.layout import (
    NAME_BYTES,
    RECORD_BYTES,
    Flags,
    Geometry,
    Model,
    Records,
    pack_segment_header,
    unpack_records,
    unpack_segment_header,
)
from nodecache.store import StoredBlock

SUFFIX = ".segment"
UNFINISHED_SUFFIX = ".new"


class Segment:
    """A segment's file, open for reading, and its table in memory, 41 bytes a row, guarded by the index's lock."""

    def __init__(self, path: Path, segment_id: int, geometry: Geometry, fd: int) -> None:
        num_rows = geometry.num_rows
        self.path = path
        self.segment_id = segment_id
        self.geometry = geometry
        self.fd = fd
        self.num_live = 0
        self.num_pins = 0  #: reads in progress; while there are any the file stays open
        self.is_retired = False  #: its blocks are forgotten and its file deleted
        self.names = bytearray(num_rows * NAME_BYTES)
        self.checksums = array("Q", bytes(8 * num_rows))
        self.num_tokens = array("I", bytes(4 * num_rows))
        #: [num_rows] uint64, whose each row's block is
        self.tenants = np.zeros(num_rows, np.uint64)
        #: [num_rows] uint32, when a row was used last, by the index's count of uses
        self.last_use = np.zeros(num_rows, np.uint32)
        #: [num_rows] bool, whether the index points here
        self.is_live: Flags = np.zeros(num_rows, np.bool_)

    def name(self, row: int) -> bytes:
        """Return the name of the block in a row."""
        return bytes(self.names[row * NAME_BYTES : (row + 1) * NAME_BYTES])

    def block(self, row: int) -> StoredBlock:
        """Return what is known of the block in a row."""
        return StoredBlock(self.name(row), self.num_tokens[row], self.checksums[row], int(self.tenants[row]))

    def put(self, row: int, block: StoredBlock) -> None:
        """Note the block that a row holds."""
        self.names[row * NAME_BYTES : (row + 1) * NAME_BYTES] = block.name
        self.num_tokens[row] = block.num_tokens
        self.checksums[row] = block.checksum
        self.tenants[row] = block.tenant

    def live_rows(self) -> list[int]:
        """Return the rows that the index points to."""
        found: list[int] = np.flatnonzero(self.is_live).tolist()
        return found


class Scanned(NamedTuple):
    """A segment that was found in the directory, and its table."""

    segment: Segment
    records: Records  #: [num_rows]
    is_whole: Flags  #: [num_rows], the records that can be served
    num_damaged: int
    num_used_rows: int  #: up to and with the last one that is not free
    is_full_length: bool  #: the file has the room of all its rows


def scan(files: Files, path: Path, model: Model) -> Scanned | str:
    """Open a segment and read its table: one read for the header, one for the table.

    Returns:
        The segment; or, in words, why it cannot be used.

    Raises:
        OSError: it cannot be read.
    """
    if not path.stem.isdecimal():
        return "its name is no segment's"
    segment_id = int(path.stem)
    fd = files.open(path, os.O_RDONLY)
    try:
        page = aligned_buffer(ALIGN_BYTES)
        files.read(fd, page, 0)
        geometry = unpack_segment_header(bytes(page), model, segment_id)
        if isinstance(geometry, str):
            files.close(fd)
            return geometry
        num_bytes = files.num_bytes(fd)
        table = aligned_buffer(geometry.data_offset - ALIGN_BYTES)
        came = files.read(fd, table, ALIGN_BYTES)
    except OSError:
        files.close(fd)
        raise
    records, is_whole, is_damaged = unpack_records(bytes(table[:came]), model, segment_id, geometry.num_rows)
    lies_within = geometry.data_offset + np.arange(1, geometry.num_rows + 1) * geometry.record_bytes <= num_bytes
    is_used = is_whole | is_damaged
    segment = Segment(path, segment_id, geometry, fd)
    segment.names[:] = records["name"].tobytes()
    segment.checksums = array("Q", records["checksum"].tobytes())
    segment.num_tokens = array("I", records["num_tokens"].tobytes())
    segment.tenants[:] = records["tenant"]
    return Scanned(
        segment,
        records,
        is_whole & lies_within,
        int((is_used & ~(is_whole & lies_within)).sum()),
        int(np.flatnonzero(is_used)[-1]) + 1 if is_used.any() else 0,
        num_bytes == geometry.num_bytes,
    )


class OpenSegment:
    """The one segment that is written to, from its first free row on. One thread."""

    def __init__(self, files: Files, segment: Segment, model: Model, num_used_rows: int = 0) -> None:
        """Raises OSError where the file cannot be opened to be written, or its table not be read."""
        self.segment = segment
        self.num_used_rows = num_used_rows
        self.num_synced_rows = num_used_rows
        self.has_failed = False  #: a write to it did: it gets no more
        self._files = files
        self._model = model
        self._table = aligned_buffer(segment.geometry.data_offset - ALIGN_BYTES)
        self.fd = files.open(segment.path, os.O_RDWR)
        try:
            files.read(self.fd, self._table, ALIGN_BYTES)
        except OSError:
            files.close(self.fd)
            raise

    @property
    def num_free_rows(self) -> int:
        """Blocks that still go in."""
        return self.segment.geometry.num_rows - self.num_used_rows

    def append(self, pieces: Iterable[memoryview], headers: bytes) -> int:
        """Write padded blocks, in pieces, and then all their headers; return the first one's row.

        Raises:
            OSError: nothing was appended; the next one writes to the same place. As whatever `pieces` raises.
        """
        first = self.num_used_rows
        offset = self.segment.geometry.offset_of(first)
        for piece in pieces:
            self._files.write(self.fd, piece, offset)
            offset += len(piece)
        self._write_table(first, headers)
        self.num_used_rows += len(headers) // RECORD_BYTES
        return first

    def wipe(self, rows: list[int]) -> None:
        """Write zeros over the headers of these rows, one at least. Raises OSError: some may not be wiped."""
        for row in rows:
            self._table[row * RECORD_BYTES : (row + 1) * RECORD_BYTES] = bytes(RECORD_BYTES)
        self._write_pages(min(rows), max(rows) + 1)

    def close(self) -> None:
        """Close the descriptor for writing; the segment's own stays."""
        self._files.close(self.fd)

    def _write_table(self, first_row: int, headers: bytes) -> None:
        begin, end = first_row * RECORD_BYTES, first_row * RECORD_BYTES + len(headers)
        before = bytes(self._table[begin:end])
        self._table[begin:end] = headers
        try:
            self._write_pages(first_row, end // RECORD_BYTES)
        except OSError:
            self._table[begin:end] = before
            raise

    def _write_pages(self, first_row: int, end_row: int) -> None:
        begin = first_row * RECORD_BYTES // ALIGN_BYTES * ALIGN_BYTES
        end = aligned(end_row * RECORD_BYTES)
        self._files.write(self.fd, self._table[begin:end], ALIGN_BYTES + begin)


def create(files: Files, directory: Path, segment_id: int, geometry: Geometry, model: Model) -> OpenSegment:
    """Make a segment's file, with room for all its blocks. It has its name only once it is whole.

    Raises:
        OSError: it could not; nothing is left of it.
    """
    path = directory / f"{segment_id:08d}{SUFFIX}"
    unfinished = path.with_suffix(UNFINISHED_SUFFIX)
    fd = files.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        files.allocate(fd, geometry.num_bytes)
        front = aligned_buffer(geometry.data_offset)  # with the table: writing to it later is no allocation any more
        front[:ALIGN_BYTES] = pack_segment_header(model, segment_id, geometry.num_rows)
        files.write(fd, front[: geometry.data_offset], 0)
        files.sync(fd)
        files.rename(unfinished, path)
        files.sync_directory(directory)
        return OpenSegment(files, Segment(path, segment_id, geometry, fd), model)
    except OSError:
        files.close(fd)
        files.unlink(unfinished)
        files.unlink(path)
        raise


def wipe(files: Files, segment: Segment, rows: list[int]) -> None:
    """Write zeros over the headers of some rows of a segment that is not written to otherwise, and sync them.

    Raises:
        OSError: some may not be wiped.
    """
    fd = files.open(segment.path, os.O_RDWR)
    try:
        pages: dict[int, list[int]] = {}
        for row in rows:
            pages.setdefault(row * RECORD_BYTES // ALIGN_BYTES * ALIGN_BYTES, []).append(row)
        buffer = aligned_buffer(ALIGN_BYTES)
        for page, within in pages.items():
            files.read(fd, buffer, ALIGN_BYTES + page)
            for row in within:
                begin = row * RECORD_BYTES - page
                buffer[begin : begin + RECORD_BYTES] = bytes(RECORD_BYTES)
            files.write(fd, buffer, ALIGN_BYTES + page)
        files.sync(fd)
    finally:
        files.close(fd)
