"""The ucx road between real processes: bytes, refusals, deaths, and that nothing lands late."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("ucxx", reason="ucxx is not installed: the extra kvray[ucx-cu12]")

from messages.handoff import RegionInfo
from tests.transport.links import ended, linked, wait_until
from tests.transport.ucx_peer import HOST, PORTS, pattern, read_frame, write_frame
from transport.memory import Memory
from transport.protocol import Copy, Link, RegionError, TransferError
from transport.ucx import mover, wire
from transport.ucx.road import UcxTransport
from transport.ucx.worker import UcxError, Worker

pytestmark = pytest.mark.slow

MIB = 1 << 20
SMALL = 16 * MIB
LARGE = 192 * MIB  #: takes 0.15 s or more: something can happen meanwhile
STALL_S = 0.5
FILLING = 0xEE


class PeerProcess:
    """A process with a region of `pattern` bytes."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ucx")
        self._path = Path(self._folder.name) / "links"
        script = Path(__file__).parent / "ucx_peer.py"
        self._process = subprocess.Popen([sys.executable, str(script), str(self._path), str(size)])
        self.pid = self._process.pid

    async def link(self, transport: UcxTransport) -> tuple[Link, RegionInfo]:
        """A new link, whose end is not reported, and the region at its other side."""
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    reader, writer = await asyncio.open_unix_connection(self._path)
                    break
                await asyncio.sleep(0.02)
        link = Link(lambda _, body: write_frame(writer, body))
        region = msgspec.msgpack.decode(await read_frame(reader), type=RegionInfo)

        async def listen() -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    transport.on_message(link, await read_frame(reader))

        link.listening = asyncio.create_task(listen())
        return link, region

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


@pytest.fixture(scope="module")
def shared_peer():
    """For tests that do it no harm."""
    peer = PeerProcess(SMALL)
    yield peer
    peer.close()


@pytest.fixture
def peer():
    process = PeerProcess(LARGE)
    yield process
    process.close()


@pytest.fixture
async def puller():
    transport = UcxTransport(HOST, port_range=PORTS)
    yield transport
    await ended(transport)


@pytest.fixture
async def owner():
    transport = UcxTransport(HOST, port_range=PORTS)
    yield transport
    await ended(transport)


@pytest.fixture(scope="module")
def large_target():
    return Memory.allocate(LARGE)


@pytest.fixture
def target(large_target):
    large_target.view[:] = bytes([FILLING]) * LARGE
    return large_target


def is_untouched(memory):
    return bool((np.frombuffer(memory.view, dtype=np.uint8) == FILLING).all())


def blocks(num, size):
    """All of the large region, reversed."""
    return [Copy(i * size, (num - 1 - i) * size, size) for i in range(num)]


