"""The socket road: bytes, refusals, ends."""

import asyncio
import os
import random
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

import transport.socket.road
import transport.socket.source
from messages.errors import ConfigError
from tests.served import free_port
from tests.transport.links import wait_until
from tests.transport.socket_peers import (
    BLOCK,
    HOST,
    NUM_BLOCKS,
    PATTERN,
    SIZE,
    expected,
    handle_of,
    owner_process,
    proven_connection,
    request,
)
from transport.memory import Memory
from transport.protocol import Copy, RegionError, TransferError
from transport.socket.frames import ALIGNMENT, REPLY, read_exactly
from transport.socket.road import SocketTransport

# ------------------------------------------------------------------------------------------------------------ the bytes


@pytest.mark.parametrize("num_blocks", [1, 16, 256])
async def test_scattered_blocks_arrive_exactly(owner, puller, link, source, target, num_blocks):
    picked = random.Random(2).sample(range(NUM_BLOCKS), num_blocks)
    places = random.Random(3).sample(range(NUM_BLOCKS), num_blocks)
    copies = [Copy(i * BLOCK, j * BLOCK, BLOCK) for i, j in zip(picked, places, strict=True)]
    told = []
    await puller.pull(link, owner.register(source), copies, target, 5, told.append)
    assert bytes(target.view) == expected(source, copies)
    assert told == list(range(num_blocks))


async def test_odd_sizes_and_offsets_arrive_exactly(owner, puller, link, source, target):
    chance = random.Random(4)
    sizes = [0, 1, 2, 0, 4095, 4097, 1_000_003, 5_000_011, 0, 3] + [chance.randrange(100_000) for _ in range(100)]
    copies, at = [], 1
    for size in sizes:
        copies.append(Copy(chance.randrange(SIZE - size), at, size))
        at += size + chance.choice([0, 1, 13])
    told = []
    await puller.pull(link, owner.register(source), copies, target, 5, told.append)
    assert bytes(target.view) == expected(source, copies)
    assert told == list(range(len(copies)))


