"""A remote store on OpenStack Swift's S3 API: a real object server, killed, stopped, full, and closed to us."""

from __future__ import annotations

import socket
import time

import pyarrow.fs
import pytest

from nodecache.codec import PLAIN, lossless_codec
from nodecache.store import StoreError
from tests.nodecache.remote.blocks import (
    DEADLINE_S,
    MODEL,
    block_of,
    content_of,
    held,
    name_of,
    open_store,
    read,
    write,
)
from tests.nodecache.remote.conftest import DISK_BYTES
from tests.nodecache.remote.swift import READER, WRITER

LARGE = MODEL._replace(block_bytes=3 << 20)


@pytest.fixture
def opened():
    stores = []

    def open_next(uri, model=MODEL, codec=PLAIN):
        stores.append(open_store(uri, model, codec))
        return stores[-1]

    yield open_next
    for store in stores:
        store.check_invariants()
        store.close()


def keys(swift, bucket):
    """All objects of a bucket, by their last name, and how long they are."""
    infos = swift.raw().get_file_info(pyarrow.fs.FileSelector(bucket, recursive=True))
    return {info.base_name: info.size for info in infos if info.type == pyarrow.fs.FileType.File}


def path_of(bucket, *names):
    return "/".join((bucket, "cache", MODEL.folder_name, *names))


def put(swift, path, data):
    with swift.raw().open_output_stream(path, compression=None) as stream:
        stream.write(data)


def in_time(call):
    """Make a call again until the server, which was just brought back, serves it."""
    end_s = time.monotonic() + 60
    while True:
        try:
            return call()
        except StoreError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)


def brought_back(store):
    in_time(lambda: store.sync(DEADLINE_S))


# ------------------------------------------------------------------------------------------------------ as it should be


@pytest.mark.slow
@pytest.mark.parametrize("codec", [PLAIN, lossless_codec(2)])
def test_what_one_cluster_wrote_another_reads(swift, bucket, opened, codec):
    store, other = opened(swift.uri(bucket), codec=codec), opened(swift.uri(bucket))
    write(store, range(20))
    assert read(store, range(21)) == [True] * 20 + [False]
    store.sync(DEADLINE_S)
    other.sync(DEADLINE_S)
    assert other.find(name_of(3)) == block_of(3)
    assert read(other, range(20)) == [True] * 20
    assert len([key for key in keys(swift, bucket) if key.endswith(".arrow")]) == 1
    assert read(opened(swift.uri(bucket)), range(20)) == [True] * 20


@pytest.mark.slow
def test_a_long_chain_is_several_objects_read_side_by_side(swift, bucket, opened):
    store = opened(swift.uri(bucket), LARGE)
    write(store, range(7), block_bytes=LARGE.block_bytes)
    assert store.stats()["kvray_remote_objects"] == 4
    assert read(store, range(7), block_bytes=LARGE.block_bytes) == [True] * 7


@pytest.mark.slow
def test_what_was_removed_is_gone_and_its_object_too(swift, bucket, opened):
    store = opened(swift.uri(bucket))
    write(store, [1, 2])
    write(store, [3])
    store.sync(DEADLINE_S)
    before = keys(swift, bucket)
    store.remove([name_of(1), name_of(2)])
    store.sync(DEADLINE_S)
    assert MODEL.record_bytes * 2 in before.values()
    assert MODEL.record_bytes * 2 not in keys(swift, bucket).values()
    assert held(opened(swift.uri(bucket)), range(4)) == [3]


@pytest.mark.slow
def test_folders_of_others_are_told(swift, bucket, opened):
    opened(swift.uri(bucket), MODEL._replace(kernel_path="cpu/other"))
    store = opened(swift.uri(bucket))
    (unusable,) = store.unusable
    assert unusable.reason == "it is of another kernel path, cpu/other, wanted cpu/plain"


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 128 + 5000])
def test_a_part_of_an_object_under_its_name_is_noticed_and_written_over(swift, bucket, opened, length):
    store = opened(swift.uri(bucket))
    write(store, range(2))
    (digest,) = [key for key, size in keys(swift, bucket).items() if size == 2 * MODEL.record_bytes]
    path = path_of(bucket, "objects", digest)
    whole = swift.raw().open_input_file(path).read()
    put(swift, path, whole[:length])
    assert read(store, range(2)) == [length > 0, False]
    store.remove([name_of(0)])
    write(store, range(2))
    assert swift.raw().open_input_file(path).read() == whole
    assert read(store, range(2)) == [True, True]


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.slow
@pytest.mark.parametrize("service", ["proxy", "object"])
def test_a_server_that_is_killed_is_out_of_the_plan_until_it_is_back(swift, bucket, opened, service):
    store = opened(swift.uri(bucket))
    write(store, range(3))
    store.sync(DEADLINE_S)
    swift.kill(service)
    try:
        for _ in range(3):
            with pytest.raises(StoreError):
                read(store, range(3))
            with pytest.raises(StoreError):
                write(store, [7])
        with pytest.raises(StoreError, match=r"reading s3://\S+ is given up for now"):
            read(store, range(3))
        with pytest.raises(StoreError, match="given up for now"):
            write(store, [7])
        assert store.stats()["kvray_remote_is_readable"] == 0
        assert held(store, range(8)) == [0, 1, 2]
        other = opened(swift.uri(bucket))
        with pytest.raises(StoreError, match="given up for now"):
            read(other, [1])
    finally:
        swift.start(service)
        swift.wait_until_ready()
    brought_back(store)
    brought_back(other)
    assert read(store, range(3)) == read(other, range(3)) == [True] * 3
    write(store, [7])
    assert read(store, [7]) == [True]