IN_EIGHTS = blocks(LARGE // (8 * MIB), 8 * MIB)


def at_first_arrival(action):
    """An on_arrived that acts once."""
    arrived = []

    def note(position):
        arrived.append(position)
        if len(arrived) == 1:
            action()

    return note, arrived


async def assert_untouched_later(target, peer):
    """Nothing lands any more in what was handed back, though a stopped peer goes on."""
    target.view[:] = bytes([FILLING]) * LARGE
    peer.send_signal(signal.SIGCONT)
    await asyncio.sleep(1)
    assert is_untouched(target)


# ---------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("num_blocks", [1, 16, 256])
@pytest.mark.parametrize("sizes", [[1], [7, 4097, 1], [49151, 49152, 70001], [2 * MIB], [3, 1, 524291, 99, 2 * MIB]])
async def test_bytes_arrive_where_asked_and_nowhere_else(shared_peer, puller, target, num_blocks, sizes):
    link, region = await shared_peer.link(puller)
    chance = random.Random(num_blocks)
    copies, end = [], 3
    for i in range(num_blocks):
        size = sizes[i % len(sizes)]
        if end + size > LARGE:
            break
        copies.append(Copy(chance.randrange(SMALL - size), end, size))
        end += size + chance.choice([0, 0, 1, 5])
    told = []
    await puller.pull(link, region, copies, target, 5, told.append)
    assert sorted(told) == list(range(len(copies)))
    assert puller.carriers(link) == "tcp"
    expected = np.full(LARGE, FILLING, dtype=np.uint8)
    for source_offset, target_offset, size in copies:
        expected[target_offset : target_offset + size] = np.frombuffer(pattern(source_offset, size), dtype=np.uint8)
    assert np.array_equal(np.frombuffer(target.view, dtype=np.uint8), expected)


@pytest.mark.parametrize("size", [1, 4096, 300_001])
async def test_neighbours_arrive(shared_peer, puller, target, size):
    link, region = await shared_peer.link(puller)
    copies = [Copy(17 + i * size, 5 + i * size, size) for i in range(50)]
    await puller.pull(link, region, copies, target, 5)
    assert target.view[5 : 5 + 50 * size] == pattern(17, 50 * size)
    assert target.view[5 + 50 * size] == FILLING


async def test_each_copy_is_there_when_it_is_told(shared_peer, puller, target):
    link, region = await shared_peer.link(puller)
    copies = [Copy(i * 1000, i * 9 * MIB, size) for i, size in enumerate([5, 9 * MIB, 0, 100_000, 1, 8 * MIB + 1])]

    def take(position):
        source_offset, target_offset, size = copies[position]
        assert target.view[target_offset : target_offset + size] == pattern(source_offset, size)
        told.append(position)

    told = []
    await puller.pull(link, region, copies, target, 5, take)
    assert sorted(told) == list(range(len(copies)))


async def test_pulls_at_once_do_not_mix(shared_peer, puller, target):
    link, region = await shared_peer.link(puller)
    parts = [[Copy(j * 100_003 + i, (i * 16 + j) * 131_072, 100_000 + i) for j in range(16)] for i in range(8)]
    await asyncio.gather(*(puller.pull(link, region, part, target, 5) for part in parts))
    for copy in itertools.chain(*parts):
        assert target.view[copy.target_offset :][: copy.num_bytes] == pattern(copy.source_offset, copy.num_bytes)


async def test_both_ends_of_many_links_pull_at_once():
    ends = [UcxTransport(HOST, port_range=PORTS) for _ in range(2)]
    memories = [Memory.allocate(MIB) for _ in range(2)]
    regions = [end.register(memory) for end, memory in zip(ends, memories, strict=True)]
    targets = []
    for i, memory in enumerate(memories):
        memory.view[:] = bytes([i + 1]) * MIB

    async def pull(i, link):
        targets.append((i, Memory.allocate(MIB)))
        await ends[i].pull(link, regions[1 - i], [Copy(0, 0, MIB)], targets[-1][1], 5)

    try:
        for _ in range(3):
            links = [(i, linked(ends[i], ends[1 - i])) for i in (0, 1) for _ in range(3)]
            await asyncio.gather(*(pull(i, link) for i, link in links))
            for i, link in links:
                ends[i].on_link_lost(link)
        assert all(bytes(target.view) == bytes([2 - i]) * MIB for i, target in targets)
    finally:
        for end in ends:
            end.close()


async def test_own_region_can_be_pulled_from(owner):
    source, target = Memory.allocate(MIB), Memory.allocate(MIB)
    source.view[:] = random.Random(2).randbytes(MIB)
    await owner.pull(linked(owner, owner), owner.register(source), [Copy(0, 0, MIB)], target, 5)
    assert target.view == source.view


# ---------------------------------------------------------------------------------------------------------- the refused


@pytest.mark.parametrize("change", [{"nonce": b"\1" * 16}, {"num_bytes": SMALL - 1}, {"num_bytes": SMALL + 1}], ids=str)
async def test_refusal_writes_nothing_and_keeps_the_connection(shared_peer, puller, target, change):
    link, region = await shared_peer.link(puller)
    large = asyncio.create_task(
        puller.pull(link, region, [Copy(0, 64 * MIB + i * 8 * MIB, 8 * MIB) for i in range(16)], target, 5)
    )
    copies = [Copy(i * 100, i * 1000, 100) for i in range(50)] + [Copy(0, 4 * MIB, 3 * MIB)]
    with pytest.raises(RegionError, match="refused"):
        await puller.pull(link, msgspec.structs.replace(region, **change), copies, target, 5)
    assert (np.frombuffer(target.view[: 64 * MIB], dtype=np.uint8) == FILLING).all()
    await large
    await puller.pull(link, region, copies, target, 5)
    assert target.view[4 * MIB : 7 * MIB] == pattern(0, 3 * MIB)


async def test_source_checks_the_ranges_of_a_request(owner, puller):
    """Also those that no puller of ours would send."""
    memory = Memory.allocate(MIB)
    region = owner.register(memory)
    await puller.pull(linked(puller, owner), region, [Copy(0, 0, 10)], Memory.allocate(MIB), 5)
    ((link, guest),) = owner._mover._states.items()
    number = guest.guest.number
    answers = []
    link._send = lambda _, body: answers.append(wire.decode(body)) or True
    bad = [(MIB, 1), (0, MIB + 1), (MIB - 1, 2), (2**63, 2**63), (0, 0)]
    requests = [(np.array([each], dtype="<u8").tobytes(), (1).to_bytes(4, "little")) for each in bad]
    requests += [(b"\0" * 15, b"\1\0\0\0"), (b"\0" * 16, b"\1\0\0"), (b"\0" * 16, b""), (b"", b"\0\0\0\0")]
    requests += [(np.array([(0, MIB)] * 9, dtype="<u8").tobytes(), (9).to_bytes(4, "little"))]
    for tag, (ranges, counts) in enumerate(requests):
        body = wire.PullRequest(tag, number, region.nonce, region.num_bytes, ranges, counts)
        owner.on_message(link, wire.encode(body))
    owner.on_message(link, wire.encode(wire.PullRequest(99, number + 1, region.nonce, MIB, b"", b"")))
    await asyncio.sleep(0.2)
    assert [(type(answer), answer.first_tag) for answer in answers] == [
        (wire.PullRefused, tag) for tag in [*range(len(requests)), 99]
    ]
    assert [answer.is_region for answer in answers] == [True] * len(requests) + [False]


@pytest.mark.parametrize("change", [{"road": "shm"}, {"handle": b"junk"}], ids=str)
async def test_region_that_is_none_of_this_road_is_refused(shared_peer, puller, target, change):
    link, region = await shared_peer.link(puller)
    with pytest.raises(RegionError):
        await puller.pull(link, msgspec.structs.replace(region, **change), [Copy(0, 0, 10)], target, 5)


async def test_region_of_another_version_of_ucx_is_refused(shared_peer, puller, target):
    link, region = await shared_peer.link(puller)
    handle = msgspec.msgpack.encode(wire.Handle("1.20.1", True, HOST, 1))
    with pytest.raises(RegionError, match=r"the peer has UCX 1\.20\.1"):
        await puller.pull(link, msgspec.structs.replace(region, handle=handle), [Copy(0, 0, 10)], target, 5)


async def test_junk_is_dropped(shared_peer, puller, target):
    link, region = await shared_peer.link(puller)
    messages = [wire.Accepted(5), wire.Refused(5, "", True), wire.Disconnect(5)]
    messages += [wire.Connect(5, "no address", 5), wire.PullRefused(5, "who?", True)]
    for junk in (b"", b"\xff" * 100, b"\x93\x01\x02\x03", *map(wire.encode, messages)):
        puller.on_message(link, junk)
        link.send("ucx", junk)
    await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)
    assert target.view[:10] == pattern(0, 10)


