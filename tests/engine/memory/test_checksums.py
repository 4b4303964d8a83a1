"""Checksums of a pool's blocks are those of their bytes, and what was published is remembered until it is reused."""

from __future__ import annotations

import pytest
import torch

import engine.memory.checksums
from engine.memory.checksums import BlockChecksums
from engine.memory.copies import DeviceCopies
from engine.memory.kv_pool import KvPool, LayerSpec
from kvcache.pool import BlockPool
from tests.engine.fake_device import FakeDevice
from transport.checksum import checksum

NUM_BLOCKS = 6
SPECS = [LayerSpec(2, 4, 4), LayerSpec(1, 3, 2)]
UNEVEN = [LayerSpec(1, 3, 2)]  # with blocks of 3 tokens of bfloat16: 30 bytes, no whole number of words


class Pools:
    """A small pool of random bytes, its books and its checksums."""

    def __init__(self, specs=SPECS, block_size=4, dtype=torch.float32) -> None:
        self.kv = KvPool(specs, block_size, dtype, "cpu", num_blocks=NUM_BLOCKS)
        self.bytes = self.kv.data.view(torch.uint8)
        self.bytes.copy_(torch.randint(0, 256, self.bytes.shape, generator=torch.Generator().manual_seed(7)))
        self.pool = BlockPool(NUM_BLOCKS, block_size)
        self.checksums = BlockChecksums(self.pool, self.kv)

    def row(self, block_id: int) -> bytes:
        return self.bytes[block_id].numpy().tobytes()


@pytest.fixture
def pools() -> Pools:
    return Pools()


@pytest.mark.parametrize(
    ("specs", "block_size", "dtype"),
    [(SPECS, 4, torch.float32), (SPECS, 4, torch.bfloat16), (UNEVEN, 3, torch.bfloat16)],
)
def test_a_blocks_checksum_is_that_of_its_bytes_whatever_their_type(specs, block_size, dtype):
    pools = Pools(specs, block_size, dtype)
    rows = [pools.row(block_id) for block_id in (4, 0, 2)]
    assert len(rows[0]) == pools.kv.block_bytes
    assert pools.checksums.compute([4, 0, 2]) == [checksum(row) for row in rows]
    assert pools.checksums.published([4, 0, 2]).tolist() == [checksum(row) for row in rows]


def test_no_blocks_have_no_checksums(pools):
    assert pools.checksums.compute([]) == []
    assert pools.checksums.published([]).tolist() == []


def test_equal_bytes_have_equal_checksums_wherever_they_lie():
    source, target = Pools(), Pools()
    target.bytes.zero_()
    target.kv.write_blocks([5, 1], source.kv.read_blocks([0, 3]))
    assert target.checksums.compute([5, 1]) == source.checksums.compute([0, 3])


