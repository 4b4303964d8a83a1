"""Blocks leave a device's pool and come into it beside the steps: in order, whole, and hashed as they lie there.

The device does nothing before somebody waits for it (tests/engine/fake_device.py): what is not waited for is wrong.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

import engine.memory.copies
import engine.memory.page_locks
from engine.memory.copies import DeviceCopies
from engine.memory.device_memory import DeviceMemory
from engine.memory.page_locks import Part
from tests.engine.fake_device import FakeDevice
from transport.checksum import checksum
from transport.memory import Memory, SharedView
from transport.protocol import Copies, Copy, CopyWatch
from transport.shm import ShmTransport, open_region

NUM_BLOCKS = 40
BLOCK_BYTES = 4096


class Pool:
    """A pool of random bytes on a fake device."""

    def __init__(self, block_bytes: int = BLOCK_BYTES, **device) -> None:
        self.device = FakeDevice(**device)
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, 256, (NUM_BLOCKS, block_bytes), dtype=torch.uint8, generator=generator)
        self.copies = DeviceCopies(self.device, self.rows)
        self.memory = DeviceMemory(self.rows, self.copies)

    def row(self, block_id: int) -> bytes:
        return self.rows[block_id].numpy().tobytes()

    def step(self, block_id: int, value: int) -> None:
        """A step that writes a block is launched."""
        self.device.steps.run(lambda: self.rows[block_id].fill_(value))
        self.copies.note_step()


class Arena:
    """The memory of a node cache, as a worker has it mapped."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = Memory.allocate(num_bytes)
        self.memory.view[:] = random.Random(2).randbytes(num_bytes)
        self.shm = ShmTransport()
        self.region = self.shm.register(self.memory)

    def open(self) -> SharedView:
        return open_region(self.region, is_writable=True)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces of everything in small pools."""
    monkeypatch.setattr(engine.memory.copies, "_STAGING_BYTES", 5 * BLOCK_BYTES)
    monkeypatch.setattr(engine.memory.copies, "_COPY_BYTES", 3 * BLOCK_BYTES + 100)
    monkeypatch.setattr(engine.memory.page_locks, "_PIECE_BYTES", 7 * BLOCK_BYTES + 4096)


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture(params=["locked", "locked in part", "not locked"])
def locking(request) -> dict:
    """How much of the arena's memory can be locked."""
    return {
        "locked": {},
        "locked in part": {"max_locked_bytes": 20 * BLOCK_BYTES},
        "not locked": {"refusal": "operation not supported"},
    }[request.param]


def lock(pool: Pool, view: SharedView) -> None:
    thread = pool.copies.page_locks.lock(view)
    assert thread is not None
    thread.join()


# ------------------------------------------------------------------------------------------------------------ out of it


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES, 1000, 1001])
def test_blocks_lie_where_they_were_to_be_copied_and_their_checksums_are_told(locking, block_bytes):
    pool, arena = Pool(block_bytes, **locking), Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    lock(pool, view)
    before = bytes(view.view)
    block_ids = [7, 1, 30, 4, 5, 6, 2, 39, 0]
    offsets = [block_bytes * place for place in (3, 4, 5, 0, 1, 30, 31, 32, 9)]
    sums = pool.copies.copy_out(block_ids, view.view, offsets)
    assert sums == [checksum(pool.row(block_id)) for block_id in block_ids]
    expected = bytearray(before)
    for block_id, offset in zip(block_ids, offsets, strict=True):
        expected[offset : offset + block_bytes] = pool.row(block_id)
    assert bytes(view.view) == expected


def test_what_lies_in_a_row_at_both_ends_is_one_copy(pool, monkeypatch):
    arena = Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    lock(pool, view)
    sizes = []
    monkeypatch.setattr(pool.copies, "_to_host", lambda source, target: sizes.append(len(target) // BLOCK_BYTES))
    pool.copies.copy_out([3, 1, 2, 9, 8], view.view, [BLOCK_BYTES * place for place in (11, 10, 20, 12, 5)])
    assert sizes == [1, 3, 1]


def test_what_a_step_wrote_is_copied_though_the_device_was_behind(pool):
    pool.step(3, 33)
    pool.step(4, 44)
    pool.copies.end_step()
    pool.copies.end_step()
    target = bytearray(2 * BLOCK_BYTES)
    sums = pool.copies.copy_out([4, 3], memoryview(target), [0, BLOCK_BYTES])
    assert bytes(target) == bytes([44]) * BLOCK_BYTES + bytes([33]) * BLOCK_BYTES
    assert sums == [checksum(pool.row(4)), checksum(pool.row(3))] == pool.copies.checksums([4, 3])


def test_a_step_that_has_not_ended_is_not_waited_for(pool):
    pool.step(3, 33)
    pool.copies.end_step()
    pool.step(4, 44)
    pool.copies.copy_out([3], memoryview(bytearray(BLOCK_BYTES)), [0])
    assert pool.copies.checksums([3]) == [checksum(bytes([33]) * BLOCK_BYTES)]
    assert pool.device.steps.num_waiting == 1


def test_the_checksums_of_what_a_step_writes_are_begun_with_it_and_wait_for_nothing(pool):
    pool.step(3, 33)
    pending = pool.copies.begin_checksums([3, 4])
    assert pool.device.steps.num_waiting == 1
    assert pending.values() == [checksum(bytes([33]) * BLOCK_BYTES), checksum(pool.row(4))]


def test_what_is_done_at_the_start_changes_nothing_and_leaves_nothing_to_be_done():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=torch.uint8, generator=generator)
    pool = Pool()
    assert torch.equal(pool.rows, rows)
    assert not any(stream.num_waiting for stream in pool.device.streams)


def test_no_blocks_are_nothing(pool):
    assert pool.copies.copy_out([], memoryview(bytearray(1)), []) == []
    assert pool.copies.checksums([]) == []


# ------------------------------------------------------------------------------------------------------------- into it


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES, 1000, 1001])
def test_blocks_come_in_where_they_were_to_come_and_are_hashed_there(locking, block_bytes):
    pool, arena = Pool(block_bytes, **locking), Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    lock(pool, view)
    expected = pool.rows.clone()
    places, block_ids = [3, 4, 5, 0, 1, 30, 31, 32, 9], [7, 1, 30, 4, 5, 6, 2, 39, 0]
    for place, block_id in zip(places, block_ids, strict=True):
        data = bytearray(view.view[block_bytes * place : block_bytes * (place + 1)])
        expected[block_id] = torch.frombuffer(data, dtype=torch.uint8)
    copies = Copies.of_equal(np.array(places) * block_bytes, np.array(block_ids) * block_bytes, block_bytes)
    watch = CopyWatch()
    sums = pool.memory.fill(view, copies, watch)
    assert torch.equal(pool.rows, expected)
    assert sums == [checksum(pool.row(block_id)) for block_id in block_ids]
    assert watch.num_bytes == copies.num_bytes