async def test_stranger_is_sent_away_and_gets_nothing(owner, puller, monkeypatch):
    """Who connects, and guesses tags, but has no link."""
    monkeypatch.setattr(mover, "_KNOCK_S", 0.3)
    memory, target = Memory.allocate(MIB), Memory.allocate(MIB)
    memory.view[:] = b"secret!!" * (MIB // 8)
    region, link = owner.register(memory), linked(puller, owner)
    stranger = Worker(HOST, PORTS, None, [], lambda: None)
    connection = stranger.connect((HOST, owner._mover.worker.port))
    seen = bytearray(MIB)
    waits = [stranger.receive(seen, MIB, tag) for tag in range(16)]
    asks = [connection.send(bytearray(b"give me all!"), 12, tag) for tag in range(16)]
    await puller.pull(link, region, [Copy(0, 0, MIB)], target, 5)
    await asyncio.to_thread(wait_until, lambda: connection.error is not None, 5)
    assert target.view == memory.view
    assert bytes(seen) == bytes(MIB)
    assert not any(wait.is_over for wait in waits)
    assert all(ask.is_over and ask.error for ask in asks)
    stranger.cancel(waits)
    connection.close()
    stranger.close()


async def test_client_that_does_not_come_is_refused(owner, puller, monkeypatch):
    """As where addresses are translated on the way: the source sees another one than the puller."""
    monkeypatch.setattr(mover, "_KNOCK_S", 0.3)
    region = owner.register(Memory.allocate(MIB))
    monkeypatch.setattr("transport.ucx.worker.Connection.local_address", lambda self: ("192.0.2.1", 5))
    with pytest.raises(TransferError, match="no client came"):
        await puller.pull(linked(puller, owner), region, [Copy(0, 0, 10)], Memory.allocate(MIB), 5)


@pytest.mark.parametrize("change", [{"port": 1}, {"port": 70000}, {"host": "anyone"}], ids=str)
async def test_unreachable_listener_fails_at_once(puller, owner, change):
    region = owner.register(Memory.allocate(MIB))
    handle = msgspec.msgpack.decode(region.handle, type=wire.Handle)
    nobody = msgspec.structs.replace(handle, **change)
    region = msgspec.structs.replace(region, handle=msgspec.msgpack.encode(nobody))
    started_s = time.monotonic()
    with pytest.raises(TransferError):
        await puller.pull(linked(puller, owner), region, [Copy(0, 0, 10)], Memory.allocate(MIB), 5)
    assert time.monotonic() - started_s < 2


# ----------------------------------------------------------------------------------------------------- ends, early ones


@pytest.mark.alone
async def test_killed_peer_fails_the_pull_at_once_and_its_successor_works(peer, puller, target):
    link, region = await peer.link(puller)
    on_arrived, arrived = at_first_arrival(lambda: peer.send_signal(signal.SIGKILL))
    started_s = time.monotonic()
    with pytest.raises(TransferError) as failure:
        await puller.pull(link, region, IN_EIGHTS, target, 5, on_arrived)
    assert time.monotonic() - started_s < 2
    assert failure.value.quarantine_s == 0
    assert 0 < len(arrived) < len(IN_EIGHTS)
    puller.on_link_lost(link)
    successor = PeerProcess(SMALL)
    try:
        link, region = await successor.link(puller)
        await puller.pull(link, region, [Copy(1, 2, MIB)], target, 5)
        assert target.view[2 : 2 + MIB] == pattern(1, MIB)
    finally:
        successor.close()


@pytest.mark.alone
async def test_stopped_peer_stalls_the_pull_and_nothing_lands_late(peer, puller, target):
    link, region = await peer.link(puller)
    for _ in range(2):
        on_arrived, _ = at_first_arrival(lambda: peer.send_signal(signal.SIGSTOP))
        started_s = time.monotonic()
        with pytest.raises(TransferError, match=r"nothing arrived for 0\.5 s") as failure:
            await puller.pull(link, region, IN_EIGHTS, target, STALL_S, on_arrived)
        assert STALL_S < time.monotonic() - started_s < STALL_S + 2
        assert failure.value.quarantine_s == 0
        await assert_untouched_later(target, peer)
        await puller.pull(link, region, IN_EIGHTS, target, 5)
        assert target.view[-8 * MIB :] == pattern(0, 8 * MIB)
    assert puller.num_unsettled == 0


@pytest.mark.alone
async def test_stopped_peer_that_never_answered_stalls_the_pull(peer, puller, target):
    link, region = await peer.link(puller)
    peer.send_signal(signal.SIGSTOP)
    with pytest.raises(TransferError, match="did not answer"):
        await puller.pull(link, region, IN_EIGHTS, target, STALL_S)
    peer.send_signal(signal.SIGCONT)
    await asyncio.sleep(0.2)
    await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)


