"""What every road must do: one set of tests over all implementations of transport.protocol.Transport."""

import asyncio
import random

import msgspec
import pytest

from messages.handoff import RegionInfo
from transport.loopback import LoopbackNetwork, LoopbackTransport
from transport.memory import Memory
from transport.protocol import Copy, RegionError, Transport
from transport.shm import ShmTransport

SIZE = 4 << 20  #: above and below what shm copies on the loop


@pytest.fixture(params=["shm", "loopback"])
def pair(request):
    """Two transports of one road: an owner's and a puller's."""
    if request.param == "shm":
        transports: tuple[Transport, Transport] = (ShmTransport(), ShmTransport())
    else:
        network = LoopbackNetwork()
        transports = (LoopbackTransport(network), LoopbackTransport(network))
    yield transports
    for transport in transports:
        transport.close()


@pytest.fixture
def memories():
    allocated = [Memory.allocate(SIZE), Memory.allocate(SIZE)]
    allocated[0].view[:] = random.Random(1).randbytes(SIZE)
    yield allocated
    for memory in allocated:
        memory.close()


@pytest.mark.parametrize("scale", [1, 2048], ids=["small", "large"])
async def test_bytes_arrive_where_asked_and_nowhere_else(pair, memories, scale):
    owner, puller = pair
    source, target = memories
    copies = [Copy(0, 1000 * scale, 17 * scale), Copy(100 * scale, 0, 999 * scale), Copy(SIZE, 5, 0)]
    await puller.pull(owner.register(source), copies, target, timeout_s=5)
    expected = bytearray(SIZE)
    for copy in copies:
        expected[copy.target_offset : copy.target_offset + copy.num_bytes] = source.view[
            copy.source_offset : copy.source_offset + copy.num_bytes
        ]
    assert target.view == expected


async def test_later_copies_land_over_earlier_ones(pair, memories):
    owner, puller = pair
    source, target = memories
    await puller.pull(owner.register(source), [Copy(i * 100, 0, 100) for i in range(50)], target, timeout_s=5)
    assert target.view[:100] == source.view[4900:5000]


async def test_last_byte_of_both_regions_can_be_reached(pair, memories):
    owner, puller = pair
    source, target = memories
    await puller.pull(owner.register(source), [Copy(SIZE - 1, SIZE - 1, 1)], target, timeout_s=5)
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
    owner, puller = pair
    source, target = memories
    region = owner.register(source)
    with pytest.raises(RegionError):
        await puller.pull(region, [Copy(0, 0, 4096), bad], target, timeout_s=5)
    assert target.view == bytes(SIZE)


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
    owner, puller = pair
    source, target = memories
    region = owner.register(source)
    if is_opened_before and change.keys() == {"num_bytes"}:
        await puller.pull(region, [], target, timeout_s=5)
    with pytest.raises(RegionError):
        await puller.pull(msgspec.structs.replace(region, **change), [Copy(0, 0, 10)], target, timeout_s=5)
    assert target.view == bytes(SIZE)


async def test_region_never_registered_is_unknown(pair, memories):
    _, puller = pair
    _, target = memories
    unknown = RegionInfo(road=puller.road, handle=b"\0" * 16, num_bytes=4096, nonce=b"\1" * 16)
    with pytest.raises(RegionError):
        await puller.pull(unknown, [Copy(0, 0, 10)], target, timeout_s=5)


async def test_registering_twice_describes_the_same_region(pair, memories):
    owner, _ = pair
    assert owner.register(memories[0]) == owner.register(memories[0])


async def test_closed_owner_cannot_be_read_even_by_those_who_read_before(pair, memories):
    owner, puller = pair
    source, target = memories
    region = owner.register(source)
    await puller.pull(region, [Copy(0, 0, 10)], target, timeout_s=5)
    owner.close()
    with pytest.raises(RegionError):
        await puller.pull(region, [Copy(0, 100, 10)], target, timeout_s=5)
    assert target.view[100:110] == bytes(10)
    with pytest.raises(RegionError):
        owner.register(source)


async def test_closed_puller_refuses(pair, memories):
    owner, puller = pair
    source, target = memories
    region = owner.register(source)
    puller.close()
    with pytest.raises(RegionError):
        await puller.pull(region, [Copy(0, 0, 10)], target, timeout_s=5)


async def test_forgotten_region_can_be_pulled_again(pair, memories):
    owner, puller = pair
    source, target = memories
    region = owner.register(source)
    await puller.pull(region, [Copy(0, 0, 10)], target, timeout_s=5)
    puller.forget(region)
    puller.forget(region)
    await puller.pull(region, [Copy(0, 0, 10)], target, timeout_s=5)
    assert target.view[:10] == source.view[:10]


async def test_pulls_at_once_do_not_mix(pair, memories):
    owner, puller = pair
    source, target = memories
    region = owner.register(source)
    parts = [Copy(i << 18, (15 - i) << 18, 1 << 18) for i in range(16)]
    await asyncio.gather(*(puller.pull(region, parts[i : i + 8], target, timeout_s=5) for i in (0, 8)))
    for part in parts:
        assert target.view[part.target_offset :][: 1 << 18] == source.view[part.source_offset :][: 1 << 18]


async def test_own_region_can_be_pulled_from(pair, memories):
    owner, _ = pair
    source, target = memories
    await owner.pull(owner.register(source), [Copy(0, 0, 4096)], target, timeout_s=5)
    assert target.view[:4096] == source.view[:4096]
