"""Disks that fail: each fault is a clear message, costs what it must, and is over when its cause is gone."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from contextlib import contextmanager
from threading import Thread

import pytest

from nodecache.disk import reader, threads, writer
from nodecache.disk.files import Files
from nodecache.disk.layout import FORMAT_VERSION, pack_segment_header
from nodecache.store import StoreError
from tests.nodecache.disk.blocks import (
    BLOCK_BYTES,
    DEADLINE_S,
    GEOMETRY,
    MODEL,
    ROWS,
    capacity_of,
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

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


def run(*command):
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def mounted(path, *options):
    path.mkdir()
    run("mount", *options, path)
    try:
        yield path
    finally:
        run("umount", "--lazy", path)  # a failed test leaves files open


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for six segments."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={6 * GEOMETRY.num_bytes}", "tmpfs") as path:
        yield path


@pytest.fixture
def ext4(tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-m", "0", image)
    with mounted(tmp_path / "disk", "-o", "loop", image) as path:
        yield path


@pytest.fixture
def files():
    files = FaultyFiles()
    yield files
    files.release()


@pytest.fixture
def store(tmp_path, files):
    store = open_store(tmp_path, files=files)
    yield store
    files.release()
    files.failing.clear()
    store.check_invariants()
    store.close()


# ---------------------------------------------------------------------------------------------------------- a full disk


@needs_root
def test_a_disk_smaller_than_the_capacity_is_all_the_room_there_is(small_disk):
    store = open_store(small_disk, 16)
    for number in range(100):
        write(store, [number])
        assert read(store, [number]) == [True]
    assert 3 * ROWS <= len(store.names()) <= 6 * ROWS
    store.check_invariants()
    store.close()


class LateFiles(Files):
    """A file system that reserves nothing: the disk is found full when blocks are written."""

    def allocate(self, fd: int, num_bytes: int) -> None:
        os.ftruncate(fd, num_bytes)


@needs_root
def test_a_disk_that_is_found_full_within_a_segment(small_disk):
    store = open_store(small_disk, 16, files=LateFiles())
    errors = []
    for number in range(100):
        try:
            write(store, [number])
        except StoreError as error:
            errors.append(str(error))
            assert held(store, [number]) == []
        else:
            assert read(store, [number]) == [True]
    assert 1 <= len(errors) < 20
    assert all("No space left on device" in error for error in errors)
    assert store.stats()["kvray_disk_errors_total"] >= len(errors)
    store.check_invariants()
    store.close()


@needs_root
def test_a_disk_that_others_filled_is_used_when_they_leave_it(small_disk):
    filler = small_disk / "filler"
    store = open_store(small_disk)
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(StoreError, match=rf"{folder(small_disk)}.*No space left on device"):
        write(store, [1])
    assert store.find(name_of(1)) is None
    filler.unlink()
    write(store, [1])
    assert read(store, [1]) == [True]
    store.close()


# ----------------------------------------------------------------------------------------------------- a read-only disk


@needs_root
def test_a_read_only_disk_is_read_and_written_again_once_it_can_be(ext4):
    store = open_store(ext4)
    write(store, range(10))
    store.close()
    run("mount", "-o", "remount,ro", ext4)
    store = open_store(ext4)
    assert read(store, range(10)) == [True] * 10
    with pytest.raises(StoreError, match="Read-only file system"):
        write(store, [11])
    store.remove([name_of(0)])
    with pytest.raises(StoreError, match="Read-only file system"):
        store.sync(DEADLINE_S)
    assert read(store, range(10)) == [False] + [True] * 9
    run("mount", "-o", "remount,rw", ext4)
    write(store, [11])
    store.sync(DEADLINE_S)
    store.close()
    store = open_store(ext4)
    assert held(store, range(12)) == [*range(1, 10), 11]
    store.close()


@needs_root
def test_a_read_only_disk_without_a_folder_is_empty_until_it_can_be_written(ext4):
    run("mount", "-o", "remount,ro", ext4)
    store = open_store(ext4)
    with pytest.raises(StoreError, match="Read-only file system"):
        write(store, [1])
    run("mount", "-o", "remount,rw", ext4)
    write(store, [1])
    assert read(store, [1]) == [True]
    store.close()


@needs_root
def test_a_disk_whose_journal_was_aborted_is_still_read(ext4):
    store = open_store(ext4)
    write(store, range(ROWS))
    store.sync(DEADLINE_S)
    subprocess.run(["mount", "-o", "remount,abort", str(ext4)], capture_output=True, check=False)
    with pytest.raises(StoreError, match=r"Read-only file system|Input/output error"):
        write(store, [10])
    assert read(store, range(ROWS)) == [True] * ROWS
    store.close()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("call", ["allocate", "open", "rename", "sync", "write"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC])
def test_what_fails_in_a_write_fails_the_write_alone(store, files, call, number, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "FULL_S", 0.0)
    write(store, [1, 2])
    store.sync(DEADLINE_S)
    files.failing[call] = number
    with pytest.raises(StoreError, match=os.strerror(number)):
        write(store, range(10, 10 + ROWS))
    files.failing.clear()
    assert held(store, range(10, 10 + ROWS)) == []
    assert not list(folder(tmp_path).glob("*.new"))
    write(store, range(20, 20 + ROWS))
    assert read(store, range(20, 20 + ROWS)) == [True] * ROWS
    # A full disk takes room from what is there; other errors take nothing that was synced.
    assert read(store, [1, 2]) == [True, True] or number == errno.ENOSPC


def test_what_a_failed_sync_may_have_lost_is_dropped(store, files):
    write(store, [1])
    store.sync(DEADLINE_S)
    write(store, [2])
    files.failing["sync"] = errno.EIO
    with pytest.raises(StoreError, match="cannot be synced: Input/output error"):
        store.sync(DEADLINE_S)
    files.failing.clear()
    assert held(store, [1, 2]) == [1]
    assert write(store, [3]) == [name_of(2)]
    store.sync(DEADLINE_S)
    assert read(store, [1, 2, 3]) == [True, False, True]
    assert store.stats()["kvray_disk_lost_blocks_total"] == 1


def test_a_removal_that_cannot_be_written_is_written_later(store, files, tmp_path):
    write(store, [1, 2])
    store.sync(DEADLINE_S)
    store.remove([name_of(1)])
    files.failing["write"] = errno.EIO
    with pytest.raises(StoreError, match="Input/output error"):
        store.sync(DEADLINE_S)
    files.failing.clear()
    store.sync(DEADLINE_S)
    store.close()
    again = open_store(tmp_path)
    assert held(again, [1, 2]) == [2]
    again.close()


@pytest.mark.parametrize("call", ["unlink", "sync", "read", "write"])
def test_a_collection_that_fails_loses_nothing_and_is_done_later(tmp_path, files, call):
    store = open_store(tmp_path, 4, files=files)
    write(store, range(3 * ROWS))
    store.sync(DEADLINE_S)
    read(store, range(0, 3 * ROWS, 2))
    files.failing[call] = errno.EIO
    for number in range(100, 100 + 2 * ROWS):
        try:
            write(store, [number])
        except StoreError:
            continue
    files.failing.clear()
    assert used_bytes(tmp_path) <= capacity_of(4)
    for number in range(200, 200 + 2 * ROWS):
        write(store, [number])
        assert read(store, [number]) == [True]
    assert used_bytes(tmp_path) <= capacity_of(4)
    store.check_invariants()
    store.close()


def test_a_bad_place_on_disk_costs_its_block_alone(store, files):
    write(store, range(ROWS))
    files.bad_offsets = {GEOMETRY.offset_of(1) + 100}
    assert read(store, range(ROWS)) == [True, False] + [True] * (ROWS - 2)
    assert held(store, range(ROWS)) == [0, *range(2, ROWS)]
    assert store.stats()["kvray_disk_damaged_blocks_total"] == 1
    write(store, [1])
    assert read(store, range(ROWS)) == [True] * ROWS


def test_a_disk_that_cannot_be_read_at_all_costs_no_block(store, files):
    write(store, range(ROWS))
    files.failing["read"] = errno.EIO
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        read(store, range(ROWS))
    files.failing.clear()
    assert read(store, range(ROWS)) == [True] * ROWS


def test_a_segment_that_cannot_be_read_at_the_start_is_left_out(tmp_path, files):
    store = open_store(tmp_path)
    write(store, [1])
    store.close()
    files.failing["read"] = errno.EIO
    store = open_store(tmp_path, files=files)
    assert [unusable.reason for unusable in store.unusable] == ["it cannot be read: Input/output error"]
    files.failing.clear()
    write(store, [2])
    assert held(store, [1, 2]) == [2]
    store.close()
    store = open_store(tmp_path)
    assert held(store, [1, 2]) == [1, 2]
    store.close()


# -------------------------------------------------------------------------------------------------------------- hanging


def test_a_read_of_a_disk_that_hangs_ends_at_its_deadline_and_nothing_lands_later(store, files):
    write(store, range(3))
    files.held = {"read"}
    targets = [bytearray(BLOCK_BYTES) for _ in range(3)]
    with pytest.raises(StoreError, match=r"3 blocks were not read from disk within 0.01 s"):
        store.read([name_of(n) for n in range(3)], [memoryview(target) for target in targets], 0.01)
    files.release()
    assert read(store, range(3)) == [True] * 3
    assert targets == [bytes(BLOCK_BYTES)] * 3
    assert store.stats()["kvray_disk_timeouts_total"] == 1


def test_a_write_to_a_disk_that_hangs_ends_at_its_deadline_and_is_not_found_later(store, files):
    write(store, [0])
    files.held = {"write"}
    with pytest.raises(StoreError, match=r"the disk has not answered within 0.01 s"):
        write(store, [1, 2], 0.01)
    assert read(store, [0]) == [True]
    files.release()
    write(store, [3])
    assert held(store, range(4)) == [0, 3]
    write(store, [1])
    assert read(store, range(4)) == [True, True, False, True]


def test_when_all_threads_hang_calls_are_refused_at_once(store, files, monkeypatch):
    write(store, range(3))
    files.held = {"read", "write"}
    callers = [Thread(target=read, args=(store, [0])) for _ in range(reader.NUM_THREADS)]
    callers.append(Thread(target=write, args=(store, [5])))
    for caller in callers:
        caller.start()
    files.wait_for_waiting(len(callers))
    monkeypatch.setattr(threads, "STALL_S", 0.0)
    with pytest.raises(StoreError, match="the disk has not answered for"):
        read(store, [0])
    with pytest.raises(StoreError, match="the disk has not answered for"):
        write(store, [6])
    monkeypatch.undo()
    files.release()
    for caller in callers:
        caller.join()
    write(store, [7])
    assert read(store, [0, 1, 2, 5, 7]) == [True] * 5


# ------------------------------------------------------------------------------------------------------ what others did


def test_a_directory_that_was_deleted_is_made_anew(store, tmp_path):
    write(store, range(6))
    shutil.rmtree(folder(tmp_path))
    dropped = write(store, [10])
    assert sorted(dropped) == sorted(name_of(n) for n in range(6))
    assert held(store, range(11)) == [10]
    store.sync(DEADLINE_S)
    store.close()
    again = open_store(tmp_path)
    assert read(again, [10]) == [True]
    again.close()


def test_a_root_that_was_deleted_is_made_anew(store, tmp_path):
    write(store, [1])
    shutil.rmtree(tmp_path)
    assert write(store, [2]) == [name_of(1)]
    assert read(store, [2]) == [True]


def test_a_truncated_segment_costs_what_is_gone(store, tmp_path):
    write(store, range(ROWS))
    os.truncate(segment_files(tmp_path)[0], GEOMETRY.offset_of(2) + 10)
    assert read(store, range(ROWS)) == [True, True] + [False] * (ROWS - 2)


def test_a_segment_truncated_between_two_starts_costs_what_is_gone(tmp_path):
    store = open_store(tmp_path)
    write(store, range(ROWS + 1))
    store.close()
    os.truncate(segment_files(tmp_path)[0], GEOMETRY.offset_of(2) + 10)
    store = open_store(tmp_path)
    assert held(store, range(ROWS + 1)) == [0, 1, ROWS]
    assert store.stats()["kvray_disk_damaged_blocks_total"] == ROWS - 2
    store.close()


def test_a_damaged_block_is_dropped_counted_and_stays_away(tmp_path):
    store = open_store(tmp_path)
    write(store, range(3))
    with segment_files(tmp_path)[0].open("r+b") as file:
        file.seek(GEOMETRY.offset_of(1) + 4000)
        file.write(b"\xff")
    assert read(store, range(3)) == [True, False, True]
    assert store.stats()["kvray_disk_damaged_blocks_total"] == 1
    store.close()
    store = open_store(tmp_path)
    assert held(store, range(3)) == [0, 2]
    store.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not begin like a segment"),
        (b"not ours", "does not begin like a segment"),
        (pack_segment_header(MODEL, 7, ROWS)[:100], "header is damaged"),
        (pack_segment_header(MODEL, 8, ROWS), "says of itself to be segment 8"),
        (
            pack_segment_header(MODEL._replace(layout_version=5), 7, ROWS),
            "it holds blocks of .*-5-5000, wanted .*-1-5000",
        ),
    ],
)
def test_a_file_that_is_no_segment_of_ours_is_left_alone_with_the_reason(tmp_path, content, reason):
    folder(tmp_path).mkdir()
    strange = folder(tmp_path) / "00000007.segment"
    strange.write_bytes(content)
    store = open_store(tmp_path)
    [unusable] = store.unusable
    assert unusable.path == strange
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(unusable.reason)
    write(store, range(10))
    store.close()
    assert strange.read_bytes() == content


def test_a_segment_of_a_later_format_is_left_alone_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("nodecache.disk.layout.FORMAT_VERSION", FORMAT_VERSION + 1)
    store = open_store(tmp_path)
    write(store, [1])
    store.close()
    monkeypatch.undo()
    store = open_store(tmp_path)
    assert [unusable.reason for unusable in store.unusable] == [
        f"it is of format version {FORMAT_VERSION + 1}, wanted {FORMAT_VERSION}"
    ]
    assert held(store, [1]) == []
    write(store, [1])
    assert read(store, [1]) == [True]
    store.close()


def test_targets_are_not_touched_by_what_is_damaged(store, tmp_path):
    write(store, [1])
    with segment_files(tmp_path)[0].open("r+b") as file:
        file.seek(GEOMETRY.offset_of(0))
        file.write(bytes(content_of(2)))
    assert read(store, [1]) == [False]
