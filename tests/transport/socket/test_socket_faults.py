"""The socket road against peers that stall, lie or leave."""

import asyncio
import socket
import time

import msgspec
import pytest

from tests.transport.links import wait_until
from tests.transport.socket_peers import (
    BLOCK,
    HOST,
    SIZE,
    grant,
    handle_of,
    nothing_more_lands,
    proven_connection,
    request,
    stall_after,
)
from transport.protocol import Copy, Link, TransferError
from transport.socket.frames import REPLY

pytestmark = pytest.mark.slow


async def test_a_payload_cut_short_is_a_failed_pull(fake, puller, link, source, target):
    def answer(connection, pull_id, num_bytes):
        grant(connection, pull_id, num_bytes)
        connection.sendall(b"\xee" * (BLOCK + 10))
        raise ConnectionError

    told = []
    region = fake(answer).describe(source)
    with pytest.raises(TransferError, match=f"closed after {BLOCK + 10} of {2 * BLOCK} bytes"):
        await puller.pull(link, region, [Copy(0, 0, BLOCK), Copy(BLOCK, SIZE - BLOCK, BLOCK)], target, 5, told.append)
    assert told == [0]


@pytest.mark.parametrize("change", [(1, 0, 0), (0, 0, 1), (0, 0, -1)])
async def test_an_answer_to_something_else_is_not_taken(fake, puller, link, source, target, change):
    def answer(connection, pull_id, num_bytes):
        connection.sendall(REPLY.pack(pull_id + change[0], change[1], num_bytes + change[2]) + b"\xee" * num_bytes)

    with pytest.raises(TransferError, match="something else"):
        await puller.pull(link, fake(answer).describe(source), [Copy(0, 0, 100)], target, 5)
    assert bytes(target.view[:101]) == bytes(101)


@pytest.mark.parametrize("num_sent", [0, 100])
async def test_a_stalled_source_fails_the_pull_in_time_and_the_next_connects_anew(
    fake, puller, link, source, target, num_sent
):
    stalling = fake(stall_after(num_sent))
    for number in (1, 2):
        began_s = time.monotonic()
        with pytest.raises(TransferError, match=r"nothing came .* for 0\.2 s"):
            await puller.pull(link, stalling.describe(source), [Copy(0, 0, BLOCK)], target, 0.2)
        assert 0.15 < time.monotonic() - began_s < 1
        assert stalling.num_connections == number
    await nothing_more_lands(target)


async def test_who_waits_behind_a_stalled_pull_gives_up_in_its_own_time(fake, puller, link, source, target):
    region = fake(stall_after(100)).describe(source)
    first = asyncio.ensure_future(puller.pull(link, region, [Copy(0, 0, BLOCK)], target, 60))
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    with pytest.raises(TransferError, match="not begun"):
        await puller.pull(link, region, [Copy(0, 0, BLOCK)], target, 0.2)
    assert 0.1 < time.monotonic() - began_s < 1
    assert not first.done()
    puller.close()
    with pytest.raises(TransferError, match="the transport was closed"):
        await first


