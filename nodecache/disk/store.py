"""The disk tier: whole blocks in segment files of a local directory, found by name, verified at every read.

    DIR/<fingerprint>-<layout version>-<block bytes>/
        lock            which process has it
        00000000.segment, 00000001.segment, ...
        checkpoint      in what order blocks were used

The index is rebuilt from the tables of the segments; a checkpoint that is old, damaged or gone costs the order of use
since. What `write` returned survives the end of the process, however it ends. It survives the loss of power once it is
synced: a second or so later, or when `sync` returns. A block that was removed may come back after a loss of power
before that; what was dropped to make room may come back after any restart, and is as good as it was.

Faults: a disk that is full, or was made read-only, fails writes and is tried anew at each; a full one first takes room
from blocks that are worth less. A directory that was deleted is made anew. A damaged block is dropped and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from messages.errors import ConfigError
from nodecache.disk import segment as segments
from nodecache.disk.directory import ModelDirectory, Unusable, checkpoint_bytes, in_order_of_use
from nodecache.disk.files import Files, aligned
from nodecache.disk.index import DiskIndex
from nodecache.disk.layout import Geometry, Model
from nodecache.disk.quotas import above_quotas
from nodecache.disk.reader import Reader
from nodecache.disk.stats import DiskStats
from nodecache.disk.threads import Call, IoThreads
from nodecache.disk.writer import Writer
from nodecache.quotas import Accounts
from nodecache.store import Collected, StoredBlock, StoreError, StorePage

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_SEGMENT_BYTES = 64 << 20
_MIN_SEGMENTS = 4
#: A store has between 16 and 256 segments, whose files are all open.
_SEGMENTS_OF_A_SMALL_STORE = 16
_SEGMENTS_OF_A_LARGE_STORE = 256
_IDLE_S = 0.25
_CLOSE_S = 10.0


class DiskStore:
    """A `nodecache.store.BlockStore` in a directory on disk. Any thread."""

    def __init__(
        self,
        root: Path,
        model: Model,
        capacity_bytes: int,
        checksum: Callable[[memoryview], int],
        *,
        keep_value: Callable[[bytes], float] | None = None,
        accounts: Accounts | None = None,
        files: Files | None = None,
    ) -> None:
        """Open `model`'s folder below `root`, or make it.

        Args:
            root: the directory; other folders in it are left alone.
            model: whose blocks.
            capacity_bytes: what the files may take, garbage included.
            checksum: of a block's plain bytes, 64 bits.
            keep_value: what the block of a name is worth, in any unit; called by the store's writer. What does not fit
                pushes out segments that are worth least. None: the time of the last use.
            accounts: of the tenants that are counted.
            files: the calls that reach the disk.

        Raises:
            ConfigError: another process has it; it is no directory; or the capacity is too small.
        """
        # The order of use takes room too, twice while it is written.
        reserved_bytes = 2 * checkpoint_bytes(capacity_bytes // aligned(model.block_bytes))
        room_bytes = capacity_bytes - reserved_bytes
        segment_bytes = min(_MAX_SEGMENT_BYTES, room_bytes // _SEGMENTS_OF_A_SMALL_STORE)
        segment_bytes = max(segment_bytes, room_bytes // _SEGMENTS_OF_A_LARGE_STORE)
        geometry = Geometry.within(model.block_bytes, segment_bytes)
        if geometry.num_bytes * _MIN_SEGMENTS > room_bytes:
            raise ConfigError(
                f"disk capacity of {capacity_bytes:,} bytes; for blocks of {model.block_bytes:,} bytes at least "
                f"{geometry.num_bytes * _MIN_SEGMENTS + reserved_bytes:,} are wanted"
            )
        self._block_bytes = model.block_bytes
        self._capacity_bytes = capacity_bytes
        self._is_closed = False
        files = files or Files()
        self._stats = DiskStats()
        self._index = DiskIndex(files, Accounts() if accounts is None else accounts)
        directory = ModelDirectory(root, model, files)
        self._writer = Writer(directory, self._index, files, geometry, room_bytes, checksum, keep_value, self._stats)
        #: what lies in the directory and is not used, and why; left alone
        self.unusable: list[Unusable] = self._restore(directory, files)
        for stranger in self.unusable:
            logger.warning("disk directory: %s is not used: %s", stranger.path, stranger.reason)
        self._reader = Reader(self._index, files, model.block_bytes, checksum, self._stats, self._writer.note_damaged)
        self._writing = IoThreads("disk-write", 1, idle_s=_IDLE_S, on_idle=self._writer.work)

    def find(self, name: bytes) -> StoredBlock | None:
        """As `BlockStore.find`."""
        return self._index.find(name)

    @property
    def accounts(self) -> Accounts:
        """As `BlockStore.accounts`."""
        return self._index.accounts

    def names(self) -> list[bytes]:
        """As `BlockStore.names`."""
        return self._index.names()

    def page(self, cursor: int, max_blocks: int) -> StorePage:
        """As `BlockStore.page`. A place is the segment's number times 2^24, and the row."""
        return self._index.page(cursor, max_blocks)

    def read(self, names: Sequence[bytes], targets: Sequence[memoryview], deadline_s: float) -> list[bool]:
        """As `BlockStore.read`. A target holds nothing of a block that did not come whole.

        Once it has returned or raised, nothing writes to the targets any more.
        """
        return self._reader.read(names, targets, deadline_s)

    def write(self, blocks: Sequence[StoredBlock], sources: Sequence[memoryview], deadline_s: float) -> list[bytes]:
        """As `BlockStore.write`. Blocks that are held already are not written again.

        The names returned are also of blocks that were dropped otherwise since the last call.
        """
        wrong = {len(source) for source in sources} - {self._block_bytes}
        if wrong:
            raise StoreError(f"blocks of {sorted(wrong)} bytes; {self._block_bytes} are wanted")
        call = Call()
        self._wait(call, self._writing.submit(partial(self._writer.write, call, blocks, sources)), deadline_s)
        return self._writer.take_dropped()

    def remove(self, names: Sequence[bytes]) -> None:
        """As `BlockStore.remove`. Survives what a write survives after as long; `sync` waits for it too."""
        for name in names:
            self._writer.forget(name)

    def collect(self, deadline_s: float) -> Collected:
        """As `BlockStore.collect`: a segment of which no more than half is held."""
        return self._wait(Call(), self._writing.submit(self._writer.collect), deadline_s)

    def sync(self, deadline_s: float) -> None:
        """As `BlockStore.sync`: it is on disk."""
        call = Call()
        self._wait(call, self._writing.submit(self._writer.sync), deadline_s)

    def stats(self) -> dict[str, float]:
        """As `BlockStore.stats`."""
        counted = self._stats.values()
        num_for_quota = counted.pop("kvray_disk_quota_evicted_blocks_total")
        return {
            **counted,
            'kvray_evictions_total{tier="disk",reason="quota"}': num_for_quota,
            'kvray_evictions_total{tier="disk",reason="room"}': (
                counted["kvray_disk_evicted_blocks_total"] - num_for_quota
            ),
            "kvray_disk_blocks": float(len(self._index)),
            "kvray_disk_bytes": float(self._index.num_bytes),
            "kvray_disk_capacity_bytes": float(self._capacity_bytes),
            "kvray_disk_unusable_files": float(len(self.unusable)),
        }

    def close(self) -> None:
        """As `BlockStore.close`. What hangs is left behind, and keeps the directory locked until it ends."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._writing.stop(_CLOSE_S) or not self._reader.stop(_CLOSE_S):
            logger.warning("the disk does not answer: the store is left open")
            return
        self._writer.close()
        for segment in self._index.segments():
            self._index.retire(segment)
        self._index.close_retired(0.0)

    def check_invariants(self) -> None:
        """Raise InvariantError where the books do not agree."""
        self._index.check_invariants()

    def _wait(self, call: Call, future: Future[T], deadline_s: float) -> T:
        try:
            return future.result(deadline_s)
        except TimeoutError:
            if call.give_up():
                self._stats.count("timeouts")
                raise StoreError(f"the disk has not answered within {deadline_s:g} s") from None
        return future.result()

    def _restore(self, directory: ModelDirectory, files: Files) -> list[Unusable]:
        """Build the index from the segments; return what is not usable."""
        unusable = directory.strangers()
        found: list[segments.Scanned] = []
        paths = directory.segment_paths()
        for path in paths:
            try:
                scanned = segments.scan(files, path, directory.model)
            except OSError as error:
                scanned = f"it cannot be read: {error.strerror}"
            if isinstance(scanned, str):
                unusable.append(Unusable(path, scanned))
                continue
            found.append(scanned)
            self._index.add_segment(scanned.segment)
            self._stats.count("damaged_blocks", scanned.num_damaged)
        rows = [np.flatnonzero(scanned.is_whole) for scanned in found]
        places = np.array(
            [(scanned.segment.segment_id, row) for scanned, some in zip(found, rows, strict=True) for row in some],
            np.uint64,
        ).reshape(-1, 2)
        sequences = np.concatenate(
            [np.zeros(0, np.uint64), *(each.records["sequence"][some] for each, some in zip(found, rows, strict=True))]
        )
        order = in_order_of_use(places[:, 0], places[:, 1], sequences, directory.read_checkpoint())
        unwanted = self._index.restore(places[order, 0], places[order, 1])
        last_id = max((int(path.stem) for path in paths if path.stem.isdecimal()), default=-1)
        last = found[-1] if found and found[-1].segment.segment_id == last_id else None
        self._writer.resume(last, last_id + 1, int(sequences.max()) + 1 if len(sequences) else 0, unwanted)
        self._writer.drop(above_quotas(self._index))
        self._writer.take_dropped()  # nobody was told of them
        return unusable
