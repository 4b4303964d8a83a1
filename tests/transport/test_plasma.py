import asyncio
import random
import threading
import time
from types import SimpleNamespace

import msgspec
import pytest

import transport.plasma.road
import transport.plasma.vault
from transport.memory import Memory
from transport.plasma.road import PlasmaTransport, _handle_of, _planned
from transport.plasma.vault import LocalVaults, VaultLimits
from transport.protocol import Copy, Link, RegionError, TransferError

SIZE = 1 << 20
SEGMENT = 64 << 10
EXPORT = 4 * SEGMENT
ALL = [Copy(0, 0, SIZE)]


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch):
    """A pull of SIZE is several exports of several segments."""
    monkeypatch.setattr(transport.plasma.road, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(transport.plasma.vault, "SEGMENT_BYTES", SEGMENT)


@pytest.fixture
def vaults():
    return LocalVaults(limits=VaultLimits(max_bytes=SIZE, max_wait_s=0.2))


@pytest.fixture
def owner(vaults):
    road = PlasmaTransport(vaults)
    yield road
    road.close()


@pytest.fixture
def puller(vaults):
    road = PlasmaTransport(vaults)
    yield road
    road.close()


@pytest.fixture
def link():
    return Link(lambda road, body: True)


@pytest.fixture
def source():
    memory = Memory.allocate(SIZE)
    memory.view[:] = random.Random(1).randbytes(SIZE)
    yield memory
    memory.close()


@pytest.fixture
def target():
    memory = Memory.allocate(SIZE)
    yield memory
    memory.close()


def num_held_bytes(vaults):
    return sum(vault.num_held_bytes for vault in vaults.vaults.values())


def num_holds(vaults):
    return sum(vault.num_holds for vault in vaults.vaults.values())


async def everything_is_released(vaults):
    ends_s = time.monotonic() + 5
    while num_holds(vaults):
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.01)


async def nothing_more_lands(target):
    target.view[:] = bytes([5]) * SIZE
    await asyncio.sleep(0.1)
    assert bytes(target.view) == bytes([5]) * SIZE


# ------------------------------------------------------------------------------------------------------------ the bytes


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 1000, 4096, 100_000])
async def test_scattered_copies_arrive_exactly_and_are_told_once(owner, puller, vaults, link, source, target, size):
    places = list(range(0, SIZE - size, size + 7))
    copies = [Copy(i, j, size) for i, j in zip(random.Random(2).sample(places, len(places)), places, strict=True)]
    copies = copies[:2000]
    told = []

    def look(i):
        assert target.slice(copies[i].target_offset, size) == source.slice(copies[i].source_offset, size)
        told.append(i)

    await puller.pull(link, owner.register(source), copies, target, 5, look)
    expected = bytearray(SIZE)
    for source_offset, target_offset, length in copies:
        expected[target_offset : target_offset + length] = source.view[source_offset : source_offset + length]
    assert bytes(target.view) == bytes(expected)
    assert told == list(range(len(copies)))
    assert num_holds(vaults) == 0


async def test_much_is_held_in_two_exports_at_a_time(owner, puller, vaults, link, source, target):
    held = []
    await puller.pull(link, owner.register(source), ALL, target, 5, None)
    copies = [Copy(i * SEGMENT, i * SEGMENT, SEGMENT) for i in range(16)]
    await puller.pull(link, owner.register(source), copies, target, 5, lambda _: held.append(num_held_bytes(vaults)))
    assert bytes(target.view) == bytes(source.view)
    assert max(held) <= 2 * EXPORT
    assert num_holds(vaults) == 0


async def test_empty_copies_are_told_when_the_region_was_found(owner, puller, link, source, target):
    told = []
    await puller.pull(
        link, owner.register(source), [Copy(5, 5, 0), Copy(0, 0, 3), Copy(9, 9, 0)], target, 5, told.append
    )
    assert sorted(told) == [0, 1, 2]
    told.clear()
    region = msgspec.structs.replace(owner.register(source), nonce=bytes(16))
    with pytest.raises(RegionError):
        await puller.pull(link, region, [Copy(5, 5, 0)], target, 5, told.append)
    assert told == []


async def test_several_at_once_share_the_vault(owner, puller, link, source, target):
    region = owner.register(source)
    part = SIZE // 4
    pulls = [puller.pull(link, region, [Copy(i * part, i * part, part)], target, 5) for i in range(4)]
    await asyncio.gather(*pulls)
    assert bytes(target.view) == bytes(source.view)


