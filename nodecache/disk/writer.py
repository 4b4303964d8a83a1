"""Everything that changes the store's files, on one thread: appends, collects, wipes, syncs, notes the order of use.

    write -> append to the open segment -> full: roll -> room for one more? -> collect a segment, block by block
                                                                               copied, synced, moved, deleted

Files never take more than the limit: when a segment is opened, the room of the next one is collected while it fills.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import numpy as np

from messages.errors import ConfigError
from nodecache.disk import segment as segments
from nodecache.disk.collection import Candidate, choose_victim, likely_victims
from nodecache.disk.directory import ModelDirectory
from nodecache.disk.files import Files, aligned_buffer
from nodecache.disk.index import DiskIndex, Place
from nodecache.disk.layout import Geometry, pack_records
from nodecache.disk.quotas import within_quotas
from nodecache.disk.reader import read_run, runs
from nodecache.disk.segment import OpenSegment, Segment
from nodecache.disk.stats import DiskStats
from nodecache.disk.threads import Call
from nodecache.store import Collected, StoredBlock, StoreError

logger = logging.getLogger(__name__)

WRITE_BYTES = 4 << 20  #: of one write at most, or one block; as measured (docs/LOG.md)
COPY_BYTES = 1 << 20  #: of one read or write of a collection at most, or one block: writes wait for no more
SYNC_S = 1.0  #: what was written is synced after so long at the latest, while the disk answers
LOOK_S = 1.0  #: between looks whether files were deleted under us, and between tries after an error
CHECKPOINT_S = 60.0
FULL_S = 10.0  #: for how long what a full disk held is taken for all the room there is
CLOSE_WAIT_S = 1.0  #: for reads of a deleted segment, before its room is used again
_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT}


class Writer:
    """The store's one writer. Only `forget`, `note_damaged` and `take_dropped` may be called by other threads."""

    def __init__(
        self,
        directory: ModelDirectory,
        index: DiskIndex,
        files: Files,
        geometry: Geometry,
        capacity_bytes: int,
        checksum: Callable[[memoryview], int],
        keep_value: Callable[[bytes], float] | None,
        stats: DiskStats,
    ) -> None:
        """`geometry`: of new segments. `keep_value`: what a name's block is worth, in any unit; None: its last use."""
        self._directory = directory
        self._index = index
        self._files = files
        self._geometry = geometry
        self._capacity_bytes = capacity_bytes
        self._checksum = checksum
        self._keep_value = keep_value
        self._stats = stats
        self._buffer = aligned_buffer(max(WRITE_BYTES, geometry.record_bytes))
        self._copy_buffer = aligned_buffer(max(COPY_BYTES, geometry.record_bytes))
        self._open: OpenSegment | None = None
        self._next_segment_id = 0
        self._next_sequence = 0
        self._collection: Generator[None] | None = None
        self._num_given_up = 0  # segments of which a sync failed
        self._num_to_copy = 0  # blocks that the collection has yet to copy; as many rows are kept for them
        self._wipes: deque[Place] = deque()
        self._dropped: deque[bytes] = deque()
        self._limit_bytes = capacity_bytes
        self._limit_until_s = 0.0
        self._dirty_since_s: float | None = None
        self._is_directory_dirty = False
        self._look_s = 0.0
        self._checkpoint_s = time.monotonic() + CHECKPOINT_S
        self._noted_use = -1
        self._last_error = ""

    def resume(
        self, last: segments.Scanned | None, next_segment_id: int, next_sequence: int, unwanted: Sequence[Place]
    ) -> None:
        """Go on where the process before left off: in its last segment, if that has room. Before anything else.

        `unwanted`: records that the index does not point to.
        """
        self._wipes.extend(unwanted)
        self._next_segment_id = next_segment_id
        self._next_sequence = next_sequence
        with contextlib.suppress(OSError):  # read-only, for now
            self._directory.delete_unfinished()
            self._files.sync_directory(self._directory.path)
            if last is not None:
                self._files.sync(last.segment.fd)  # the process before may not have come to it
            if last is not None and last.is_full_length and last.segment.geometry == self._geometry:
                self._open = OpenSegment(self._files, last.segment, self._directory.model, last.num_used_rows)

    # ------------------------------------------------------------------------------------------------- by other threads

    def forget(self, name: bytes, of: Place | None = None) -> bool:
        """Drop a block, now from the index and soon from disk; tell whether it was there, with `of` just there."""
        place = self._index.drop(name, of)
        if place is not None:
            self._wipes.append(place)
        return place is not None

    def note_damaged(self, name: bytes, place: Place) -> None:
        """Drop a block that did not come whole."""
        if self.forget(name, place):
            self._stats.count("damaged_blocks")
            logger.warning("disk segment %s: block %s is damaged, dropped", place.segment.path, name.hex())

    def take_dropped(self) -> list[bytes]:
        """Return the names of blocks that were dropped since the last call; any that came back is not among them."""
        names = [self._dropped.popleft() for _ in range(len(self._dropped))]
        return [name for name in dict.fromkeys(names) if self._index.find(name) is None]

    # ------------------------------------------------------------------------------------------------------------- jobs

    def write(self, call: Call, blocks: Sequence[StoredBlock], sources: Sequence[memoryview]) -> None:
        """Append the blocks that are not held.

        Raises:
            StoreError: it could not, or was given up; none of them is held because of this call.
        """
        lacking = {block.name: number for number, block in enumerate(blocks) if block.name not in self._index}
        taken, leaving = within_quotas(self._index, blocks, lacking.values())
        self.drop(leaving)
        todo = deque(taken)
        written: list[bytes] = []
        try:
            while todo:
                opened = self._open_segment()
                num_blocks = min(opened.num_free_rows - self._num_to_copy, len(todo))
                numbers = [todo.popleft() for _ in range(num_blocks)]
                part = [blocks[number] for number in numbers]
                place = self._append(opened, self._pieces(call, [sources[number] for number in numbers]), part)
                for other in self._index.insert(place.segment, place.row, part):
                    self._wipes.append(other)
                    self._dropped.append(other.segment.name(other.row))
                written += [block.name for block in part]
                self._advance(len(part))
            _require_time(call.answer())
            self._index.touch([block.name for block in blocks])
            self._stats.count("written_blocks", len(written))
        except (OSError, StoreError, ConfigError) as error:
            for name in written:
                self.forget(name)
            if isinstance(error, OSError):
                self._note(error)
                raise StoreError(f"blocks cannot be written to {self._directory.path}: {error.strerror}") from error
            raise StoreError(str(error)) from error
        with contextlib.suppress(OSError):  # noted there, and done again
            self._sync_if_due()

    def sync(self) -> None:
        """Bring to disk all that was written and removed before.

        Raises:
            StoreError: it could not; what may have got lost is dropped.
        """
        try:
            self._end_collection()  # it may have copies of what was removed meanwhile
            self._wipe()
            self._sync()
        except OSError as error:
            self._note(error)
            raise StoreError(f"{self._directory.path} cannot be synced: {error.strerror}") from error

    def collect(self) -> Collected:
        """Give up the segment that holds least, if that is half of it at most, and copy what it holds.

        Raises:
            StoreError: it could not; no block is lost by that.
        """
        try:
            self.sync()
            num_bytes, segment = self._index.num_bytes, self._sparse_segment()
            if segment is None or not self._has_rows(segment.num_live):
                return Collected(0, 0, has_more=False)
            rows, _, _ = self._index.live_blocks(segment)
            self._num_to_copy = len(rows)
            self._collection = self._collect(segment, rows)
            self._end_collection()
            num_freed_bytes = max(0, num_bytes - self._index.num_bytes)  # none where a segment was begun for the copies
            num_files = num_freed_bytes // segment.geometry.num_bytes
            return Collected(num_files, num_freed_bytes, has_more=self._sparse_segment() is not None)
        except OSError as error:
            self._note(error)
            raise StoreError(f"{self._directory.path} cannot be collected: {error.strerror}") from error

    def work(self) -> bool:
        """Do some of what is not urgent; tell whether there is more that could be done at once."""
        now_s = time.monotonic()
        try:
            if self._collection is not None:
                self._advance(1)
                return True
            self._sync_if_due()
            if now_s < self._look_s:
                return False
            self._look_s = now_s + LOOK_S
            self._forget_deleted()
            self._index.close_retired(0.0)
            self._wipe()
            if now_s >= self._checkpoint_s:
                self._checkpoint_s = now_s + CHECKPOINT_S
                self._write_checkpoint()
            has_room = self._open is not None and self._open.num_free_rows > 0
            if self._index.num_bytes > self._limit() or (has_room and self._lacks_reserve()):
                return self._start_collection()
        except OSError as error:
            self._note(error)
        return False

    def close(self) -> None:
        """Sync, note the order of use, close what is open to be written."""
        try:
            if self._collection is not None:
                self._collection.close()
            self._wipe()
            self._sync()
            self._write_checkpoint()
        except OSError as error:
            self._note(error)
        if self._open is not None:
            self._open.close()
            self._open = None
        self._directory.unlock()

    def drop(self, names: Sequence[bytes]) -> None:
        """Drop blocks that are above their tenants' quotas."""
        gone = [name for name in names if self.forget(name)]
        self._dropped.extend(gone)
        self._stats.count("evicted_blocks", len(gone))
        self._stats.count("quota_evicted_blocks", len(gone))

    # ------------------------------------------------------------------------------------------------------- appending

    def _pieces(self, call: Call, sources: Sequence[memoryview]) -> Iterator[memoryview]:
        """Copy blocks to where they can be written from, some at a time; a piece lasts until the next is asked for."""
        size, block_bytes = self._geometry.record_bytes, self._geometry.block_bytes
        max_blocks = max(1, WRITE_BYTES // size)
        for begin in range(0, len(sources), max_blocks):
            part = sources[begin : begin + max_blocks]
            _require_time(call.begin())
            try:
                for number, source in enumerate(part):
                    # As arrays, so that the copy is made without the interpreter's lock.
                    target = np.frombuffer(self._buffer, np.uint8, block_bytes, number * size)
                    target[:] = np.frombuffer(source, np.uint8)
            finally:
                call.end()
            yield self._buffer[: len(part) * size]

    def _append(self, opened: OpenSegment, pieces: Iterable[memoryview], blocks: Sequence[StoredBlock]) -> Place:
        """Write blocks whose bytes `pieces` are. Raises OSError: then a new segment follows."""
        model, segment_id = self._directory.model, opened.segment.segment_id
        headers = pack_records(model, segment_id, opened.num_used_rows, self._next_sequence, blocks)
        try:
            row = opened.append(pieces, headers)
        except OSError as error:
            opened.has_failed = True
            if error.errno in _FULL_ERRORS:
                self._limit_to(self._index.num_bytes - self._geometry.num_bytes)  # not all of the open one fits
            raise
        self._next_sequence += len(blocks)
        self._mark_dirty()
        return Place(opened.segment, row)

    def _open_segment(self) -> OpenSegment:
        """Return the segment to append to, with a free row at least. Raises OSError, StoreError, ConfigError."""
        opened = self._open
        if opened is not None and not self._files.is_linked(opened.fd):
            self._forget_deleted()
            opened = None
        if opened is not None and not opened.has_failed:
            if opened.num_free_rows and self._lacks_reserve():  # the process before was killed while it collected
                self._start_collection()
            while self._collection is not None and opened.num_free_rows <= self._num_to_copy:
                self._advance(1)
            if opened.num_free_rows:
                return opened
        self._directory.ensure()
        self._seal()
        try:
            return self._roll()
        except OSError as error:
            if error.errno not in _FULL_ERRORS or not self._index.segments():
                raise
            logger.warning("disk directory %s: the disk is full, blocks give way", self._directory.path)
            self._limit_to(self._index.num_bytes)
            return self._roll()

    def _roll(self) -> OpenSegment:
        while self._index.num_bytes + self._geometry.num_bytes > self._limit():
            if self._collection is None and not self._start_collection():
                raise StoreError(f"{self._directory.path} has no room for {self._geometry.num_bytes:,} bytes")
            while self._collection is not None:
                self._advance(1)
        self._index.close_retired(CLOSE_WAIT_S)
        directory = self._directory
        opened = segments.create(self._files, directory.path, self._next_segment_id, self._geometry, directory.model)
        self._open = opened
        self._next_segment_id += 1
        self._index.add_segment(opened.segment)
        if self._lacks_reserve():
            self._start_collection()
        return opened

    def _seal(self) -> None:
        if self._open is not None:
            self._sync()
            self._open.close()
            self._open = None

    def _lacks_reserve(self) -> bool:
        """Tell whether to collect: room is kept for the next segment, and for what a crash left half collected."""
        return self._collection is None and self._index.num_bytes + 2 * self._geometry.num_bytes > self._limit()

    def _limit(self) -> int:
        return self._limit_bytes if time.monotonic() < self._limit_until_s else self._capacity_bytes

    def _limit_to(self, num_bytes: int) -> None:
        self._limit_bytes = min(num_bytes, self._capacity_bytes)
        self._limit_until_s = time.monotonic() + FULL_S

    # ------------------------------------------------------------------------------------------------------- collecting

    def _start_collection(self) -> bool:
        """Begin to give up a segment; False where there is none."""
        sealed = [each for each in self._index.segments() if self._open is None or each is not self._open.segment]
        live_rows: dict[int, tuple[Segment, list[int]]] = {}
        candidates = []
        for each in likely_victims(sealed):
            rows, names, last_use = self._index.live_blocks(each)
            live_rows[each.segment_id] = each, rows
            values = [self._keep_value(name) for name in names] if self._keep_value else last_use.tolist()
            candidates.append(Candidate(each.segment_id, each.geometry.num_rows, np.array(values, np.float64)))
        fitting_blocks = (self._limit() // self._geometry.num_bytes - 3) * self._geometry.num_rows
        num_free_rows = self._open.num_free_rows if self._open is not None else 0
        victim = choose_victim(candidates, len(self._index) - fitting_blocks, num_free_rows)
        if victim is None:
            return False
        chosen, rows = live_rows[victim.segment_id]
        kept = [row for row, is_kept in zip(rows, victim.is_kept, strict=True) if is_kept]
        self._num_to_copy = len(kept)
        self._collection = self._collect(chosen, kept)
        return True

    def _sparse_segment(self) -> Segment | None:
        """Return the segment that holds least, if that is no more than half of it."""
        sealed = [each for each in self._index.segments() if self._open is None or each is not self._open.segment]
        least = min(sealed, key=lambda each: each.num_live, default=None)
        return least if least is not None and least.num_live <= least.geometry.num_rows // 2 else None

    def _has_rows(self, num_rows: int) -> bool:
        """See to it that so many blocks can be appended without any that give way; False where they cannot."""
        num_free_rows = 0 if self._open is None else self._open.num_free_rows
        # A new segment, and what is kept free behind it: otherwise it would begin with a collection of its own.
        if num_rows > num_free_rows and self._index.num_bytes + 3 * self._geometry.num_bytes <= self._limit():
            self._seal()
            num_free_rows = self._roll().num_free_rows
        return num_rows <= num_free_rows

    def _collect(self, victim: Segment, rows: list[int]) -> Generator[None]:
        """Copy these of its blocks, a run at a time, and delete it. Raises OSError: it stays, and the copies go."""
        self._index.pin_segment(victim)
        copies: list[tuple[Place, Place]] = []
        moved: list[Place] = []
        num_given_up = self._num_given_up
        try:
            max_blocks = max(1, COPY_BYTES // self._geometry.record_bytes)
            for run in runs([Place(victim, row) for row in rows], max_blocks):
                copies += self._copy(victim, run.first_row, len(run.positions))
                self._num_to_copy -= len(run.positions)
                yield
            self._sync()  # before the originals are deleted
            if victim.is_retired or num_given_up != self._num_given_up:
                return  # the originals are gone, or the copies are not to be trusted
            num_copied = len(copies)
            while copies:
                source, target = copies.pop()
                if not target.segment.is_retired and self._index.move(source, target):
                    moved.append(source)
                else:
                    self._wipes.append(target)
            self._files.unlink(victim.path)
            moved.clear()
            dropped = self._index.retire(victim)
            self._is_directory_dirty = True
            self._mark_dirty()
            self._dropped.extend(dropped)
            self._stats.count("evicted_blocks", len(dropped))
            self._stats.count("copied_blocks", num_copied)
        finally:
            self._num_to_copy = 0
            self._wipes.extend([*moved, *(target for _, target in copies)])
            self._index.unpin(victim, 1)

    def _copy(self, victim: Segment, first_row: int, num_blocks: int) -> list[tuple[Place, Place]]:
        """Append a run of a victim's blocks, those that are whole and for which there is a row."""
        opened = self._open
        if opened is None or victim.is_retired:
            return []
        num_blocks = min(num_blocks, opened.num_free_rows)
        buffer, size = self._copy_buffer, self._geometry.record_bytes
        try:
            is_whole = read_run(self._files, victim, first_row, num_blocks, buffer, self._checksum)
        except OSError as error:  # a segment that cannot be read must not stand in the way for ever
            self._note(error)
            return []
        sources: list[Place] = []
        for number in range(num_blocks):
            place = Place(victim, first_row + number)
            if not is_whole[number]:
                name = victim.name(place.row)
                self.note_damaged(name, place)
                self._dropped.append(name)
                continue
            if number != len(sources):
                begin = len(sources) * size
                buffer[begin : begin + size] = buffer[number * size : (number + 1) * size]
            sources.append(place)
        if not sources:
            return []
        target = self._append(opened, [buffer[: len(sources) * size]], [victim.block(each.row) for each in sources])
        return [(source, Place(target.segment, target.row + number)) for number, source in enumerate(sources)]

    def _advance(self, num_blocks: int) -> None:
        """Go on with a collection, for about as many blocks as were written."""
        num_runs = -(-num_blocks * self._geometry.record_bytes // COPY_BYTES)
        try:
            for _ in range(num_runs):
                if self._collection is None:
                    return
                if next(self._collection, _ENDED) is _ENDED:
                    self._collection = None
                    self._index.close_retired(0.0)
        except OSError:
            self._collection = None
            raise

    def _end_collection(self) -> None:
        while self._collection is not None:
            self._advance(1)

    # ---------------------------------------------------------------------------------------------------------- syncing

    def _mark_dirty(self) -> None:
        if self._dirty_since_s is None:
            self._dirty_since_s = time.monotonic()

    def _sync_if_due(self) -> None:
        if self._dirty_since_s is not None and time.monotonic() >= self._dirty_since_s + SYNC_S:
            self._sync()

    def _sync(self) -> None:
        """Sync the open segment and the directory. Raises OSError: what the disk may have lost is dropped."""
        if self._open is not None and self._dirty_since_s is not None:
            try:
                self._files.sync(self._open.fd)
            except OSError:
                self._give_up_open()
                raise
            self._open.num_synced_rows = self._open.num_used_rows
        if self._is_directory_dirty:
            self._files.sync_directory(self._directory.path)
            self._is_directory_dirty = False
        self._dirty_since_s = None
        self._last_error = ""

    def _give_up_open(self) -> None:
        """After an error: a later sync that succeeds says nothing of what this one did not bring to disk."""
        opened, self._open = self._open, None
        if opened is None:
            return
        self._num_given_up += 1
        for row in range(opened.num_synced_rows, opened.num_used_rows):
            name = opened.segment.name(row)
            if self.forget(name, Place(opened.segment, row)):
                self._dropped.append(name)
                self._stats.count("lost_blocks")
        opened.close()

    def _wipe(self) -> None:
        """Write zeros over the headers of dropped blocks. Raises OSError: what is not wiped will be, later."""
        by_segment: dict[int, list[Place]] = {}
        for _ in range(len(self._wipes)):
            place = self._wipes.popleft()
            by_segment.setdefault(place.segment.segment_id, []).append(place)
        while by_segment:
            _, places = by_segment.popitem()
            segment, rows = places[0].segment, [place.row for place in places]
            try:
                if self._open is not None and segment is self._open.segment:
                    self._open.wipe(rows)
                    self._mark_dirty()
                elif not segment.is_retired:
                    segments.wipe(self._files, segment, rows)
            except FileNotFoundError:
                continue  # deleted under us: wiped enough
            except OSError:
                self._wipes.extend(places)
                self._wipes.extend(place for others in by_segment.values() for place in others)
                raise

    # -------------------------------------------------------------------------------------------------------- the rest

    def _forget_deleted(self) -> None:
        """Forget segments whose files somebody deleted: they would not survive this process."""
        for segment in self._index.segments():
            if self._files.is_linked(segment.fd):
                continue
            if self._open is not None and segment is self._open.segment:
                self._open.close()
                self._open = None
            names = self._index.retire(segment)
            self._dropped.extend(names)
            self._stats.count("lost_blocks", len(names))
            logger.warning("disk segment %s was deleted: %d blocks are lost", segment.path, len(names))

    def _write_checkpoint(self) -> None:
        places, use = self._index.places_by_use()
        if use != self._noted_use:
            self._directory.write_checkpoint(places)
            self._noted_use = use

    def _note(self, error: OSError) -> None:
        self._stats.count("errors")
        if str(error) != self._last_error:  # once, not with every try
            self._last_error = str(error)
            logger.warning("disk directory %s: %s", self._directory.path, error)


_ENDED = object()


def _require_time(has_time: bool) -> None:
    if not has_time:
        raise StoreError("the deadline of the write is over")
