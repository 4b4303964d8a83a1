import asyncio
import contextlib
import os
import random
import signal
import socket
import threading
import time
from types import SimpleNamespace

import msgspec
import pytest

import transport.tcp.road
import transport.tcp.source
from messages.errors import ConfigError
from tests.served import free_port
from tests.transport.links import wait_until
from tests.transport.socket_peers import (
    PATTERN,
    FakeSource,
    claim,
    connect_to,
    grant,
    handle_of,
    owner_process,
    proven_connection,
    request,
)
from transport.memory import Memory
from transport.protocol import Copy, Link, RegionError, TransferError
from transport.secret import ClusterSecret
from transport.tcp.frames import ALIGNMENT, ANSWER, CHALLENGE_BYTES, REPLY, REQUEST, Vectors, merged, read_exactly
from transport.tcp.road import SocketTransport

BLOCK = 64 << 10
NUM_BLOCKS = 512
SIZE = BLOCK * NUM_BLOCKS
HOST = "127.0.0.1"


@pytest.fixture
def secret():
    return ClusterSecret.generate()


@pytest.fixture
def make(secret):
    """Makes transports, closes them at the end, and sees that no thread of theirs is left."""
    made = []

    def make_one(secret=secret, **options):
        made.append(SocketTransport(secret, HOST, **options))
        return made[-1]

    yield make_one
    for transport_ in made:
        transport_.close()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("socket-")])


@pytest.fixture
def owner(make):
    return make()


@pytest.fixture
def puller(make):
    return make()


@pytest.fixture
def link():
    return Link(lambda road, body: True)


@pytest.fixture(scope="module")
def source():
    memory = Memory.allocate(SIZE)
    memory.view[:] = random.Random(1).randbytes(SIZE)
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def _target():
    memory = Memory.allocate(SIZE)
    yield memory
    memory.close()


@pytest.fixture
def target(_target):
    _target.view[:] = bytes(SIZE)
    return _target


@pytest.fixture
def fake(secret):
    """Makes sources that answer as they are told."""
    made = []

    def make_one(answer, **options):
        made.append(FakeSource(secret, answer, **options))
        return made[-1]

    yield make_one
    for source_ in made:
        source_.close()


def expected(source, copies):
    whole = bytearray(SIZE)
    for source_offset, target_offset, length in copies:
        whole[target_offset : target_offset + length] = source.view[source_offset : source_offset + length]
    return bytes(whole)


def stall_after(num_sent):
    """An answer that grants, sends so many bytes 0xEE, and then nothing more."""

    def answer(connection, pull_id, num_bytes):
        grant(connection, pull_id, num_bytes)
        connection.sendall(b"\xee" * num_sent)
        while connection.recv(1):  # until the puller closes
            pass
        raise ConnectionError

    return answer


async def nothing_more_lands(target, after_s=0.2):
    target.view[:] = bytes([5]) * SIZE
    await asyncio.sleep(after_s)
    assert bytes(target.view) == bytes([5]) * SIZE


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
    monkeypatch.setattr(transport.tcp.road, "MAX_RANGES", max_ranges)
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
    connection = puller._peers[handle_of(region)]._socket
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
    assert puller._peers[handle_of(region)]._socket is connection
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


# ---------------------------------------------------------------------------------------------------------- the secret


async def test_a_puller_with_another_secret_gets_nothing_and_both_say_so(owner, make, link, source, target, caplog):
    stranger = make(ClusterSecret.generate())
    with pytest.raises(TransferError, match="another cluster secret"):
        await stranger.pull(link, owner.register(source), [Copy(0, 0, 100)], target, 5)
    assert bytes(target.view[:100]) == bytes(100)
    wait_until(lambda: owner.num_refused == 1)
    assert "refused 127.0.0.1, without the cluster secret" in caplog.text


async def test_refusals_are_counted_and_seldom_logged(owner, source, caplog):
    region = owner.register(source)
    for _ in range(9):
        connect_to(region).close()
    wait_until(lambda: owner.num_refused == 9)
    assert caplog.text.count("without the cluster secret") == 4  # 1, 2, 4, 8