def test_a_plan_has_all_bytes_in_order_in_segments_and_exports_of_bounded_size():
    chance = random.Random(3)
    copies = [Copy(chance.randrange(10**6), i * 10**6, chance.choice([0, 1, 999, SEGMENT, 10**6])) for i in range(500)]
    exports = _planned(copies)
    assert all(len(segments) == 4 for segments in exports[:-1])
    segments = [segment for segments in exports for segment in segments]
    assert all(sum(piece.num_bytes for piece in segment) == SEGMENT for segment in segments[:-1])
    again: dict[int, Copy] = {}
    for piece in (piece for segment in segments for piece in segment):
        before = again.get(piece.position, Copy(piece.source_offset, piece.target_offset, 0))
        assert piece.source_offset == before.source_offset + before.num_bytes
        assert piece.target_offset == before.target_offset + before.num_bytes
        again[piece.position] = before._replace(num_bytes=before.num_bytes + piece.num_bytes)
        assert piece.is_last == (again[piece.position] == copies[piece.position])
    assert again == {i: copy for i, copy in enumerate(copies) if copy.num_bytes}


def test_a_plan_of_nothing_is_one_export_of_nothing():
    assert _planned([]) == _planned([Copy(1, 1, 0)]) == [[]]


def test_a_plan_of_very_many_pieces_bounds_them_too(monkeypatch):
    monkeypatch.setattr(transport.plasma.road, "_SEGMENT_PIECES", 10)
    exports = _planned([Copy(i, i, 1) for i in range(95)])
    assert [[len(segment) for segment in segments] for segments in exports] == [[10] * 4, [10] * 4, [10, 5]]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change", [{"nonce": bytes(16)}, {"num_bytes": SIZE - 1}, {"handle": b"junk"}, {"road": "shm"}]
)
async def test_another_region_than_described_is_refused(owner, puller, link, source, target, change):
    region = msgspec.structs.replace(owner.register(source), **change)
    with pytest.raises(RegionError):
        await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)
    assert bytes(target.view) == bytes(SIZE)


