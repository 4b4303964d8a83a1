from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from messages.errors import ConfigError
from nodecache.disk.layout import Geometry, Model
from nodecache.disk.store import DiskStore
from nodecache.store import StoredBlock, StoreError
from tests.nodecache.disk.blocks import (
    BLOCK_BYTES,
    DEADLINE_S,
    GEOMETRY,
    MODEL,
    ROWS,
    block_of,
    capacity_of,
    checksum,
    content_of,
    folder,
    held,
    name_of,
    open_store,
    read,
    segment_files,
    used_bytes,
    write,
)
from tests.nodecache.disk.faulty_files import FaultyFiles

ROOT = Path(__file__).parents[3]


@pytest.fixture
def opened(tmp_path):
    """Open stores in one directory, one after the other; the books of each are in order when it is closed."""
    stores = []

    def close():
        for store in stores:
            store.check_invariants()
            store.close()
        stores.clear()

    def open_next(*args, **options):
        close()
        stores.append(open_store(tmp_path, *args, **options))
        return stores[-1]

    yield open_next
    close()


def test_a_restart_keeps_all(opened):
    write(opened(), range(10))
    store = opened()
    assert sorted(held(store, range(12))) == list(range(10))
    assert store.find(name_of(3)) == block_of(3)
    assert read(store, range(10)) == [True] * 10


def test_what_was_removed_stays_so_after_a_restart(opened):
    store = opened()
    write(store, range(10))
    store.sync(DEADLINE_S)
    store.remove([name_of(1), name_of(2)])
    store.sync(DEADLINE_S)
    store = opened()
    assert held(store, range(10)) == [0, 3, 4, 5, 6, 7, 8, 9]
    write(store, [1])
    assert held(opened(), range(3)) == [0, 1]


def test_a_restart_goes_on_in_the_last_segment(opened, tmp_path):
    write(opened(), range(2))
    for number in range(2, ROWS):
        write(opened(), [number])
    assert len(segment_files(tmp_path)) == 1
    write(opened(), [ROWS])
    assert len(segment_files(tmp_path)) == 2
    assert read(opened(), range(ROWS + 1)) == [True] * (ROWS + 1)


def test_files_never_take_more_than_the_capacity_and_old_blocks_go_first(opened, tmp_path):
    store = opened(5)
    dropped = []
    for first in range(0, 100, 2):
        dropped += write(store, [first, first + 1])
        assert used_bytes(tmp_path) <= capacity_of(5)
    left = held(store, range(100))
    assert left[-8:] == list(range(92, 100))
    assert len(left) >= 2 * ROWS
    assert sorted(dropped + [name_of(n) for n in left]) == sorted(name_of(n) for n in range(100))
    assert store.stats()["kvray_disk_evicted_blocks_total"] == len(dropped)


def test_what_is_used_stays(opened):
    store = opened(6)
    write(store, [0])
    for number in range(1, 100):
        write(store, [number])
        assert read(store, [0]) == [True]
    assert store.stats()["kvray_disk_copied_blocks_total"] > 0


@pytest.mark.parametrize("is_checkpoint_kept", [True, False])
def test_the_order_of_use_survives_with_the_checkpoint(opened, tmp_path, is_checkpoint_kept):
    store = opened(6)
    for number in range(4 * ROWS):
        write(store, [number])
    read(store, [0])
    opened(6).close()
    if not is_checkpoint_kept:
        (folder(tmp_path) / "checkpoint").unlink()
    store = opened(6)
    dropped = []
    for number in range(100, 100 + 4 * ROWS):
        dropped += write(store, [number])
        if name_of(3) in dropped:
            break
    assert (name_of(0) not in dropped) is is_checkpoint_kept


def test_dropped_blocks_give_their_room_back_when_it_is_collected(opened, tmp_path):
    store = opened()
    write(store, range(6 * ROWS))
    left = [number for number in range(6 * ROWS) if number % 4 == 0]
    store.remove([name_of(number) for number in range(6 * ROWS) if number % 4])
    before = used_bytes(tmp_path)
    num_files = num_bytes = 0
    while True:
        collected = store.collect(DEADLINE_S)
        num_files, num_bytes = num_files + collected.num_files, num_bytes + collected.num_bytes
        if not collected.has_more:
            break
    assert num_files >= 3
    assert num_bytes == num_files * GEOMETRY.num_bytes
    assert used_bytes(tmp_path) <= before - num_bytes
    assert held(store, range(6 * ROWS)) == left
    store = opened()
    assert read(store, left) == [True] * len(left)
    assert store.collect(DEADLINE_S).num_files == 0


def test_a_collection_that_is_wanted_and_fails_loses_nothing(tmp_path):
    files = FaultyFiles()
    store = open_store(tmp_path, files=files)
    write(store, range(3 * ROWS))
    left = list(range(0, 3 * ROWS, 4))
    store.remove([name_of(number) for number in range(3 * ROWS) if number % 4])
    store.sync(DEADLINE_S)
    files.failing["unlink"] = errno.EIO
    with pytest.raises(StoreError, match="cannot be collected"):
        store.collect(DEADLINE_S)
    files.failing.clear()
    assert read(store, left) == [True] * len(left)
    store.check_invariants()
    store.close()


