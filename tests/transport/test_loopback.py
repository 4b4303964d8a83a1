import asyncio

import pytest

from transport.loopback import Corrupt, Fail, LoopbackNetwork, LoopbackTransport, Reorder, Stall, WriteLate
from transport.memory import Memory
from transport.protocol import Copy, Link, TransferError

COPIES = [Copy(i * 10, i * 10, 10) for i in range(10)]


@pytest.fixture
def link():
    return Link(lambda road, body: True)


@pytest.fixture
def setting():
    network = LoopbackNetwork()
    owner, puller = LoopbackTransport(network), LoopbackTransport(network)
    source, target = Memory.allocate(100), Memory.allocate(100)
    source.view[:] = bytes(range(1, 101))
    yield puller, owner.register(source), source, target
    source.close()
    target.close()


async def test_fault_hits_one_pull_and_the_next_is_whole(setting, link):
    puller, region, source, target = setting
    puller.faults.append(Fail(num_copies=3))
    with pytest.raises(TransferError):
        await puller.pull(link, region, COPIES, target, stall_s=1)
    assert bytes(target.view) == bytes(source.view[:30]) + bytes(70)
    await puller.pull(link, region, COPIES, target, stall_s=1)
    assert target.view == source.view
    assert puller.num_pulls == 2


async def test_stall_ends_with_the_deadline_and_writes_nothing(setting, link):
    puller, region, _, target = setting
    puller.faults.append(Stall())
    with pytest.raises(TransferError, match="nothing arrived"):
        await puller.pull(link, region, COPIES, target, stall_s=0.02)
    await asyncio.sleep(0.05)
    assert target.view == bytes(100)


async def test_short_stall_is_only_late(setting, link):
    puller, region, source, target = setting
    puller.faults.append(Stall(0.01))
    await puller.pull(link, region, COPIES, target, stall_s=1)
    assert target.view == source.view


async def test_reorder_tells_the_copies_in_another_order(setting, link):
    puller, region, source, target = setting
    puller.faults.append(Reorder(seed=3))
    told: list[int] = []
    await puller.pull(link, region, COPIES, target, stall_s=1, on_arrived=told.append)
    assert target.view == source.view
    assert told != list(range(10)) == sorted(told)


async def test_a_lost_link_ends_a_stalled_pull_at_once(setting, link):
    puller, region, _, target = setting
    puller.faults.append(Stall())
    pull = asyncio.ensure_future(puller.pull(link, region, COPIES, target, stall_s=60))
    await asyncio.sleep(0.01)
    puller.on_link_lost(link)
    with pytest.raises(TransferError, match="lost"):
        await asyncio.wait_for(pull, 1)
    assert target.view == bytes(100)


async def test_corrupt_reports_success(setting, link):
    puller, region, source, target = setting
    puller.faults.append(Corrupt(offset=25))
    await puller.pull(link, region, COPIES, target, stall_s=1)
    assert [i for i in range(100) if target.view[i] != source.view[i]] == [25]


async def test_late_write_lands_after_the_pull_was_given_up(setting, link):
    puller, region, source, target = setting
    puller.faults.append(WriteLate(delay_s=0.02))
    with pytest.raises(TransferError) as caught:
        await puller.pull(link, region, COPIES, target, stall_s=0.01)
    assert caught.value.quarantine_s > 0.02
    assert target.view == bytes(100)
    await asyncio.sleep(0.05)
    assert target.view == source.view


async def test_late_write_lands_after_a_cancelled_pull_too(setting, link):
    puller, region, source, target = setting
    puller.faults.append(WriteLate(delay_s=0.02))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(puller.pull(link, region, COPIES, target, stall_s=10), 0.01)
    assert target.view == bytes(100)
    await asyncio.sleep(0.05)
    assert target.view == source.view
