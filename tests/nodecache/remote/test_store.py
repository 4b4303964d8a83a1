from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time

import pytest

from kvcache.region import BlockNumbers
from messages.errors import ConfigError
from nodecache.codec import INT8, PLAIN, lossless_codec
from nodecache.remote import layout, manifests, upkeep
from nodecache.remote.layout import HEADER_BYTES, MAX_OBJECT_BYTES
from nodecache.remote.store import RemoteStore
from nodecache.store import StoredBlock, StoreError
from tests.nodecache.remote.blocks import (
    BLOCK_BYTES,
    DEADLINE_S,
    MODEL,
    block_of,
    content_of,
    folder,
    held,
    manifest_files,
    name_of,
    object_files,
    open_store,
    read,
    write,
)
from transport.checksum import checksum

BFLOAT16 = lossless_codec(2)


@pytest.fixture
def opened(tmp_path):
    """Open stores in one directory, all at the same time; their books are in order at the end."""
    stores = []

    def open_next(root=tmp_path, model=MODEL, codec=PLAIN):
        stores.append(open_store(root, model, codec))
        return stores[-1]

    yield open_next
    for store in stores:
        store.check_invariants()
        store.close()


# ------------------------------------------------------------------------------------------------------------ one store


def test_what_was_written_is_found_and_read_in_any_order(opened):
    store = opened()
    write(store, range(40))
    assert store.find(name_of(3)) == block_of(3)
    assert store.find(name_of(40)) is None
    assert set(store.names()) == {name_of(n) for n in range(40)}
    assert read(store, [7, 39, 40, 0, 8, 7]) == [True, True, False, True, True, True]
    assert store.stats()["kvray_remote_read_blocks_total"] == 5


def test_a_chain_is_cut_into_objects_of_at_most_eight_mebibytes(opened, tmp_path):
    block_bytes = 3 << 20
    model = MODEL._replace(block_bytes=block_bytes)
    store = opened(model=model)
    write(store, range(5), block_bytes=block_bytes)
    sizes = [path.stat().st_size for path in (tmp_path / model.folder_name / "objects").iterdir()]
    assert len(sizes) == 3
    assert max(sizes) <= MAX_OBJECT_BYTES
    assert read(store, range(5), block_bytes=block_bytes) == [True] * 5


def test_a_block_longer_than_that_is_an_object_of_its_own(opened):
    block_bytes = MAX_OBJECT_BYTES + 8
    store = opened(model=MODEL._replace(block_bytes=block_bytes))
    write(store, range(2), block_bytes=block_bytes)
    assert store.stats()["kvray_remote_objects"] == 2
    assert read(store, range(2), block_bytes=block_bytes) == [True] * 2


def test_what_is_held_is_not_written_again(opened, tmp_path):
    store = opened()
    write(store, [1, 2])
    write(store, [1, 2, 3, 3])
    assert sorted(path.stat().st_size for path in object_files(tmp_path)) == [
        MODEL.record_bytes,
        2 * MODEL.record_bytes,
    ]
    assert read(store, [1, 2, 3]) == [True] * 3


def test_blocks_that_are_not_what_they_are_said_to_be_are_refused(opened):
    store = opened()
    with pytest.raises(StoreError, match=rf"blocks of \[4\] bytes; {BLOCK_BYTES} are wanted"):
        store.write([block_of(1)], [memoryview(b"1234")], DEADLINE_S)
    with pytest.raises(StoreError, match=f"block {name_of(1).hex()} to be written has checksum"):
        store.write([block_of(1)], [content_of(2)], DEADLINE_S)
    assert held(store, [1, 2]) == []
    assert store.stats()["kvray_remote_is_writable"] == 1


