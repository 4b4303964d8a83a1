"""What every road must do: one set of tests over all implementations of transport.protocol.Transport."""

import asyncio
import random
from typing import NamedTuple

import msgspec
import pytest

from messages.handoff import RegionInfo
from tests.transport.links import ROADS, ended, linked
from transport.checksum import checksum
from transport.memory import Memory
from transport.protocol import Copy, Link, RegionError, TransferError, Transport

SIZE = 4 << 20  #: above and below what shm copies on the loop


class Pair(NamedTuple):
    """An owner and a puller of one road, and the puller's link to the owner."""

    owner: Transport
    puller: Transport
    link: Link


@pytest.fixture(params=ROADS)
async def pair(request):
    owner, puller = ROADS[request.param]()
    yield Pair(owner, puller, linked(puller, owner))
    await ended(puller, owner)


@pytest.fixture
def memories():
    allocated = [Memory.allocate(SIZE), Memory.allocate(SIZE)]
    allocated[0].view[:] = random.Random(1).randbytes(SIZE)
    yield allocated
    for memory in allocated:
        memory.close()


@pytest.mark.parametrize("scale", [1, 2048], ids=["small", "large"])
async def test_bytes_arrive_where_asked_and_nowhere_else(pair, memories, scale):
    owner, puller, link = pair
    source, target = memories
    copies = [Copy(0, 1000 * scale, 17 * scale), Copy(100 * scale, 0, 999 * scale), Copy(SIZE, 5, 0)]
    await puller.pull(link, owner.register(source), copies, target, stall_s=5)
    expected = bytearray(SIZE)
    for copy in copies:
        expected[copy.target_offset : copy.target_offset + copy.num_bytes] = source.view[
            copy.source_offset : copy.source_offset + copy.num_bytes
        ]
    assert bytes(target.view) == expected


async def test_each_copy_is_told_once_and_only_when_it_is_there(pair, memories):
    owner, puller, link = pair
    source, target = memories
    sizes = [1, 17, 4096, 100_000, 300_000, 500_000, 5]
    copies = [Copy(i * 1000, (i << 19) + i, size) for i, size in enumerate(sizes)]
    told = []

    def take(position, value=None):
        source_offset, target_offset, length = copies[position]
        landed = target.view[target_offset : target_offset + length]
        assert landed == source.view[source_offset:][:length]
        assert value in (None, checksum(landed))
        told.append(position)

    await puller.pull(link, owner.register(source), copies, target, stall_s=5, on_arrived=take)
    assert sorted(told) == list(range(len(copies)))


async def test_last_byte_of_both_regions_can_be_reached(pair, memories):
    owner, puller, link = pair
    source, target = memories
    await puller.pull(link, owner.register(source), [Copy(SIZE - 1, SIZE - 1, 1)], target, stall_s=5)
    assert target.view[-1] == source.view[-1]


@pytest.mark.parametrize(
    "bad",
    [
        Copy(SIZE - 1, 0, 2),
        Copy(0, SIZE - 1, 2),
        Copy(-1, 0, 1),
        Copy(0, -1, 1),
        Copy(0, 0, -1),
        Copy(0, 0, SIZE + 1),
    ],
)
async def test_range_out_of_bounds_writes_nothing(pair, memories, bad):
    owner, puller, link = pair
    source, target = memories
    region = owner.register(source)
    with pytest.raises(RegionError):
        await puller.pull(link, region, [Copy(0, 0, 4096), bad], target, stall_s=5)
    assert bytes(target.view) == bytes(SIZE)


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": b"\0" * 16},
        {"num_bytes": SIZE - 1},
        {"num_bytes": SIZE + 8192},
        {"handle": b"junk"},
        {"road": "pigeon"},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_opened_before", [False, True])
async def test_region_other_than_described_writes_nothing(pair, memories, change, is_opened_before):
    owner, puller, link = pair
    source, target = memories
    region = owner.register(source)
    if is_opened_before and change.keys() == {"num_bytes"}:
        await puller.pull(link, region, [], target, stall_s=5)
    with pytest.raises(RegionError):
        await puller.pull(link, msgspec.structs.replace(region, **change), [Copy(0, 0, 10)], target, stall_s=5)
    assert bytes(target.view) == bytes(SIZE)