@pytest.mark.parametrize("max_ranges", [10_000, 700])
async def test_more_ranges_than_one_call_or_one_request_takes(
    owner, puller, link, source, target, monkeypatch, max_ranges
):
    monkeypatch.setattr(transport.socket.road, "MAX_RANGES", max_ranges)
    places = random.Random(5).sample(range(SIZE // 128), 5000)
    copies = [Copy(i * 128 + 1, (SIZE // 128 - 1 - i) * 128, 99) for i in places]
    told = []
    await puller.pull(link, owner.register(source), copies, target, 5, told.append)
    assert bytes(target.view) == expected(source, copies)
    assert told == list(range(5000))


async def test_a_copy_is_told_when_its_last_byte_is_there(owner, puller, link, source, target):
    copies = [Copy(i * BLOCK, (NUM_BLOCKS - 1 - i) * BLOCK, BLOCK) for i in range(NUM_BLOCKS)]
    wrong = []

    def look(i):
        if target.slice(copies[i].target_offset, BLOCK) != source.slice(copies[i].source_offset, BLOCK):
            wrong.append(i)

    await puller.pull(link, owner.register(source), copies, target, 5, look)
    assert wrong == []


async def test_pulls_at_once_do_not_mix_and_share_a_connection(owner, puller, link, source, target):
    region = owner.register(source)
    copies = [Copy(i * BLOCK, (i ^ 1) * BLOCK, BLOCK) for i in range(NUM_BLOCKS)]
    await asyncio.gather(*(puller.pull(link, region, copies[i::8], target, 5) for i in range(8)))
    assert bytes(target.view) == expected(source, copies)
    assert len(owner._source._connections) == 1


async def test_both_ways_and_from_itself(owner, puller, link, source, target):
    await puller.pull(link, owner.register(source), [Copy(0, 0, BLOCK)], target, 5)
    await owner.pull(link, puller.register(target), [Copy(0, BLOCK, BLOCK)], target, 5)
    await owner.pull(link, owner.register(source), [Copy(0, 2 * BLOCK, BLOCK)], target, 5)
    assert target.view[: 3 * BLOCK] == bytes(source.view[:BLOCK]) * 3


async def test_the_loop_goes_on_during_a_pull(owner, puller, link, source, target):
    copies = [Copy(0, 0, SIZE)]
    pull = asyncio.ensure_future(puller.pull(link, owner.register(source), copies, target, 5))
    turns = 0
    while not pull.done():
        await asyncio.sleep(0)
        turns += 1
    await pull
    assert turns > 20


# ------------------------------------------------------------------------------------------------------------- refusals


async def test_a_refused_pull_writes_nothing_and_keeps_the_connection(owner, puller, link, source, target, make):
    region = owner.register(source)
    other = Memory.allocate(4096)
    await puller.pull(link, region, [Copy(0, 0, 1)], target, 5)
    target.view[0] = 0
    connection = puller._owners[handle_of(region)]._socket
    unknown = make().register(other)
    wrong = [
        type(region)(road="socket", handle=region.handle, num_bytes=unknown.num_bytes, nonce=unknown.nonce),
        type(region)(road="socket", handle=region.handle, num_bytes=SIZE - 1, nonce=region.nonce),
        type(region)(road="socket", handle=region.handle, num_bytes=SIZE + 1, nonce=region.nonce),
    ]
    for description in wrong:
        with pytest.raises(RegionError, match="refused"):
            await puller.pull(link, description, [Copy(0, 0, 4096)], target, 5)
    for nonce, num_bytes in ((b"short", SIZE), (region.nonce, 1 << 64), (region.nonce, -1)):
        description = type(region)(road="socket", handle=region.handle, num_bytes=num_bytes, nonce=nonce)
        with pytest.raises(RegionError):
            await puller.pull(link, description, [], target, 5)
    assert bytes(target.view) == bytes(SIZE)
    await puller.pull(link, region, [Copy(0, 0, 4096)], target, 5)
    assert puller._owners[handle_of(region)]._socket is connection
    other.close()


@pytest.mark.parametrize("bad", [(SIZE, 1), (0, SIZE + 1), (2**64 - 1, 2), (2**63, 2**63), (SIZE - 1, 2)])
async def test_the_source_checks_ranges_itself(owner, source, secret, bad):
    region = owner.register(source)
    with proven_connection(secret, region) as connection:
        connection.sendall(request(region, [(0, 100), bad]))
        pull_id, text_bytes, num_bytes = REPLY.unpack(read_exactly(connection, REPLY.size))
        assert (pull_id, num_bytes, text_bytes % ALIGNMENT) == (7, 0, 0)
        assert b"out of bounds" in read_exactly(connection, text_bytes)
        connection.sendall(request(region, [(5, 100)], pull_id=8))
        assert REPLY.unpack(read_exactly(connection, REPLY.size)) == (8, 0, 100)
        assert read_exactly(connection, 100) == source.view[5:105]


async def test_memory_that_is_not_the_hosts_is_refused(owner, puller, link, source):
    device = SimpleNamespace(is_host=False, num_bytes=4096, nonce=b"\1" * 16)
    with pytest.raises(RegionError, match="host memory"):
        owner.register(device)
    with pytest.raises(RegionError, match="host memory"):
        await puller.pull(link, owner.register(source), [Copy(0, 0, 1)], device, 5)


# ------------------------------------------------------------------------------------------- closing and starting again


async def test_closed_owner_cannot_be_read(owner, puller, link, source, target):
    region = owner.register(source)
    await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)
    owner.close()
    with pytest.raises(TransferError, match="refused"):
        await puller.pull(link, region, [Copy(0, 100, 10)], target, 5)
    assert bytes(target.view[100:110]) == bytes(10)
    with pytest.raises(RegionError, match="closed"):
        owner.register(source)


async def test_a_source_that_closes_under_way_fails_the_pull(owner, puller, link, source, target):
    pull = asyncio.ensure_future(
        puller.pull(link, owner.register(source), [Copy(0, 0, SIZE)] * 20, target, 5, lambda _: owner.close())
    )
    with pytest.raises(TransferError, match=r"closed after|reset"):
        await pull


async def test_a_successor_on_the_same_port_is_not_taken_for_its_forerunner(make, puller, link, source, target):
    port = free_port()
    first = make(port_range=(port, port))
    old = first.register(source)
    await puller.pull(link, old, [Copy(0, 0, 10)], target, 5)
    first.close()
    wait_until(lambda: not first._source._connections)
    second = make(port_range=(port, port))
    new = second.register(source)
    assert handle_of(new).port == port
    with pytest.raises(TransferError, match="another process"):
        await puller.pull(link, old, [Copy(0, 0, 10)], target, 5)
    await puller.pull(link, new, [Copy(0, 100, 10)], target, 5)
    assert target.view[100:110] == source.view[:10]
    assert second.num_refused == 0


def test_listens_on_a_free_port_of_the_range(make):
    with socket.create_server((HOST, 0)) as busy:
        port = busy.getsockname()[1]
        for _ in range(5):
            transport_ = make(port_range=(port - 1, port + 1))
            assert abs(transport_._source.handle.port - port) == 1
            transport_.close()
            wait_until(lambda: not [t for t in threading.enumerate() if t.name == "socket-accept"])
        with pytest.raises(ConfigError, match=f"a port of {port} to {port}"):
            make(port_range=(port, port))


@pytest.mark.parametrize("ports", [(5, 4), (-1, 4), (65000, 65536)])
def test_a_range_that_is_none_is_refused(make, ports):
    with pytest.raises(ConfigError, match="the lower one first"):
        make(port_range=ports)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "198.51.100.1", "no such host"])
def test_listens_only_where_peers_reach_it(secret, host):
    with pytest.raises(ConfigError, match=host):
        SocketTransport(secret, host)


def test_says_what_it_is(owner, link):
    assert (owner.road, owner.is_one_sided, owner.is_direct) == ("socket", False, True)
    assert owner.carriers(link) == "tcp"


# ---------------------------------------------------------------------------------------------------- another process


@pytest.mark.alone
async def test_a_source_stopped_under_way_fails_the_pull_and_writes_nothing_when_it_goes_on(
    secret, puller, link, target
):
    with owner_process(secret, SIZE) as (process, region):
        copies = [Copy(i * BLOCK, i * BLOCK, BLOCK) for i in range(NUM_BLOCKS)] * 8
        stopped_s = []

        def stop(position):
            if position == 40:
                os.kill(process.pid, signal.SIGSTOP)
                stopped_s.append(time.monotonic())

        with pytest.raises(TransferError, match="nothing came"):
            await puller.pull(link, region, copies, target, 0.5, stop)
        assert 0.4 < time.monotonic() - stopped_s[0] < 2
        target.view[:] = bytes([5]) * SIZE
        os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert bytes(target.view) == bytes([5]) * SIZE
        await puller.pull(link, region, [Copy(0, 0, 251)], target, 5)
        assert bytes(target.view[:251]) == PATTERN


@pytest.mark.alone
async def test_a_source_killed_under_way_fails_the_pull_at_once_and_its_successor_serves(secret, puller, link, target):
    port = free_port()
    with owner_process(secret, SIZE, port) as (process, old):
        copies = [Copy(i * BLOCK, i * BLOCK, BLOCK) for i in range(NUM_BLOCKS)] * 8
        killed_s = []

        def kill(position):
            if position == 40:
                os.kill(process.pid, signal.SIGKILL)
                killed_s.append(time.monotonic())

        with pytest.raises(TransferError, match=r"closed after|reset"):
            await puller.pull(link, old, copies, target, 5, kill)
        assert time.monotonic() - killed_s[0] < 1
        process.wait()
    with pytest.raises(TransferError, match="refused"):
        await puller.pull(link, old, [Copy(0, 0, 10)], target, 5)
    with owner_process(secret, SIZE, port) as (_, new):
        with pytest.raises(TransferError, match="another process"):
            await puller.pull(link, old, [Copy(0, 0, 10)], target, 5)
        await puller.pull(link, new, [Copy(0, 0, SIZE)], target, 5)
        assert bytes(target.view[: 251 * 1000]) == PATTERN * 1000