def test_what_was_removed_is_gone_everywhere_and_its_object_with_the_last_block(opened, tmp_path):
    store, other = opened(), opened()
    write(store, [1, 2])
    store.sync(DEADLINE_S)
    other.sync(DEADLINE_S)
    store.remove([name_of(1), name_of(7)])
    assert read(store, [1, 2]) == [False, True]
    for each in (store, other):
        each.sync(DEADLINE_S)
    assert held(other, [1, 2]) == [2]
    assert len(object_files(tmp_path)) == 1
    other.remove([name_of(2)])
    for each in (other, store):
        each.sync(DEADLINE_S)
    assert held(store, [1, 2]) == []
    assert object_files(tmp_path) == []
    assert held(opened(), [1, 2]) == []


def test_what_was_removed_may_come_again_at_once(opened):
    store = opened()
    for _ in range(20):
        write(store, [1, 2])
        assert read(store, [1, 2]) == [True, True]
        store.remove([name_of(1), name_of(2)])
    write(store, [1, 2])
    store.sync(DEADLINE_S)
    assert read(store, [1, 2]) == [True, True]
    assert held(opened(), [1, 2]) == [1, 2]


# ------------------------------------------------------------------------------------------------------ several stores


def test_a_restart_keeps_all(opened):
    store = opened()
    write(store, range(10))
    store.close()
    store = opened()
    assert held(store, range(12)) == list(range(10))
    assert store.find(name_of(3)) == block_of(3)
    assert read(store, range(10)) == [True] * 10


def test_a_store_finds_by_itself_what_another_wrote_and_tells(opened, tmp_path, monkeypatch):
    for name in ("ROUND_S", "LIST_S"):
        monkeypatch.setattr(upkeep, name, 0.05)
    found = threading.Event()
    told = []

    def on_changes(changes):
        told.append(changes)
        found.set()

    other = RemoteStore(str(tmp_path), MODEL, on_changes=on_changes)
    try:
        write(opened(), [1, 2])
        assert found.wait(60)
        assert sorted(told[0].stored) == sorted([name_of(1), name_of(2)])
        assert read(other, [1, 2]) == [True, True]
    finally:
        other.close()


def test_the_same_blocks_written_by_two_are_one_object(opened, tmp_path):
    first, second = opened(), opened()
    write(first, range(5))
    write(second, range(5))
    assert len(object_files(tmp_path)) == 1
    for store in (first, second, first):
        store.sync(DEADLINE_S)
    assert read(first, range(5)) == read(second, range(5)) == [True] * 5