async def test_a_source_without_the_secret_is_not_believed(fake, puller, link, source, target):
    def answer(connection, pull_id, num_bytes):
        raise AssertionError("it was asked")

    rogue = fake(answer, key=bytes(32))
    with pytest.raises(TransferError, match="does not have the cluster secret"):
        await puller.pull(link, rogue.describe(source), [Copy(0, 0, 100)], target, 5)


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
def test_a_stranger_who_proves_nothing_is_closed_in_time(owner, source, monkeypatch, drip):
    monkeypatch.setattr(transport.tcp.source, "HANDSHAKE_S", 0.3)
    with connect_to(owner.register(source)) as stranger:
        began_s = time.monotonic()
        stranger.settimeout(0.03)
        got = b""
        while time.monotonic() - began_s < 3:
            try:
                if drip:
                    stranger.send(b"x")
                new = stranger.recv(1000)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not new:
                break
            got += new
        assert 0.25 < time.monotonic() - began_s < 1.5
        assert len(got) == 32  # the challenge


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n" * 10, bytes(80), b"\xff" * 4096], ids=["http", "zeros", "ones"])
def test_junk_instead_of_a_proof_gets_nothing(owner, source, junk):
    with connect_to(owner.register(source)) as stranger:
        stranger.sendall(junk)
        got = b""
        try:
            while new := stranger.recv(1000):
                got += new
        except ConnectionResetError:
            pass
        assert len(got) <= 32
    wait_until(lambda: owner.num_refused == 1)


def test_a_proof_is_good_for_one_connection_only(owner, source, secret):
    region = owner.register(source)
    with connect_to(region) as first, connect_to(region) as second:
        proof, _ = claim(secret, handle_of(region).instance, read_exactly(first, 32))
        read_exactly(second, 32)
        second.sendall(proof)
        assert second.recv(1) == b""
        first.sendall(proof)
        assert len(read_exactly(first, ANSWER.size)) == ANSWER.size


async def test_a_crowd_of_strangers_does_not_keep_peers_out(owner, puller, link, source, target, monkeypatch):
    monkeypatch.setattr(transport.tcp.source, "MAX_UNPROVEN", 4)
    region = owner.register(source)
    crowd = [connect_to(region) for _ in range(12)]
    wait_until(lambda: len(owner._source._connections) == 4)
    await puller.pull(link, region, [Copy(0, 0, 100)], target, 5)
    assert target.view[:100] == source.view[:100]
    for stranger in crowd:
        stranger.close()
    wait_until(lambda: owner.num_refused == 12)


@pytest.mark.parametrize("frame", [REQUEST.pack(1, bytes(16), 10, 32769), b"\xff" * 100, b"\1\2\3"], ids=len)
async def test_junk_after_the_proof_ends_that_connection_alone(
    owner, puller, link, source, target, secret, frame, caplog
):
    region = owner.register(source)
    await puller.pull(link, region, [Copy(0, 0, 1)], target, 5)
    with proven_connection(secret, region) as connection:
        connection.sendall(frame)
        with contextlib.suppress(OSError):  # it may be cut off before it is done
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    wait_until(lambda: len(owner._source._connections) == 1)
    await puller.pull(link, region, [Copy(0, 0, 100)], target, 5)
    assert target.view[:100] == source.view[:100]
    assert owner.num_refused == 0


# -------------------------------------------------------------------------------------------------------------- faults


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
    assert set(puller._peers) == {handle_of(owner.register(source))}
    puller.on_link_lost(other)
    assert not puller._peers
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
    assert (owner.road, owner.is_one_sided, owner.can_abort_safely, owner.is_direct) == ("socket", False, True, True)
    assert owner.carriers(link) == "tcp"


# --------------------------------------------------------------------------------------------------------- the pieces


def test_neighbours_become_one_range():
    assert merged([(0, 10), (10, 5), (15, 0), (20, 1), (3, 4)]) == [(0, 15), (20, 1), (3, 4)]
    assert merged([]) == []


def test_what_comes_before_a_payload_keeps_it_aligned():
    assert (CHALLENGE_BYTES + ANSWER.size) % ALIGNMENT == 0
    assert REPLY.size % ALIGNMENT == 0


def test_vectors_go_on_where_a_call_stopped():
    views = [memoryview(bytes([i]) * 10) for i in range(5)]
    vectors = Vectors(list(views), 20)
    sent = b""
    for num_bytes in (3, 7, 20, 1, 9, 10):
        assert len(vectors.window()) <= 2
        sent += b"".join(vectors.window())[:num_bytes]
        vectors.advance(num_bytes)
    assert vectors.window() == []
    assert sent == b"".join(views)


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