@pytest.mark.slow
def test_a_server_that_accepts_and_never_answers_holds_nobody_beyond_the_deadline(swift, bucket, opened):
    store = opened(swift.uri(bucket))
    write(store, range(3))
    store.sync(DEADLINE_S)
    swift.stop("proxy")
    try:
        with pytest.raises(StoreError, match=r"s3://\S+ has not answered within 0.5 s"):
            read(store, range(3), deadline_s=0.5)
        with pytest.raises(StoreError, match=r"has not answered within 0.5 s"):
            write(store, [7], deadline_s=0.5)
        for _ in range(2):
            with pytest.raises(StoreError):
                read(store, range(3), deadline_s=0.1)
        with pytest.raises(StoreError, match=r"reading .* is given up for now"):
            read(store, range(3))
        assert held(store, [7]) == []
        assert store.stats()["kvray_remote_timeouts_total"] >= 2
    finally:
        swift.go_on("proxy")
    brought_back(store)
    assert read(store, range(3)) == [True] * 3
    write(store, [7])
    assert read(store, [7]) == [True]


@pytest.mark.slow
def test_a_full_server_fails_writes_and_comes_back(swift, bucket, opened):
    if not swift.devices.is_mount():
        pytest.skip("no small disk could be mounted for the server")
    store = opened(swift.uri(bucket), LARGE)
    write(store, range(2), block_bytes=LARGE.block_bytes)
    store.sync(DEADLINE_S)
    filler = swift.devices / "filler"
    try:
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(DISK_BYTES))
        with pytest.raises(StoreError):
            write(store, range(2, 4), block_bytes=LARGE.block_bytes)
        assert held(store, range(4)) == [0, 1]
    finally:
        filler.unlink()
    brought_back(store)
    in_time(lambda: write(store, range(2, 4), block_bytes=LARGE.block_bytes))
    assert read(store, range(4), block_bytes=LARGE.block_bytes) == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("user", [(WRITER[0], "wrong"), ("kv:nobody", "secretsecret")])
def test_wrong_keys_are_told_and_take_the_store_out_at_once(swift, bucket, opened, user, caplog):
    store = opened(swift.uri(bucket, user))
    with pytest.raises(StoreError, match=r"reading .* is given up for now: .*(ACCESS_DENIED|SIGNATURE)"):
        read(store, [1])
    store.stats()
    assert len([line for line in caplog.messages if "given up" in line]) == 1
    assert user[1] not in caplog.text


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_waited_for(swift, bucket, opened):
    store = opened(swift.uri(f"{bucket}-later"))
    with pytest.raises(StoreError, match="NO_SUCH_BUCKET"):
        read(store, [1])
    raw = swift.raw()
    raw.create_dir(f"{bucket}-later")
    brought_back(store)
    write(store, [1])
    assert read(store, [1]) == [True]
    store.close()
    raw.delete_dir_contents(f"{bucket}-later")
    raw.delete_dir(f"{bucket}-later")


@pytest.mark.slow
def test_a_bucket_that_is_gone_is_no_missing_object(swift, bucket, opened):
    store = opened(swift.uri(bucket))
    write(store, range(3))
    store.sync(DEADLINE_S)
    raw = swift.raw()
    raw.delete_dir_contents(bucket)
    raw.delete_dir(bucket)
    try:
        with pytest.raises(StoreError, match="the bucket or directory is gone, or was emptied"):
            read(store, range(3))
        assert held(store, range(3)) == [0, 1, 2]
    finally:
        raw.create_dir(bucket)
    brought_back(store)
    assert read(store, range(3)) == [False] * 3
    write(store, range(3))
    assert read(store, range(3)) == [True] * 3


@pytest.mark.slow
def test_who_may_only_read_reads(swift, bucket, opened, caplog):
    store = opened(swift.uri(bucket))
    write(store, range(3))
    store.sync(DEADLINE_S)
    swift.let_read(bucket)
    reader = opened(swift.uri(bucket, READER))
    assert read(reader, range(3)) == [True] * 3
    for _ in range(3):
        with pytest.raises(StoreError, match="ACCESS_DENIED"):
            write(reader, [7])
    assert len([line for line in caplog.messages if line.startswith("writing ") and "given up" in line]) == 1
    assert reader.stats()["kvray_remote_is_writable"] == 0
    assert reader.stats()["kvray_remote_is_readable"] == 1
    reader.remove([name_of(0)])
    assert held(reader, range(3)) == [1, 2]
    assert read(store, range(3)) == [True] * 3
    write(store, [8])
    store.sync(DEADLINE_S)
    reader.remove([name_of(1)])
    with pytest.raises(StoreError, match="ACCESS_DENIED"):
        reader.sync(DEADLINE_S)
    assert read(reader, [8]) == [True]


@pytest.mark.slow
def test_a_writer_with_a_folder_nobody_made_yet_may_be_a_reader(swift, bucket, opened):
    swift.let_read(bucket)
    reader = opened(swift.uri(bucket, READER))
    assert read(reader, [1]) == [False]
    store = opened(swift.uri(bucket))
    write(store, [1])
    store.sync(DEADLINE_S)
    reader.sync(DEADLINE_S)
    assert read(reader, [1]) == [True]


# ----------------------------------------------------------------------------------------------------- without a server


def test_nobody_listening_is_out_of_the_plan_and_no_error_at_the_start(opened):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = opened(f"s3://key:secret@bucket/cache?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}")
    with pytest.raises(StoreError, match="NETWORK_CONNECTION"):
        store.read([name_of(1)], [memoryview(bytearray(len(content_of(1))))], DEADLINE_S)
