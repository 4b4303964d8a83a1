import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest

import transport.shm
from messages.handoff import RegionInfo
from transport.checksum import checksum, copy_all_checked
from transport.memory import Memory
from transport.protocol import Copies, Copy, Link, RegionError, TransferError
from transport.shm import ShmTransport, batches

OWNER = """
import sys, msgspec
from transport.memory import Memory
from transport.shm import ShmTransport
memory = Memory.allocate(1 << 20)
memory.view[:] = bytes(range(256)) * 4096
sys.stdout.buffer.write(msgspec.json.encode(ShmTransport().register(memory)) + b"\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def owner():
    """A process that registered 1 MiB, and the region's description."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield process, msgspec.json.decode(process.stdout.readline(), type=RegionInfo)
    process.kill()
    process.communicate()


@pytest.fixture
def link():
    return Link(lambda road, body: True)


@pytest.fixture
def shm():
    transport = ShmTransport()
    yield transport
    transport.close()


@pytest.fixture
def target():
    memory = Memory.allocate(64 << 20)
    yield memory
    memory.close()


async def test_bytes_come_out_of_another_process(owner, shm, target, link):
    await shm.pull(link, owner[1], [Copy(0, 4096, 1 << 20)], target, stall_s=5)
    assert target.view[4096 : 4096 + (1 << 20)] == bytes(range(256)) * 4096


async def test_killed_owner_cannot_be_opened_anew(owner, shm, target, link):
    process, region = owner
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(RegionError, match="cannot be opened"):
        await shm.pull(link, region, [Copy(0, 0, 10)], target, stall_s=5)
    assert target.view[:10] == bytes(10)


async def test_killed_owner_leaves_opened_memory_readable_until_forgotten(owner, shm, target, link):
    process, region = owner
    await shm.pull(link, region, [Copy(0, 0, 10)], target, stall_s=5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    await shm.pull(link, region, [Copy(0, 100, 1 << 20)], target, stall_s=5)
    assert target.view[100 : 100 + (1 << 20)] == bytes(range(256)) * 4096
    shm.on_link_lost(link)
    with pytest.raises(RegionError):
        await shm.pull(link, region, [Copy(0, 0, 10)], target, stall_s=5)


async def test_stopped_owner_is_read_all_the_same(owner, shm, target, link):
    process, region = owner
    os.kill(process.pid, signal.SIGSTOP)
    await shm.pull(link, region, [Copy(256, 0, 256)], target, stall_s=5)
    assert target.view[:256] == bytes(range(256))


async def test_owner_on_another_node_is_refused(shm, target, monkeypatch, link):
    region = shm.register(target)
    monkeypatch.setattr(transport.shm, "_node_identity", lambda: "elsewhere")
    with pytest.raises(RegionError, match="another node"):
        await shm.pull(link, region, [Copy(0, 10, 10)], target, stall_s=5)


def in_pieces(delays_s):
    """Copy a MiB at a time, and wait before each."""

    def copy(target, source, copies, watch):
        for begin, into, length in copies:
            for done in range(0, length, 1 << 20):
                time.sleep(next(delays_s))
                piece = Copy(begin + done, into + done, min(1 << 20, length - done))
                if not copy_all_checked(target, source, [piece], watch):
                    return []
        return [0] * len(copies)

    return copy


@pytest.fixture
def slow_copies(monkeypatch):
    """Each MiB takes 20 ms longer, as on a machine that is very busy."""
    monkeypatch.setattr(transport.shm, "copy_all_checked", in_pieces(itertools.repeat(0.02)))


@pytest.fixture
def stuck_copies(monkeypatch):
    """The second MiB takes longer than anyone waits."""
    delays_s = itertools.chain([0, 0.5], itertools.repeat(0))
    monkeypatch.setattr(transport.shm, "copy_all_checked", in_pieces(delays_s))


@pytest.fixture
def source():
    memory = Memory.allocate(64 << 20)
    memory.view[:] = b"\xff" * (64 << 20)
    yield memory
    memory.close()


@pytest.mark.slow
async def test_a_pull_that_sticks_has_stopped_writing_when_it_returns(shm, source, target, stuck_copies, link):
    with pytest.raises(TransferError, match="given up"):
        await shm.pull(link, shm.register(source), [Copy(0, 0, 64 << 20)], target, stall_s=0.1)
    await _assert_nothing_more_lands(target)


@pytest.mark.slow
async def test_a_slow_pull_that_goes_on_is_not_given_up(shm, source, target, slow_copies, link):
    await shm.pull(link, shm.register(source), [Copy(0, 0, 32 << 20)], target, stall_s=0.6)
    assert bytes(target.view[: 32 << 20]).count(0xFF) == 32 << 20


@pytest.mark.slow
async def test_cancelled_pull_has_stopped_writing_when_it_returns(shm, source, target, slow_copies, link):
    task = asyncio.create_task(shm.pull(link, shm.register(source), [Copy(0, 0, 64 << 20)], target, stall_s=60))
    await asyncio.sleep(0.1)
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _assert_nothing_more_lands(target)


async def test_pull_waiting_behind_others_keeps_its_own_deadline(shm, source, target, slow_copies, link):
    region = shm.register(source)
    others = [asyncio.create_task(shm.pull(link, region, [Copy(0, 0, 64 << 20)], target, 60)) for _ in range(2)]
    await asyncio.sleep(0.05)
    started = time.monotonic()
    with pytest.raises(TransferError) as caught:
        await shm.pull(link, region, [Copy(0, 0, 16 << 20)], target, stall_s=0.1)
    assert caught.value.is_busy
    assert time.monotonic() - started < 0.5
    shm.close()
    for outcome in await asyncio.gather(*others, return_exceptions=True):
        assert isinstance(outcome, TransferError)


@pytest.mark.alone  # with others on the cores the loop may get none for the 0.1 s that it takes
async def test_loop_goes_on_while_much_is_copied(shm, source, target, link):
    await shm.pull(link, shm.register(source), [Copy(0, 0, 64 << 20)], target, stall_s=30)  # touches all pages
    pull = asyncio.create_task(shm.pull(link, shm.register(source), [Copy(0, 0, 64 << 20)] * 8, target, stall_s=30))
    turns = 0
    while not pull.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 20


async def test_each_copy_is_told_with_the_checksum_of_what_was_written(shm, source, target, link):
    copies = [Copy(0, 0, 5 << 20), Copy(3, 6 << 20, 100), Copy(0, 7 << 20, 4 << 20), Copy(0, 12 << 20, 0)]
    told = {}
    await shm.pull(
        link, shm.register(source), copies, target, 5, lambda position, value: told.update({position: value})
    )
    assert told == {i: checksum(target.view[into : into + length]) for i, (_, into, length) in enumerate(copies)}


def test_batches_are_the_same_copies_in_order():
    copies = Copies.of([Copy(0, 0, size) for size in (4, 4, 3, 25, 0, 10, 1)])
    assert [[copy.num_bytes for copy in batch] for batch in batches(copies, 10)] == [[4, 4], [3], [25], [0, 10], [1]]
    assert list(batches(copies[:0], 10)) == []


async def _assert_nothing_more_lands(target):
    num_landed = bytes(target.view).count(0xFF)
    assert num_landed < 64 << 20
    await asyncio.sleep(0.2)
    assert bytes(target.view).count(0xFF) == num_landed