@pytest.mark.alone
@pytest.mark.parametrize("how", ["link lost", "cancelled", "closed"])
async def test_pull_is_ended_at_once_and_nothing_lands_late(peer, puller, target, how):
    link, region = await peer.link(puller)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def stop():
        peer.send_signal(signal.SIGSTOP)
        loop.call_soon_threadsafe(stopped.set)

    on_arrived, _ = at_first_arrival(stop)
    pulls = [asyncio.create_task(puller.pull(link, region, IN_EIGHTS, target, 60, on_arrived))]
    await stopped.wait()
    started_s = time.monotonic()
    if how == "link lost":
        link.is_lost = True
        puller.on_link_lost(link)
    elif how == "cancelled":
        pulls[0].cancel()
    else:
        puller.close()
    (outcome,) = await asyncio.gather(*pulls, return_exceptions=True)
    assert time.monotonic() - started_s < 1
    assert isinstance(outcome, asyncio.CancelledError if how == "cancelled" else TransferError)
    await assert_untouched_later(target, peer)
    if how == "cancelled":
        await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)


async def test_cancelled_pull_does_not_hit_another(shared_peer, puller, target):
    link, region = await shared_peer.link(puller)
    copies = [Copy(0, i * 8 * MIB, 8 * MIB) for i in range(12)]
    others = [Copy(1, (12 + i) * 8 * MIB, 8 * MIB) for i in range(12)]
    await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)
    pulls = [asyncio.create_task(puller.pull(link, region, each, target, 5)) for each in (copies, others)]
    await asyncio.sleep(0.01)
    pulls[0].cancel()
    cancelled, other = await asyncio.gather(*pulls, return_exceptions=True)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert other is None
    assert target.view[-8 * MIB :] == pattern(1, 8 * MIB)