async def test_the_vault_checks_the_nonce_itself(owner, puller, vaults, link, source, target):
    """Whoever calls a vault without having been told of the region gets nothing."""
    handle = _handle_of(owner.register(source))
    for change in ({"nonce": bytes(16)}, {"num_bytes": SIZE // 2}, {"handle": b"junk"}):
        guessed = msgspec.structs.replace(handle.region, **change)
        with pytest.raises(RegionError):
            await vaults.export(handle.node_id, b"1", guessed, [[(0, 10)]])
    assert num_holds(vaults) == 0


@pytest.mark.parametrize("bad", [(SIZE, 1), (0, -1), (-1, 5), (SIZE - 1, 2), (0, SIZE + 1)])
async def test_the_vault_checks_ranges_itself(owner, vaults, source, bad):
    handle = _handle_of(owner.register(source))
    with pytest.raises(RegionError, match="out of bounds"):
        await vaults.export(handle.node_id, b"1", handle.region, [[(0, 10), bad]])


@pytest.mark.parametrize("segments", [[[]], [[(0, 0)]], [[(0, SEGMENT), (0, 1)]], [[(0, 1)] * 65537]], ids=len)
async def test_the_vault_checks_sizes_itself(owner, vaults, source, segments):
    handle = _handle_of(owner.register(source))
    with pytest.raises(RegionError, match="wanted"):
        await vaults.export(handle.node_id, b"1", handle.region, segments)


async def test_memory_that_is_not_the_hosts_is_refused(owner, puller, link, source):
    device = SimpleNamespace(is_host=False, num_bytes=4096, nonce=b"\1" * 16)
    with pytest.raises(RegionError, match="host memory"):
        owner.register(device)
    with pytest.raises(RegionError, match="host memory"):
        await puller.pull(link, owner.register(source), [Copy(0, 0, 1)], device, 5)


async def test_a_region_withdrawn_under_way_is_a_failed_pull_as_something_was_written(
    owner, puller, link, source, target
):
    withdrawn = threading.Event()

    def withdraw(position):
        if not withdrawn.is_set():
            withdrawn.set()
            source.withdraw()

    copies = [Copy(i * SEGMENT, i * SEGMENT, SEGMENT) for i in range(16)]
    with pytest.raises(TransferError) as caught:
        await puller.pull(link, owner.register(source), copies, target, 5, withdraw)
    assert not isinstance(caught.value, RegionError)
    assert bytes(target.view[:SEGMENT]) == bytes(source.view[:SEGMENT])


async def test_closed_owner_cannot_be_read(owner, puller, link, source, target):
    region = owner.register(source)
    owner.close()
    with pytest.raises(RegionError):
        await puller.pull(link, region, [Copy(0, 0, 10)], target, 5)
    with pytest.raises(RegionError, match="closed"):
        owner.register(source)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("num_segments", [0, 1, 5])
async def test_a_vault_that_dies_fails_the_pull_and_the_next_finds_another(
    owner, puller, vaults, link, source, target, num_segments
):
    vaults.fail_after = num_segments
    with pytest.raises(TransferError, match="the vault died"):
        await puller.pull(link, owner.register(source), ALL, target, 5)
    await nothing_more_lands(target)
    await puller.pull(link, owner.register(source), ALL, target, 5)
    assert bytes(target.view) == bytes(source.view)
    await everything_is_released(vaults)


@pytest.mark.parametrize("num_segments", [0, 1, 5])
async def test_a_vault_that_stalls_fails_the_pull_in_time(owner, puller, vaults, link, source, target, num_segments):
    vaults.stall_after = num_segments
    began_s = time.monotonic()
    with pytest.raises(TransferError, match=r"nothing came for 0\.2 s"):
        await puller.pull(link, owner.register(source), ALL, target, 0.2)
    assert 0.15 < time.monotonic() - began_s < 1
    await nothing_more_lands(target)
    await everything_is_released(vaults)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.slow
async def test_a_cancelled_pull_has_stopped_when_it_is_over(owner, puller, vaults, link, source, target):
    region = owner.register(source)
    num_cancelled = 0
    for turns in (0, 1, 2, 5, 10, 20, 50):
        pull = asyncio.ensure_future(puller.pull(link, region, ALL, target, 5))
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        num_cancelled += pull.cancel()  # not one that was quick enough
        await asyncio.wait([pull])
        assert pull.cancelled() or pull.exception() is None
        await nothing_more_lands(target)
        await everything_is_released(vaults)
    assert num_cancelled >= 3
    assert puller._pulls == set()


async def test_cancelled_twice_while_it_copies_waits_for_the_copy(owner, puller, link, source, target):
    is_copying, may_go_on = threading.Event(), threading.Event()

    def hold(position):
        is_copying.set()
        assert may_go_on.wait(5)

    pull = asyncio.ensure_future(puller.pull(link, owner.register(source), [Copy(0, 0, 10)], target, 5, hold))
    await asyncio.to_thread(is_copying.wait, 5)
    for _ in range(2):
        pull.cancel()
        await asyncio.sleep(0.02)
        assert not pull.done()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await pull


async def test_a_lost_peers_pulls_fail_at_once_and_nobody_elses(owner, puller, vaults, link, source, target):
    region = owner.register(source)
    vaults.stall_after = 0
    other = Link(lambda road, body: True)
    pulls = [asyncio.ensure_future(puller.pull(peer, region, [Copy(0, 0, 10)], target, 60)) for peer in (link, other)]
    await asyncio.sleep(0.05)
    link.is_lost = True
    puller.on_link_lost(link)
    puller.on_link_lost(link)
    with pytest.raises(TransferError, match="the peer was lost"):
        await asyncio.wait_for(pulls[0], 1)
    with pytest.raises(TransferError, match="the peer was lost"):
        await puller.pull(link, region, [Copy(0, 0, 10)], target, 60)
    assert not pulls[1].done()
    puller.close()
    with pytest.raises(TransferError, match="the transport was closed"):
        await asyncio.wait_for(pulls[1], 1)
    with pytest.raises(RegionError, match="closed"):
        await puller.pull(other, region, [Copy(0, 0, 10)], target, 60)


async def test_an_error_of_who_is_told_comes_out_of_the_pull(owner, puller, vaults, link, source, target):
    def refuse(position):
        raise ValueError(f"copy {position} is damaged")

    with pytest.raises(ValueError, match="copy 0 is damaged"):
        await puller.pull(link, owner.register(source), ALL, target, 5, refuse)
    await everything_is_released(vaults)


async def test_a_segment_of_another_size_is_not_taken(owner, puller, vaults, link, source, target, monkeypatch):
    async def shortened(reference):
        return reference[:-1]

    monkeypatch.setattr(vaults, "segment", shortened)
    with pytest.raises(TransferError, match="a segment of 10 bytes was asked for, one of 9 came"):
        await puller.pull(link, owner.register(source), [Copy(0, 0, 10)], target, 5)
    assert bytes(target.view) == bytes(SIZE)


def test_a_message_is_logged_and_dropped(owner, link, caplog):
    owner.on_message(link, b"junk")
    assert "4 bytes that nobody wanted" in caplog.text


def test_says_what_it_is(owner, link):
    assert (owner.road, owner.is_one_sided, owner.is_direct) == ("plasma", True, False)
    assert owner.carriers(link) == "ray object store"