def test_many_manifests_become_few(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MIN_MERGED", 6)
    monkeypatch.setattr(manifests, "MAX_MERGED", 6)
    store, other = opened(), opened()
    for number in range(40):
        write(store, [number])
        store.sync(DEADLINE_S)
        assert len(manifest_files(tmp_path)) <= 7
    other.sync(DEADLINE_S)
    assert held(other, range(40)) == list(range(40))
    third = opened()
    assert read(third, range(40)) == [True] * 40
    assert third.stats()["kvray_remote_manifests"] == len(manifest_files(tmp_path))


def test_removals_go_once_everything_is_merged_and_they_are_old(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "_MIN_FORGOTTEN", 5)
    monkeypatch.setattr(manifests, "REMEMBERED_US", -1_000_000)
    store = opened()
    write(store, range(10))
    store.sync(DEADLINE_S)
    store.remove([name_of(n) for n in range(6)])
    store.sync(DEADLINE_S)
    (path,) = manifest_files(tmp_path)
    rows = manifests.unpack_manifest(MODEL, path.name, path.read_bytes())
    assert len(rows) == 4
    assert held(opened(), range(10)) == [6, 7, 8, 9]


# ------------------------------------------------------------------------------------------------------------- codecs


def test_encoded_blocks_are_shorter_and_read_as_any(opened, tmp_path):
    store = opened(codec=BFLOAT16)
    write(store, range(40))
    assert read(store, [7, 39, 40, 0, 8, 7]) == [True, True, False, True, True, True]
    stats = store.stats()
    assert stats["kvray_remote_plain_bytes"] == stats["kvray_remote_written_bytes_total"] == 40 * BLOCK_BYTES
    stored_bytes = stats["kvray_remote_bytes"]
    assert stored_bytes == stats["kvray_remote_written_stored_bytes_total"] < 0.9 * 40 * BLOCK_BYTES
    assert sum(path.stat().st_size for path in object_files(tmp_path)) == 40 * HEADER_BYTES + stored_bytes
    assert 3 * BLOCK_BYTES < stats["kvray_remote_read_stored_bytes_total"] < stats["kvray_remote_read_bytes_total"]


def test_plain_and_encoded_blocks_lie_in_one_bucket_and_any_store_reads_both(opened, tmp_path):
    plain, encoding = opened(), opened(codec=BFLOAT16)
    write(plain, range(10))
    write(encoding, range(10, 20))
    for store in (plain, encoding, plain):
        store.sync(DEADLINE_S)
    for store in (plain, encoding, opened(), opened(codec=BFLOAT16)):
        assert read(store, range(20)) == [True] * 20
        assert store.find(name_of(11)) == block_of(11)
    encoding.remove([name_of(n) for n in range(10, 20)])
    for store in (encoding, plain):
        store.sync(DEADLINE_S)
    assert held(plain, range(20)) == list(range(10))
    assert len(object_files(tmp_path)) == 1


def test_the_same_blocks_encoded_and_plain_are_two_objects_each_of_them_whole(opened, tmp_path):
    plain, encoding = opened(), opened(codec=BFLOAT16)
    write(plain, range(6))
    write(encoding, range(6))
    assert len(object_files(tmp_path)) == 2
    for store in (plain, encoding, plain):
        store.sync(DEADLINE_S)
    for store in (plain, encoding, opened()):
        assert read(store, range(6)) == [True] * 6


def test_manifests_of_both_kinds_are_merged(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MIN_MERGED", 3)
    monkeypatch.setattr(manifests, "MAX_MERGED", 3)
    stores = [opened(), opened(codec=BFLOAT16)]
    for number in range(12):
        write(stores[number % 2], [2 * number, 2 * number + 1])
        stores[number % 2].sync(DEADLINE_S)
    assert len(manifest_files(tmp_path)) <= 4
    assert read(opened(), range(24)) == [True] * 24


def test_a_damaged_encoded_block_is_dropped_and_those_behind_it_are_read(opened, tmp_path):
    store = opened(codec=BFLOAT16)
    write(store, range(6))
    records = {n: store._index.places([name_of(n)])[0].record for n in range(6)}
    (path,) = object_files(tmp_path)
    flip(path, records[1].offset + HEADER_BYTES + 9)  # what is plain of it
    flip(path, records[3].end - 9)  # its frame
    flip(path, records[5].offset + 6)  # the codec in its header
    assert read(store, range(6)) == [True, False, True, False, True, False]
    assert store.stats()["kvray_remote_damaged_blocks_total"] == 3
    write(store, range(6))
    assert read(store, range(6)) == [True] * 6


def test_an_encoded_object_cut_short_is_noticed(opened, tmp_path):
    store = opened(codec=BFLOAT16)
    write(store, [1, 3])
    (path,) = object_files(tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    assert read(store, [1, 3]) == [True, False]


def test_blocks_of_an_unknown_codec_are_counted_not_found_and_stay_for_those_who_know_it(
    opened, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(manifests, "MIN_MERGED", 2)
    monkeypatch.setattr(manifests, "MAX_MERGED", 2)
    newer = opened(codec=BFLOAT16)
    write(newer, range(4))
    newer.sync(DEADLINE_S)
    objects = object_files(tmp_path)
    with monkeypatch.context() as patched:  # a process that knows one codec less
        patched.setattr(layout, "LOSSLESS", (PLAIN,))
        older = opened()
        assert held(older, range(4)) == [0, 2]
        assert older.stats()["kvray_remote_unknown_codec_blocks_total"] == 2
        assert [line for line in caplog.messages if "2 blocks of an unknown codec are not used" in line]
        assert read(older, range(4)) == [True, False, True, False]
        for number in (10, 12):  # and merges manifests
            write(older, [number])
            older.sync(DEADLINE_S)
        assert older.stats()["kvray_remote_errors_total"] == older.stats()["kvray_remote_damaged_blocks_total"] == 0
    assert set(objects) < set(object_files(tmp_path))
    assert len(manifest_files(tmp_path)) == 1
    assert read(opened(), [*range(4), 10, 12]) == [True] * 6


def test_blocks_kept_with_a_loss_have_the_checksum_of_what_is_served_and_are_for_none_but_who_asked(opened, tmp_path):
    lossy_model = MODEL._replace(numbers=BlockNumbers("bfloat16", 20, ((5, 25),)))
    assert lossy_model.numbers.num_numbers * 2 == BLOCK_BYTES
    store = opened(model=lossy_model, codec=INT8)
    numbers = [1, 3, 5]  # like KV; of others some numbers are infinite
    write(store, numbers)
    (path,) = object_files(tmp_path)
    assert path.stat().st_size == 3 * (HEADER_BYTES + 2 * 125 + BLOCK_BYTES // 2)
    served = {}
    for number in numbers:
        target = bytearray(BLOCK_BYTES)
        assert store.read([name_of(number)], [memoryview(target)], DEADLINE_S) == [True]
        assert target != content_of(number)
        assert store.find(name_of(number)) == block_of(number)._replace(checksum=checksum(target))
        served[number] = target
    store.sync(DEADLINE_S)
    other, exact = opened(model=lossy_model, codec=INT8), opened(codec=BFLOAT16)
    target = bytearray(BLOCK_BYTES)
    assert other.read([name_of(3)], [memoryview(target)], DEADLINE_S) == [True]
    assert target == served[3]
    assert held(exact, numbers) == []
    assert exact.stats()["kvray_remote_unknown_codec_blocks_total"] == 3
    flip(path, path.stat().st_size - 1)
    assert store.read([name_of(5)], [memoryview(target)], DEADLINE_S) == [False]


# ------------------------------------------------------------------------------------------------------ other folders


def test_folders_of_others_are_told_with_the_reason_and_left_alone(opened, tmp_path, caplog):
    others = {
        "another model": MODEL._replace(fingerprint=b"\x01" * 32),
        "layout 2 with blocks of 5000 bytes": MODEL._replace(layout_version=2),
        "layout 1 with blocks of 6000 bytes": MODEL._replace(block_bytes=6000),
        "another kernel path, cpu/other, wanted cpu/plain": MODEL._replace(kernel_path="cpu/other"),
        "no folder of a remote store": None,
    }
    for model in others.values():
        if model is None:
            (tmp_path / "notes").mkdir()
        else:
            open_store(tmp_path, model).close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.clear()
    store = opened()
    reasons = {unusable.name: unusable.reason for unusable in store.unusable}
    for words, model in others.items():
        assert words in reasons[model.folder_name if model else "notes"]
    assert len([line for line in caplog.messages if "is not used" in line]) == len(others)
    assert store.stats()["kvray_remote_unusable_folders"] == len(others)
    write(store, [1])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert held(opened(model=MODEL._replace(kernel_path="cpu/other")), [1]) == []


def test_a_folder_that_says_to_be_for_others_is_not_used(opened, tmp_path):
    opened().close()
    path = folder(tmp_path) / "description.json"
    path.write_bytes(path.read_bytes().replace(b"cpu/plain", b"cpu/other"))
    store = opened()
    with pytest.raises(StoreError, match=r"says to be for .*cpu/other"):
        read(store, [1])
    assert b"cpu/other" in path.read_bytes()


def test_a_description_that_is_not_whole_is_written_anew(opened, tmp_path):
    opened().close()
    path = folder(tmp_path) / "description.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    write(opened(), [1])
    assert path.read_bytes() == whole


# -------------------------------------------------------------------------------------------------------------- damage


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_block_whose_bytes_changed_is_dropped_and_the_others_are_read(opened, tmp_path):
    store = opened()
    write(store, range(4))
    (path,) = object_files(tmp_path)
    flip(path, 2 * MODEL.record_bytes + 200)
    flip(path, MODEL.record_bytes + 40)  # a header
    assert read(store, range(4)) == [True, False, False, True]
    assert held(store, range(4)) == [0, 3]
    assert store.stats()["kvray_remote_damaged_blocks_total"] == 2
    write(store, range(4))
    assert read(store, range(4)) == [True] * 4


def test_what_was_dropped_is_dropped_for_all_and_may_come_again(opened, tmp_path):
    store, other = opened(), opened()
    write(store, range(3))
    store.sync(DEADLINE_S)
    other.sync(DEADLINE_S)
    (path,) = object_files(tmp_path)
    path.write_bytes(b"")  # as a write that failed may leave it
    assert read(store, range(3)) == [False] * 3
    write(store, range(3))  # the same object, whole again
    assert object_files(tmp_path) == [path]
    for each in (store, other):
        each.sync(DEADLINE_S)
    for each in (store, other, opened()):
        assert read(each, range(3)) == [True] * 3


@pytest.mark.parametrize("length", [0, 100, 128 + BLOCK_BYTES, 2 * (128 + BLOCK_BYTES) - 1])
def test_of_an_object_that_was_cut_short_the_whole_blocks_are_read(opened, tmp_path, length):
    store = opened()
    write(store, range(2))
    (path,) = object_files(tmp_path)
    os.truncate(path, length)
    assert read(store, [1, 0]) == [False, length >= MODEL.record_bytes]


def test_an_object_with_anothers_bytes_is_noticed(opened, tmp_path):
    store = opened()
    write(store, [1])
    (path,) = object_files(tmp_path)
    write(store, [2])
    (other,) = set(object_files(tmp_path)) - {path}
    shutil.copy(other, path)
    assert read(store, [1, 2]) == [False, True]


def test_a_missing_object_is_dropped(opened, tmp_path):
    store = opened()
    write(store, [1])
    (path,) = object_files(tmp_path)
    write(store, [2])
    path.unlink()
    assert read(store, [1, 2]) == [False, True]
    assert held(store, [1, 2]) == [2]
    assert store.stats()["kvray_remote_missing_blocks_total"] == 1
    store.sync(DEADLINE_S)
    assert held(opened(), [1, 2]) == [2]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "long"])
def test_a_damaged_manifest_is_told_once_and_its_blocks_are_not_found(opened, tmp_path, caplog, damage):
    store = opened()
    write(store, [1])
    store.sync(DEADLINE_S)
    (path,) = manifest_files(tmp_path)
    write(store, [2])
    store.close()
    data = path.read_bytes()
    match damage:
        case "flip":
            flip(path, len(data) // 2)
        case "cut":
            path.write_bytes(data[:-20])
        case "empty":
            path.write_bytes(b"")
        case "long":
            os.truncate(path, manifests.MAX_MANIFEST_BYTES + 1)
    other = opened()
    other.sync(DEADLINE_S)
    assert held(other, [1, 2]) == [2]
    assert len([line for line in caplog.messages if f"manifest {path.name} is not used: it has" in line]) == 1
    assert other.stats()["kvray_remote_damaged_manifests_total"] == 1
    path.write_bytes(data)
    other.sync(DEADLINE_S)
    assert held(other, [1, 2]) == [1, 2]


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_directory_that_is_gone_is_no_loss_of_blocks_and_comes_back(opened, tmp_path):
    root = tmp_path / "bucket"
    store = opened(root)
    write(store, range(3))
    store.sync(DEADLINE_S)
    root.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="the bucket or directory is gone, or was emptied"):
        read(store, range(3))
    assert held(store, range(3)) == [0, 1, 2]
    (tmp_path / "away").rename(root)
    store.sync(DEADLINE_S)
    assert read(store, range(3)) == [True] * 3


@pytest.mark.slow
def test_a_directory_that_was_deleted_is_made_anew(opened, tmp_path):
    root = tmp_path / "bucket"
    store = opened(root)
    write(store, range(3))
    shutil.rmtree(root)
    with pytest.raises(StoreError, match="gone"):
        read(store, range(3))
    store.sync(DEADLINE_S)
    assert read(store, range(3)) == [False] * 3
    write(store, range(3))
    assert read(store, range(3)) == [True] * 3


def test_a_place_without_its_parent_is_waited_for(opened, tmp_path, caplog):
    root = tmp_path / "not" / "mounted"
    store = opened(root)
    with pytest.raises(StoreError, match=f"reading {root} is given up for now: .*there is no such directory"):
        read(store, [1])
    assert store.stats()["kvray_remote_is_readable"] == 0
    root.parent.mkdir()
    store.sync(DEADLINE_S)
    write(store, [1])
    assert read(store, [1]) == [True]
    assert [line for line in caplog.messages if line == f"reading {root} works again"]


@pytest.mark.slow
def test_failed_writes_take_writing_out_of_the_plan_until_one_works(opened, tmp_path):
    store = opened()
    objects = folder(tmp_path) / "objects"
    write(store, [1])
    objects.rename(tmp_path / "away")
    objects.write_text("no directory")
    for number in range(2, 5):
        with pytest.raises(StoreError, match=r"NotADirectoryError"):
            write(store, [number])
    with pytest.raises(StoreError, match=r"writing .* is given up for now"):
        write(store, [5])
    assert held(store, range(10)) == [1]
    objects.unlink()
    (tmp_path / "away").rename(objects)
    store.sync(DEADLINE_S)
    write(store, [5])
    assert read(store, [1, 5]) == [True, True]
    assert list((folder(tmp_path) / "unfinished").iterdir()) == []


def test_reads_that_hang_hold_nobody_beyond_the_deadline_and_are_refused_once_all_do(opened, tmp_path):
    store = opened()
    for number in range(9):
        write(store, [number])
    paths = object_files(tmp_path)
    contents = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
        os.mkfifo(path)  # to open it hangs until a writer comes
    try:
        with pytest.raises(StoreError, match=r"has not answered within 0.2 s"):
            read(store, range(9), deadline_s=0.2)
        with pytest.raises(StoreError, match=r"reading .* is given up for now: .* has not answered within 0.2 s"):
            read(store, range(9))
        assert held(store, range(9)) == list(range(9))
        assert store.stats()["kvray_remote_timeouts_total"] == 1
    finally:
        for path, content in contents.items():
            if path.is_fifo():
                with contextlib.suppress(OSError):  # nobody reads it
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                path.unlink()
            path.write_bytes(content)
    store.sync(DEADLINE_S)
    while store._readers.are_hanging:  # their calls return now
        time.sleep(0.001)
    assert read(store, range(9)) == [True] * 9


def test_what_a_process_left_unfinished_is_deleted_in_time(opened, tmp_path):
    opened().close()
    old, new = (folder(tmp_path) / "unfinished" / name for name in ("old", "new"))
    for path in (old, new):
        path.write_text("part")
    os.utime(old, (0, 0))
    opened()
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nonsense://bucket", "nonsense"),
        ("s3://", "no bucket in the URI; wanted s3://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/x?region=a&retries=3", "options retries in the URI"),
    ],
)
def test_a_uri_that_is_none_is_refused_without_its_secret(uri, words):
    with pytest.raises(ConfigError, match=words) as caught:
        RemoteStore(uri, MODEL)
    assert "secret" not in str(caught.value)


def test_a_file_uri_is_a_directory(opened, tmp_path):
    write(opened(f"file://{tmp_path}"), [1])
    assert len(object_files(tmp_path)) == 1


def test_a_name_of_another_length_of_tokens_is_another_object(opened, tmp_path):
    first, second = opened(), opened()
    write(first, [1])
    second.write([StoredBlock(name_of(1), 5, block_of(1).checksum)], [content_of(1)], DEADLINE_S)
    assert len(object_files(tmp_path)) == 2