async def test_who_waits_behind_a_slow_pull_has_patience(fake, puller, link, source, target):
    def answer(connection, pull_id, num_bytes):
        grant(connection, pull_id, num_bytes)
        for _ in range(8):
            time.sleep(0.1)
            connection.sendall(b"\xee" * (num_bytes // 8))

    region = fake(answer).describe(source)
    slow = [puller.pull(link, region, [Copy(0, i * 80, 80)], target, 0.4) for i in range(2)]
    await asyncio.gather(*slow)
    assert bytes(target.view[:160]) == b"\xee" * 160


async def test_a_stalled_peer_does_not_hold_up_others(fake, owner, puller, link, source, target):
    region = fake(stall_after(0)).describe(source)
    stalled = [asyncio.ensure_future(puller.pull(link, region, [Copy(0, 0, 10)], target, 60)) for _ in range(20)]
    await asyncio.sleep(0.05)
    await puller.pull(link, owner.register(source), [Copy(0, 0, 100)], target, 5)
    assert target.view[:100] == source.view[:100]
    puller.close()
    assert all(isinstance(e, TransferError) for e in await asyncio.gather(*stalled, return_exceptions=True))


async def test_a_cancelled_pull_has_stopped_when_it_is_over(fake, puller, link, source, target):
    region = fake(stall_after(100)).describe(source)
    pulls = [asyncio.ensure_future(puller.pull(link, region, [Copy(0, 0, BLOCK)], target, 60)) for _ in range(2)]
    await asyncio.sleep(0.1)
    began_s = time.monotonic()
    for pull in (*pulls, *pulls):
        pull.cancel()
    for pull in pulls:
        with pytest.raises(asyncio.CancelledError):
            await pull
    assert time.monotonic() - began_s < 1
    assert puller._pulls == set()
    await nothing_more_lands(target)


async def test_a_pull_cancelled_in_full_flight_has_stopped_when_it_is_over(owner, puller, link, source, target):
    region = owner.register(source)
    num_cancelled = 0
    for delay_s in (0, 0.0005, 0.002, 0.005):
        pull = asyncio.ensure_future(puller.pull(link, region, [Copy(0, 0, SIZE)], target, 5))
        await asyncio.sleep(delay_s)
        num_cancelled += pull.cancel()  # not one that was quick enough
        await asyncio.wait([pull])
        assert pull.cancelled() or pull.exception() is None
        await nothing_more_lands(target, 0.05)
    assert num_cancelled >= 2
    await puller.pull(link, region, [Copy(0, 0, SIZE)], target, 5)
    assert bytes(target.view) == bytes(source.view)


async def test_a_lost_peers_pulls_fail_at_once_and_nobody_elses(fake, owner, puller, link, source, target):
    region = fake(stall_after(0)).describe(source)
    pulls = [asyncio.ensure_future(puller.pull(link, region, [Copy(0, 0, 10)], target, 60)) for _ in range(2)]
    other = Link(lambda road, body: True)
    await puller.pull(other, owner.register(source), [Copy(0, 0, 10)], target, 5)
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    link.is_lost = True
    puller.on_link_lost(link)
    for pull in pulls:
        with pytest.raises(TransferError, match="the peer was lost"):
            await pull
    assert time.monotonic() - began_s < 1
    with pytest.raises(TransferError, match="the peer was lost"):
        await puller.pull(link, region, [Copy(0, 0, 10)], target, 60)
    assert set(puller._owners) == {handle_of(owner.register(source))}
    puller.on_link_lost(other)
    assert not puller._owners
    wait_until(lambda: not owner._source._connections)


async def test_an_error_of_who_is_told_comes_out_of_the_pull(owner, puller, link, source, target):
    region = owner.register(source)

    def refuse(position):
        raise ValueError(f"copy {position} is damaged")

    with pytest.raises(ValueError, match="copy 0 is damaged"):
        await puller.pull(link, region, [Copy(0, 0, BLOCK)] * 2, target, 5, refuse)
    await puller.pull(link, region, [Copy(0, 0, BLOCK)], target, 5)
    assert target.view[:BLOCK] == source.view[:BLOCK]


async def test_a_host_that_does_not_answer_fails_the_pull_in_time_or_when_cancelled(puller, link, source, target, fake):
    """A full backlog drops what knocks, as a host does that is gone."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(0)
        knocking = [socket.socket() for _ in range(3)]
        for one in knocking:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        described = fake(stall_after(0)).describe(source)
        handle = msgspec.structs.replace(handle_of(described), port=listener.getsockname()[1])
        region = msgspec.structs.replace(described, handle=msgspec.msgpack.encode(handle))
        began_s = time.monotonic()
        with pytest.raises(TransferError, match="timed out"):
            await puller.pull(link, region, [Copy(0, 0, 10)], target, 0.2)
        assert 0.15 < time.monotonic() - began_s < 1
        pull = asyncio.ensure_future(puller.pull(link, region, [Copy(0, 0, 10)], target, 60))
        await asyncio.sleep(0.1)
        began_s = time.monotonic()
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        assert time.monotonic() - began_s < 1
        for one in knocking:
            one.close()


async def test_a_puller_that_does_not_read_is_closed(make, source, secret):
    owner = make(send_timeout_s=0.2)
    region = owner.register(source)
    with proven_connection(secret, region) as connection:
        connection.sendall(request(region, [(0, SIZE)] * 4))
        wait_until(lambda: not owner._source._connections)
        num_read = 0
        while new := connection.recv(1 << 20):
            num_read += len(new)
        assert num_read < 4 * SIZE


async def test_a_puller_that_leaves_in_the_middle_is_forgotten(owner, source, secret):
    region = owner.register(source)
    with proven_connection(secret, region) as connection:
        connection.sendall(request(region, [(0, SIZE)] * 4))
        assert connection.recv(1000)
    wait_until(lambda: not owner._source._connections)