def test_a_pool_in_given_memory_is_read_where_it_lies():
    size = Pools().kv.block_bytes
    memory = bytearray(range(256)) * -(-2 * size // 256)
    memory = memory[: 2 * size]
    kv = KvPool(SPECS, 4, torch.float32, "cpu", memoryview(memory))
    sums = BlockChecksums(BlockPool(2, 4), kv)
    memory[size] ^= 1
    assert sums.compute([1, 0]) == [checksum(memory[size:]), checksum(memory[:size])]


# ------------------------------------------------------------------------------------------------- what is remembered


def test_a_published_checksum_is_remembered_until_the_block_is_reused(pools):
    block_id, *_ = pools.pool.allocate(NUM_BLOCKS)
    first = pools.checksums.published([block_id]).tolist()
    before = pools.row(block_id)
    pools.bytes[block_id].add_(1)
    assert pools.checksums.published([block_id]).tolist() == first == [checksum(before)]
    pools.pool.unpin([block_id])
    assert pools.pool.allocate(1) == [block_id]
    assert pools.checksums.published([block_id]).tolist() == [checksum(pools.row(block_id))] != first


def test_only_what_is_not_known_is_computed_and_answers_come_in_order(pools, monkeypatch):
    asked: list[list[int]] = []
    compute = BlockChecksums.compute

    def counted(self, block_ids):
        asked.append(list(block_ids))
        return compute(self, block_ids)

    monkeypatch.setattr(BlockChecksums, "compute", counted)
    expected = {block_id: checksum(pools.row(block_id)) for block_id in range(NUM_BLOCKS)}
    for block_ids in ([2, 4], [4, 1, 2, 0], [0, 1, 2, 4], [2, 2]):
        assert pools.checksums.published(block_ids).tolist() == [expected[block_id] for block_id in block_ids]
    assert [block_ids for block_ids in asked if block_ids] == [[2, 4], [1, 0]]


def test_a_published_checksum_does_not_hide_what_the_block_holds_now(pools):
    published = pools.checksums.published([2]).tolist()
    pools.bytes[2].add_(1)
    now = pools.checksums.compute([2])
    assert now == [checksum(pools.row(2))] != published


def test_a_generation_of_zero_is_not_taken_for_a_known_one():
    kv = KvPool(SPECS, 4, torch.float32, "cpu", num_blocks=1)
    sums = BlockChecksums(BlockPool(1, 4, first_generation=0), kv)
    assert sums.published([0]).tolist() == [checksum(bytes(kv.block_bytes))]


# ------------------------------------------------------------------------------------------------- of a device's blocks


class DevicePools(Pools):
    """The same pool on a fake device."""

    def __init__(self) -> None:
        super().__init__()
        self.device = FakeDevice()
        self.checksums = BlockChecksums(self.pool, self.kv, DeviceCopies(self.device, self.bytes))

    def step(self, *kept: int) -> None:
        """A step is launched that writes its number to the blocks `kept`, which peers will read."""
        for block_id in kept:
            self.device.steps.run(lambda block_id=block_id: self.bytes[block_id].fill_(100 + block_id))
        self.checksums.launched(kept)


def test_what_a_device_is_still_to_write_has_the_checksum_of_what_it_writes():
    pools = DevicePools()
    pools.pool.allocate(NUM_BLOCKS)
    pools.step(1, 3)
    pools.step(2)
    assert pools.device.steps.num_waiting == 3  # nobody waited
    assert pools.checksums.known(3) is None
    wanted = [checksum(bytes([100 + block_id]) * pools.kv.block_bytes) for block_id in (3, 2, 1)]
    assert pools.checksums.published([3, 2, 1]).tolist() == wanted
    assert pools.checksums.known(3) == wanted[0]


def test_a_step_that_runs_is_not_waited_for_by_who_asks_for_other_blocks():
    pools = DevicePools()
    pools.pool.allocate(NUM_BLOCKS)
    pools.step(3)
    assert pools.checksums.published([5]).tolist() == [checksum(pools.row(5))]
    assert pools.device.steps.num_waiting == 1
    assert pools.checksums.known(3) is None


def test_checksums_for_which_there_is_no_memory_are_computed_when_they_are_asked_for(monkeypatch):
    pools = DevicePools()
    pools.pool.allocate(NUM_BLOCKS)

    def lack(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(DeviceCopies, "begin_checksums", lack)
        pools.step(1)
    pools.checksums.finished()
    assert pools.checksums.published([1]).tolist() == [checksum(bytes([101]) * pools.kv.block_bytes)]


def test_checksums_that_nobody_asks_for_are_taken_in_after_a_while():
    pools = DevicePools()
    pools.pool.allocate(NUM_BLOCKS)
    for _ in range(engine.memory.checksums._MAX_PENDING + 1):
        pools.step(1)
        pools.checksums.finished()
    assert pools.checksums.known(1) == checksum(bytes([101]) * pools.kv.block_bytes)


def test_steps_that_have_ended_are_done_when_they_were_waited_for():
    pools = DevicePools()
    assert pools.checksums.are_steps_done()
    pools.step(1)
    assert pools.checksums.are_steps_done()  # it has not ended: who has its blocks knows
    pools.checksums.finished()
    assert not pools.checksums.are_steps_done()
    pools.checksums.await_steps()
    assert pools.checksums.are_steps_done()
    assert pools.device.steps.num_waiting == 0


def test_a_devices_blocks_are_computed_where_nothing_was_begun():
    pools = DevicePools()
    assert pools.checksums.published([4, 0]).tolist() == [checksum(pools.row(4)), checksum(pools.row(0))]
    target = bytearray(pools.kv.block_bytes)
    assert pools.checksums.copy_out([4], memoryview(target), [0]) == [checksum(pools.row(4))]
    assert bytes(target) == pools.row(4)
