import contextlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import transport.memory
from messages.errors import ConfigError
from transport.memory import Memory, SharedView, available_bytes, total_bytes


@pytest.fixture
def memory():
    allocated = Memory.allocate(10_000)
    yield allocated
    allocated.close()


def test_view_is_zeroed_writable_page_aligned_and_exactly_as_long(memory):
    assert memory.view.nbytes == 10_000
    assert bytes(memory.view) == bytes(10_000)
    memory.view[9_999] = 7
    assert np.frombuffer(memory.view, np.uint8).ctypes.data % mmap.PAGESIZE == 0


def test_every_page_is_reserved_at_once():
    memory = Memory.allocate(3 << 20)
    assert os.fstat(memory.fd).st_blocks * 512 >= 3 << 20
    memory.close()


@pytest.mark.parametrize("num_bytes", [0, -1, 1 << 60])
def test_impossible_size_is_a_config_error_that_names_it(num_bytes):
    with pytest.raises(ConfigError, match=f"{num_bytes:,}"):
        Memory.allocate(num_bytes)


def test_memory_beyond_what_is_available_is_refused_before_it_is_touched(monkeypatch):
    monkeypatch.setattr(transport.memory, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="1,000 bytes are available"):
        Memory.allocate(1001)


@pytest.mark.parametrize(
    ("folder", "limit", "used", "idle"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["cgroup 2", "cgroup 1"],
)
def test_the_containers_limit_bounds_what_there_is_and_what_is_available(
    monkeypatch, tmp_path, folder, limit, used, idle
):
    monkeypatch.setattr(transport.memory, "_CGROUP", tmp_path)
    without = available_bytes(), total_bytes()
    files = tmp_path / folder
    files.mkdir(exist_ok=True)
    (files / limit).write_text("1000000\n")
    (files / used).write_text("700000\n")
    (files / "memory.stat").write_text(f"anon 300000\n{idle} 50000\n")
    assert (available_bytes(), total_bytes()) == (350_000, 1_000_000)
    (files / used).write_text("2000000\n")
    assert available_bytes() == 0
    (files / limit).write_text("max\n")
    assert (available_bytes(), total_bytes()) == (pytest.approx(without[0], rel=0.5), without[1])


def open_memory_files() -> set[str]:
    """This process's descriptors of memory files."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if "memfd:kvray" in str(link.readlink()):
                found.add(link.name)
    return found


def test_kernel_that_refuses_is_a_config_error_and_leaves_no_file(monkeypatch):
    def refuse(fd, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = open_memory_files()
    with pytest.raises(ConfigError, match="No space left"):
        Memory.allocate(4096)
    assert open_memory_files() <= before


def test_size_cannot_change_under_a_reader(memory):
    with pytest.raises(PermissionError):
        os.truncate(memory.fd, 4096)


def test_unpublished_memory_cannot_be_opened(memory):
    with pytest.raises(ValueError, match="nonce"):
        SharedView.open(os.getpid(), memory.fd, memory.num_bytes, memory.nonce)


def test_reader_sees_writes_and_cannot_write(memory):
    memory.publish()
    opened = SharedView.open(os.getpid(), memory.fd, memory.num_bytes, memory.nonce)
    memory.view[5] = 9
    assert opened.view[5] == 9
    assert opened.view.readonly
    memory.withdraw()
    assert not opened.is_current()


def test_whoever_may_write_is_seen_by_the_owner_and_by_readers(memory):
    memory.publish()
    writer = SharedView.open(os.getpid(), memory.fd, memory.num_bytes, memory.nonce, is_writable=True)
    reader = SharedView.open(os.getpid(), memory.fd, memory.num_bytes, memory.nonce)
    writer.view[:4] = b"mine"
    assert bytes(memory.view[:4]) == bytes(reader.view[:4]) == b"mine"


def test_a_tail_is_reserved_and_no_peer_maps_it():
    memory = Memory.allocate(10_000, tail_bytes=5_000)
    memory.publish()
    memory.tail[:] = b"t" * 5_000
    opened = SharedView.open(os.getpid(), memory.fd, memory.num_bytes, memory.nonce, is_writable=True)
    assert len(opened._mapping) == 12_288 + mmap.PAGESIZE
    assert bytes(memory.view) == bytes(10_000)
    assert np.frombuffer(memory.tail, np.uint8).ctypes.data % mmap.PAGESIZE == 0
    memory.close()


def test_adopted_memory_has_the_bytes_and_another_nonce_that_earlier_readers_notice():
    memory = Memory.allocate(10_000, tail_bytes=100)
    memory.publish()
    memory.view[:4], memory.tail[:4] = b"data", b"tail"
    reader = SharedView.open(os.getpid(), memory.fd, memory.num_bytes, memory.nonce)
    adopted = Memory.adopt(os.dup(memory.fd), 10_000, tail_bytes=100)
    assert bytes(adopted.view[:4]) + bytes(adopted.tail[:4]) == b"datatail"
    assert reader.is_current()
    adopted.publish()
    assert not reader.is_current()
    assert bytes(reader.view[:4]) == b"data"
    adopted.close()
    memory.close()


@pytest.mark.parametrize(("num_bytes", "tail_bytes"), [(10_000, 101), (20_000, 100), (10_000, 0)])
def test_memory_of_another_size_is_not_adopted(num_bytes, tail_bytes):
    memory = Memory.allocate(10_000, tail_bytes=100)
    with pytest.raises(ConfigError, match="bytes wanted"):
        Memory.adopt(memory.fd, num_bytes, tail_bytes=tail_bytes)
    memory.close()


def test_a_file_that_could_shrink_is_not_adopted(tmp_path):
    other = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    os.truncate(other, 4 * mmap.PAGESIZE)
    with pytest.raises(ConfigError, match="is not the memory wanted"):
        Memory.adopt(other, 10_000)
    os.close(other)


@pytest.mark.parametrize("kind", ["pipe", "file", "closed"])
def test_descriptor_that_became_something_else_is_refused_without_waiting(memory, tmp_path, kind):
    read_end, write_end = os.pipe()
    other = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    os.truncate(other, 3 * mmap.PAGESIZE + mmap.PAGESIZE)
    fd = {"pipe": read_end, "file": other, "closed": 9999}[kind]
    with pytest.raises((OSError, ValueError)):
        SharedView.open(os.getpid(), fd, memory.num_bytes, memory.nonce)
    for opened in (read_end, write_end, other):
        os.close(opened)


def test_close_frees_the_kernels_memory_once_no_view_is_left():
    memory = Memory.allocate(1 << 20)
    array = np.frombuffer(memory.view, np.uint8)
    fd = memory.fd
    memory.close()
    memory.close()
    assert array[0] == 0  # a view outlives the close
    with pytest.raises(ValueError, match="closed"):
        _ = memory.fd
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.slow
def test_nothing_remains_after_a_process_was_killed():
    def shared_bytes():
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Shmem:")).split()[1]) * 1024

    num_bytes = 512 << 20
    program = f"from transport.memory import Memory; m = Memory.allocate({num_bytes}); print(1, flush=True); input()"
    before = shared_bytes()
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    held = shared_bytes()
    process.kill()
    process.communicate()
    assert held - before > num_bytes / 2
    assert held - shared_bytes() > num_bytes / 2


@pytest.mark.parametrize("is_writable", [False, True])
def test_anothers_memory_is_populated_without_a_change_and_not_once_it_was_withdrawn(is_writable):
    memory = Memory.allocate((5 << 20) + 123)
    memory.view[:4] = b"here"
    memory.publish()
    view = SharedView.open(os.getpid(), memory.fd, memory.num_bytes, memory.nonce, is_writable=is_writable)
    view.populate()
    assert bytes(view.view[:4]) == b"here"
    assert not any(view.view[4:])
    memory.withdraw()
    view.populate()
    memory.close()


def test_populating_changes_no_byte():
    memory = Memory.allocate((5 << 20) + 123)
    memory.view[:4] = b"here"
    memory.view[-4:] = b"last"
    memory.populate()
    assert bytes(memory.view[:4]) + bytes(memory.view[-4:]) == b"herelast"
    assert not any(memory.view[4:-4])
    memory.close()