async def test_closed_owner_refuses_and_closed_puller_too(owner, puller):
    memory, target = Memory.allocate(MIB), Memory.allocate(MIB)
    region, link = owner.register(memory), linked(puller, owner)
    await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)
    owner.close()
    for _ in range(3):  # refused over the link, or found closed by UCX
        with pytest.raises(TransferError):
            await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)
    with pytest.raises(RegionError, match="closed"):
        owner.register(memory)
    puller.close()
    with pytest.raises(RegionError, match="closed"):
        await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)


class OnDevice:
    """Memory that says it is a device's."""

    is_host = False

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory, name)


async def test_a_devices_memory_is_registered_once_for_as_long_as_the_road_is_open(owner, puller, target, monkeypatch):
    for transport in (owner, puller):
        monkeypatch.setattr(transport, "_has_devices", True)
    memory = OnDevice(Memory.allocate(MIB))
    memory.view[:] = pattern(0, MIB)
    owner.register(Memory.allocate(MIB))
    regions = [owner.register(memory) for _ in range(2)]
    await puller.pull(linked(puller, owner), regions[1], [Copy(0, 0, MIB)], target, 5)
    assert target.view[:MIB] == pattern(0, MIB)
    worker = owner._mover.worker
    assert len(worker._kept) == 1
    await ended(owner)
    assert worker._kept == []


class Nowhere:
    """Memory at no address."""

    def __init__(self) -> None:
        self.__cuda_array_interface__ = {"data": (0, False)}


async def test_memory_that_ucx_does_not_register_is_an_error_with_its_words(owner):
    with pytest.raises(UcxError, match="Invalid parameter"):
        owner._mover.worker.keep_registered(Nowhere(), 4096)


async def test_lost_link_is_not_even_tried(puller, owner):
    memory = Memory.allocate(MIB)
    region, link = owner.register(memory), linked(puller, owner)
    link.is_lost = True
    with pytest.raises(TransferError, match="lost"):
        await puller.pull(link, region, [Copy(0, 0, 10)], Memory.allocate(MIB), 5)