def test_a_value_that_the_caller_gives_decides_who_goes(opened):
    worthy = {name_of(n) for n in range(0, 60, 7)}
    store = opened(8, keep_value=lambda name: float(name in worthy))
    for number in range(60):
        write(store, [number])
    assert held(store, range(0, 60, 7)) == list(range(0, 60, 7))


def test_a_run_longer_than_the_store_leaves_its_end(opened):
    store = opened(4)
    dropped = write(store, range(100))
    left = held(store, range(100))
    assert left[-ROWS:] == list(range(100 - ROWS, 100))
    assert sorted(dropped) == sorted(name_of(n) for n in range(100) if n not in left)


def test_a_smaller_capacity_is_reached_in_the_background(opened, tmp_path):
    write(opened(16), range(15 * ROWS))
    store = opened(5)
    write(store, range(1000, 1000 + ROWS + 1))
    assert used_bytes(tmp_path) <= capacity_of(5)
    assert read(store, [1000, 1001]) == [True, True]


def test_too_small_a_capacity_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="disk capacity of 1,000 bytes; for blocks of 5,000 bytes at least"):
        DiskStore(tmp_path, MODEL, 1000, checksum)


def test_large_stores_have_larger_segments():
    assert 200 < (100 << 30) // Geometry.within(1 << 20, (100 << 30) // 256).num_bytes <= 256


def test_models_share_a_directory_and_each_names_the_other(tmp_path, opened):
    others = [Model(b"\x01" * 32, 1, BLOCK_BYTES), MODEL._replace(layout_version=2)]
    for other in others:
        store = open_store(tmp_path, model=other)
        write(store, [1])
        store.close()
    (tmp_path / "notes.txt").write_text("mine")
    store = opened()
    assert held(store, [1]) == []
    reasons = {unusable.path.name: unusable.reason for unusable in store.unusable}
    assert "another model" in reasons[others[0].directory_name]
    assert "layout 2" in reasons[others[1].directory_name]
    assert "no folder of a model" in reasons["notes.txt"]
    assert store.stats()["kvray_disk_unusable_files"] == 3
    write(store, [2])
    again = open_store(tmp_path, model=others[0])
    assert held(again, [1, 2]) == [1]
    again.close()


def test_a_second_instance_is_refused_with_the_owner(tmp_path, opened):
    opened()
    with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on "):
        open_store(tmp_path)


def test_a_second_process_is_refused_and_let_in_when_the_first_is_gone(tmp_path):
    code = (
        "import sys, pathlib; from tests.nodecache.disk.blocks import open_store, write\n"
        "store = open_store(pathlib.Path(sys.argv[1])); write(store, [1]); print('open', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=f"in use by process {child.pid} on"):
            open_store(tmp_path)
        child.kill()
    store = open_store(tmp_path)
    assert read(store, [1]) == [True]
    store.close()


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"Not a directory|File exists"):
        open_store(path)


def test_of_two_names_with_one_key_one_is_held(opened):
    store = opened()
    twin = name_of(1)[:8] + bytes(8)
    write(store, [1])
    assert store.find(twin) is None
    content = content_of(2)
    assert store.write([StoredBlock(twin, 16, checksum(content))], [content], DEADLINE_S) == [name_of(1)]
    assert store.find(name_of(1)) is None
    target = bytearray(BLOCK_BYTES)
    assert store.read([name_of(1), twin], [memoryview(bytearray(BLOCK_BYTES)), memoryview(target)], DEADLINE_S) == [
        False,
        True,
    ]
    assert target == content
    assert held(opened(), [1]) == []


def test_a_block_is_read_while_its_segment_is_collected(tmp_path):
    """A read that has begun ends with the bytes, though the segment was deleted meanwhile."""
    files = FaultyFiles()
    store = open_store(tmp_path, 4, files=files)
    write(store, [0, 1])
    files.held = {"read"}
    result = []
    reading = threading.Thread(target=lambda: result.append(read(store, [0, 1])))
    reading.start()
    files.wait_for_waiting(1)
    files.held = set()
    number = 100
    while held(store, [0, 1]):
        number += 1
        write(store, [number])
    files.release()
    reading.join()
    assert result == [[True, True]]
    store.close()


@pytest.mark.slow
def test_bookkeeping_takes_at_most_160_bytes_a_block(tmp_path):
    """Held by a store of sparse blocks: written once, then opened."""
    num_blocks, block_bytes = 40_000, 512
    model = MODEL._replace(block_bytes=block_bytes)
    content = memoryview(bytes(block_bytes))
    blocks = [StoredBlock(name_of(n), 16, checksum(content)) for n in range(num_blocks)]
    store = DiskStore(tmp_path, model, 1 << 30, checksum)
    store.write(blocks, [content] * num_blocks, DEADLINE_S)
    store.close()
    gc.collect()
    tracemalloc.start()
    try:
        store = DiskStore(tmp_path, model, 1 << 30, checksum)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store.names()) == num_blocks
    store.close()
    assert used / num_blocks <= 160


def test_a_deadline_of_none_is_refused_at_once_when_closed(opened):
    store = opened()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.sync(DEADLINE_S)