@pytest.mark.parametrize("num_bytes", [1, 100, BLOCK_BYTES - 1, 9 * BLOCK_BYTES + 5, 0])
def test_bytes_that_are_no_blocks_come_in_too(pool, num_bytes):
    arena = Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    copy = Copy(17, 4099, num_bytes)
    (told,) = pool.memory.fill(view, Copies.of([copy]), CopyWatch())
    landed = pool.rows.view(-1)[4099 : 4099 + num_bytes].numpy().tobytes()
    assert landed == bytes(view.view[17 : 17 + num_bytes])
    assert told == checksum(landed)


def test_nothing_is_begun_once_it_was_stopped(pool):
    arena = Arena(BLOCK_BYTES)
    before, watch = pool.rows.clone(), CopyWatch()
    watch.stop()
    assert pool.memory.fill(arena.open(), Copies.of([Copy(0, 0, BLOCK_BYTES)]), watch) == []
    assert torch.equal(pool.rows, before)


def test_both_directions_and_checksums_from_several_threads_do_not_mix(pool):
    arena = Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    failures: list[object] = []

    def work(first: int) -> None:
        for turn in range(20):
            ids = [first + (turn + i) % 4 for i in range(3)]
            copies = Copies.of([Copy(i * BLOCK_BYTES, i * BLOCK_BYTES, BLOCK_BYTES) for i in ids])
            sums = pool.memory.fill(view, copies, CopyWatch())
            target = bytearray(3 * BLOCK_BYTES)
            again = pool.copies.copy_out(ids, memoryview(target), [0, BLOCK_BYTES, 2 * BLOCK_BYTES])
            there = b"".join(bytes(view.view[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]) for i in ids)
            if not (sums == again == pool.copies.checksums(ids) and bytes(target) == there):
                failures.append((first, turn))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 8, 16, 24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --------------------------------------------------------------------------------------------------------- locked pages


def test_what_is_cut_lies_whole_in_a_locked_piece_or_in_none(pool):
    arena = Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    pool.device.max_locked_bytes = 16 * BLOCK_BYTES
    locks = pool.copies.page_locks
    lock(pool, view)
    (address, size), (second, _) = sorted(pool.device.locked.items())
    parts = list(locks.cut(address + 10, NUM_BLOCKS * BLOCK_BYTES - 10, 5 * BLOCK_BYTES))
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == NUM_BLOCKS * BLOCK_BYTES - 10
    assert max(part.end - part.begin for part in parts) == 5 * BLOCK_BYTES
    assert second == address + size
    assert size - 10 in [part.end for part in parts]
    assert [part.is_locked for part in parts] == [part.end <= 2 * size - 10 for part in parts]
    assert list(locks.cut(address - 5, 10, 100)) == [Part(0, 5, is_locked=False), Part(5, 10, is_locked=True)]


def test_pages_are_locked_once_and_unlocked_when_nobody_has_the_mapping(pool):
    arena = Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    assert arena.open() is view  # whoever opens it gets the mapping whose pages are locked
    lock(pool, view)
    assert pool.copies.page_locks.lock(view) is None
    assert sum(pool.device.locked.values()) == NUM_BLOCKS * BLOCK_BYTES
    del view
    for thread in threading.enumerate():
        if thread.name == "unlock-pages":
            thread.join()
    assert pool.device.locked == {}
    assert not any(part.is_locked for part in pool.copies.page_locks.cut(0, 1 << 47, 1 << 47))


def test_pages_of_a_region_that_was_withdrawn_are_not_locked(pool):
    arena = Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    arena.memory.withdraw()
    lock(pool, view)
    assert pool.device.locked == {}


def test_at_the_end_nothing_is_locked(pool):
    arena = Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    lock(pool, view)
    pool.copies.close()
    assert pool.device.locked == {}
    assert pool.copies.page_locks.lock(arena.open()) is None


def test_pages_that_cannot_be_locked_are_one_line_that_says_why(caplog):
    pool, arena = Pool(refusal="operation not supported"), Arena(NUM_BLOCKS * BLOCK_BYTES)
    view = arena.open()
    lock(pool, view)
    (record,) = caplog.records
    assert f"{NUM_BLOCKS * BLOCK_BYTES} of {NUM_BLOCKS * BLOCK_BYTES} bytes" in record.message
    assert "(operation not supported)" in record.message
    assert "ulimit -l" in record.message