async def test_region_never_registered_is_unknown(pair, memories):
    _, puller, link = pair
    _, target = memories
    unknown = RegionInfo(road=puller.road, handle=b"\0" * 16, num_bytes=4096, nonce=b"\1" * 16)
    with pytest.raises(RegionError):
        await puller.pull(link, unknown, [Copy(0, 0, 10)], target, stall_s=5)


async def test_registering_twice_describes_the_same_region(pair, memories):
    owner, _, _ = pair
    assert owner.register(memories[0]) == owner.register(memories[0])


async def test_closed_owner_cannot_be_read_even_by_those_who_read_before(pair, memories):
    owner, puller, link = pair
    source, target = memories
    region = owner.register(source)
    await puller.pull(link, region, [Copy(0, 0, 10)], target, stall_s=5)
    owner.close()
    with pytest.raises(TransferError):
        await puller.pull(link, region, [Copy(0, 100, 10)], target, stall_s=0.5)
    assert target.view[100:110] == bytes(10)
    with pytest.raises(RegionError):
        owner.register(source)


async def test_closed_puller_refuses(pair, memories):
    owner, puller, link = pair
    source, target = memories
    region = owner.register(source)
    puller.close()
    with pytest.raises(RegionError):
        await puller.pull(link, region, [Copy(0, 0, 10)], target, stall_s=5)


async def test_a_peer_that_was_lost_can_come_back(pair, memories):
    owner, puller, link = pair
    source, target = memories
    region = owner.register(source)
    await puller.pull(link, region, [Copy(0, 0, 10)], target, stall_s=5)
    link.is_lost = True
    puller.on_link_lost(link)
    puller.on_link_lost(link)
    again = linked(puller, owner)
    await puller.pull(again, region, [Copy(0, 0, 10)], target, stall_s=5)
    assert target.view[:10] == source.view[:10]


async def test_many_scattered_blocks_arrive(pair, memories):
    owner, puller, link = pair
    source, target = memories
    size = 4096
    blocks = random.Random(3).sample(range(SIZE // size), 900)
    places = random.Random(4).sample(range(SIZE // size), 900)
    copies = [Copy(i * size, j * size, size) for i, j in zip(blocks, places, strict=True)]
    await puller.pull(link, owner.register(source), copies, target, stall_s=5)
    for copy in copies:
        assert target.view[copy.target_offset :][:size] == source.view[copy.source_offset :][:size]
    untouched = set(range(SIZE // size)) - set(places)
    assert all(target.view[j * size : (j + 1) * size] == bytes(size) for j in untouched)


async def test_junk_from_a_peer_does_no_harm(pair, memories):
    owner, puller, link = pair
    source, target = memories
    for junk in (b"", b"\xff" * 100, b"\x93\x01\x02\x03"):
        owner.on_message(link, junk)
        puller.on_message(link, junk)
    await puller.pull(link, owner.register(source), [Copy(0, 0, 10)], target, stall_s=5)
    assert target.view[:10] == source.view[:10]


async def test_a_cancelled_pull_has_stopped_writing_when_it_is_over(pair, memories):
    owner, puller, link = pair
    source, target = memories
    region = owner.register(source)
    task = asyncio.ensure_future(puller.pull(link, region, [Copy(0, 0, SIZE)], target, stall_s=5))
    await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    target.view[:] = bytes([5]) * SIZE
    await asyncio.sleep(0.1)
    assert bytes(target.view) == bytes([5]) * SIZE
    await puller.pull(link, region, [Copy(0, 0, 10)], target, stall_s=5)
    assert target.view[:10] == source.view[:10]


async def test_pulls_at_once_do_not_mix(pair, memories):
    owner, puller, link = pair
    source, target = memories
    region = owner.register(source)
    parts = [Copy(i << 18, (15 - i) << 18, 1 << 18) for i in range(16)]
    await asyncio.gather(*(puller.pull(link, region, parts[i : i + 8], target, stall_s=5) for i in (0, 8)))
    for part in parts:
        assert target.view[part.target_offset :][: 1 << 18] == source.view[part.source_offset :][: 1 << 18]
