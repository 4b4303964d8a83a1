"""Offloading: blocks of a pool are written into the arena of a real node cache, and whoever pulls finds their bytes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine

import msgspec
import pytest
import torch

from engine.memory.checksums import BlockChecksums
from engine.memory.kv_pool import KvPool, LayerSpec
from engine.offload import Offloader
from engine.peers import Peers
from engine.puller import BlockPuller
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import Event, LendBlocks, OffloadBlocks
from engine.scheduling.scheduler import Scheduler
from kvcache.locations import each_location, num_locations
from kvcache.pool import BlockPool
from kvcache.region import GENERATION_BYTES, RegionLayout
from messages.fleet import WorkerInfo
from messages.handoff import BlockHint, RoomGranted, RoomRequest
from messages.wire import Message
from nodecache.process import CacheProcess
from nodecache.supervisor import Supervisor
from tests.nodecache.blocks import BLOCK_SIZE, layout_of
from tests.nodecache.client import CacheClient
from tests.nodecache.test_process import options_of
from tests.workers import until
from transport.channel import ChannelConfig
from transport.memory import Memory
from transport.protocol import RegionError
from transport.roads import PROBE_BYTES, Roads
from transport.secret import ClusterSecret
from transport.shm import ShmTransport

SECRET = ClusterSecret(b"\x11" * 32)
NUM_BLOCKS = 16
SPECS = [LayerSpec(1, 4, 4)]
BLOCK_BYTES = KvPool(SPECS, BLOCK_SIZE, torch.float32, "cpu", num_blocks=1).block_bytes


def name(number: int) -> bytes:
    return number.to_bytes(4, "little") * 4


class Worker:
    """The pool of a worker with random bytes in it, its scheduler, and the way down from there."""

    def __init__(self) -> None:
        self.layout = RegionLayout(NUM_BLOCKS, BLOCK_BYTES)
        self.memory = Memory.allocate(self.layout.num_bytes)
        kv = KvPool(SPECS, BLOCK_SIZE, torch.float32, "cpu", memory=self.memory.view[self.layout.data_offset :])
        rows = kv.data.view(torch.uint8)
        rows.copy_(torch.randint(0, 256, rows.shape, generator=torch.Generator().manual_seed(1)))
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, self.memory.view[: NUM_BLOCKS * GENERATION_BYTES].cast("Q"))
        checksums = BlockChecksums(self.pool, kv)
        self.scheduler = Scheduler(SchedulerConfig(max_model_len=256), self.pool, b"model")
        self.roads = Roads([ShmTransport()], self.memory, Memory.allocate(PROBE_BYTES), 5.0)
        self.told: list[Message] = []
        self.lost: list[str] = []
        self.peers = Peers(
            BlockPuller(self.layout, self.memory, checksums, self.roads),
            self.roads,
            SECRET,
            ChannelConfig(heartbeat_s=0.1, lost_after_s=2.0),
            self._take,
            self._lose,
            pytest.fail,
            lambda _: self.offloader.go_on(),
        )
        self.tasks: list[asyncio.Task[None]] = []
        self.offloader = Offloader(self.peers, checksums, self.post, self._spawn)

    def commit(self, *numbers: int) -> None:
        """Somebody computed these blocks, and ended."""
        block_ids = self.pool.allocate(len(numbers))
        for number, block_id in zip(numbers, block_ids, strict=True):
            self.pool.commit(block_id, name(number))
        self.pool.unpin(block_ids)

    def content(self, number: int) -> bytes:
        block_id = self.pool.find(name(number))
        assert block_id is not None
        return bytes(self.memory.view[self.layout.block_offset(block_id) :][:BLOCK_BYTES])

    def offer(self, *numbers: int, tenant: int = 0, hints: tuple[BlockHint, ...] = ()) -> None:
        self.offloader.offer(OffloadBlocks(tuple(map(name, numbers)), tenant, hints))

    def post(self, event: Event) -> None:
        for instruction in self.scheduler.on_event(event, 0.0):
            assert isinstance(instruction, LendBlocks)
            assert self.offloader.is_own(instruction)
            self.offloader.on_pinned(instruction)
        self.scheduler.check_invariants()

    async def settled(self, num_blocks: int) -> None:
        """Wait until nothing is to be written any more; so many blocks were in all."""
        await until(lambda: not (self.offloader._asked or self.offloader._waiting or self.pool.num_used))
        assert self.offloader.num_blocks == num_blocks

    def _take(self, address: str, message: Message) -> None:
        self.told.append(message)
        assert isinstance(message, RoomGranted)
        self.offloader.on_granted(message)

    def _lose(self, address: str) -> None:
        self.lost.append(address)
        self.offloader.use(None)

    def _spawn(self, coroutine: Coroutine) -> asyncio.Task[None]:
        self.tasks.append(asyncio.get_running_loop().create_task(coroutine))
        return self.tasks[-1]

    async def close(self) -> None:
        await asyncio.gather(*self.tasks)
        self.peers.close()
        self.roads.close()
        self.scheduler.check_invariants()


class World:
    """A worker, and the node cache that it writes to."""

    process: CacheProcess  #: where it runs on this loop

    def __init__(self, num_blocks: int = 8) -> None:
        self.worker = Worker()
        self.options = msgspec.structs.replace(options_of(num_blocks), layout=layout_of(num_blocks, BLOCK_BYTES))
        self.infos: list[WorkerInfo] = []  #: of those that serve, one after the other
        self.clients: list[CacheClient] = []

    @property
    def address(self) -> str:
        return self.infos[-1].address

    async def use(self) -> None:
        """Write to the cache that serves now, which has described its arena."""
        self.worker.offloader.use(self.address)
        await until(lambda: self.worker.peers.region_of(self.address, "shm"))

    async def fetch(self, *numbers: int) -> dict[int, bytes]:
        """What another worker gets of these blocks, verified."""
        held = await (await self.client()).fetch([name(number) for number in numbers])
        return {number: held[name(number)] for number in numbers if name(number) in held}

    async def client(self) -> CacheClient:
        self.clients.append(CacheClient(SECRET, self.address, BLOCK_BYTES))
        await self.clients[-1].open()
        return self.clients[-1]

    async def close(self) -> None:
        await self.worker.close()
        for client in self.clients:
            client.close()


@pytest.fixture
async def world():
    """The node cache runs on this loop."""
    made = World()
    process = CacheProcess(made.options, SECRET, made.options.layout.allocate(), {})
    made.infos.append(await process.start())
    made.process = process
    yield made
    await made.close()
    process.cache.check_invariants()
    await process.close()


@pytest.fixture
async def supervised():
    """The node cache is a process of its own, followed by another one."""
    made = World()
    supervisor = Supervisor(made.options, SECRET, made.infos.append)
    await supervisor.start()
    yield made, supervisor
    await made.close()
    await supervisor.close()


async def test_what_is_offered_lies_in_the_cache_byte_for_byte(world):
    world.worker.commit(1, 2, 3)
    world.worker.offer(1, 2, 3)  # nobody is there yet
    assert not world.worker.pool.num_used
    await world.use()
    await world.worker.settled(3)
    assert await world.fetch(1, 2, 3) == {number: world.worker.content(number) for number in (1, 2, 3)}


async def test_chains_go_down_one_after_the_other_and_what_is_there_is_not_written_again(world):
    world.worker.commit(1, 2, 3, 4)
    await world.use()
    for chain in ((1, 2), (1, 2, 3), (1, 2), (4,)):
        world.worker.offer(*chain)
    await world.worker.settled(4)
    granted = [[block.index for block in each_location(grant.blocks)] for grant in world.worker.told]
    assert granted == [[0, 1], [2], [], [0]]  # one question each: what went down whole is not asked for again


async def test_what_was_evicted_meanwhile_is_left_out_and_its_room_given_back(world):
    world.worker.commit(1, 3)
    world.worker.offer(1, 2, 3, 4)
    await world.use()
    await world.worker.settled(2)
    assert (await world.fetch(1, 2, 3, 4)).keys() == {1, 3}
    granted = await world.clients[0].room([name(2), name(4)])
    assert [block.name for block in each_location(granted.blocks)] == [name(2), name(4)]


async def test_where_nothing_is_left_to_write_the_next_chain_has_its_turn(world):
    world.worker.commit(5)
    world.worker.offer(1, 2)
    world.worker.offer(5)
    await world.use()
    await world.worker.settled(1)


async def test_a_chain_for_which_there_is_no_room_at_once_goes_down_in_parts(world):
    """No more than half of the arena, of eight blocks here, is given out to be written at a time."""
    numbers = range(1, 8)
    world.worker.commit(*numbers)
    world.worker.offer(*numbers)
    await world.use()
    await world.worker.settled(7)
    sizes = [num_locations(granted.blocks) for granted in world.worker.told]
    assert max(sizes) == 4
    assert sum(sizes) == 7
    assert world.process.cache.num_seen_again == 0


async def test_room_that_was_taken_back_is_not_written_to(world):
    world.worker.commit(1, 2)
    await world.use()
    client = await world.client()
    written = []
    write = world.worker.offloader._write

    def take_back_then_write(arena, *args):
        world.worker.offloader._write = write
        granted = each_location(world.worker.told[-1].blocks)
        client._generations[granted[0].block_id] += 1  # as its owner does it
        packed = write(arena, *args)
        written.extend(each_location(packed))
        return packed

    world.worker.offloader._write = take_back_then_write
    world.worker.offer(1, 2)
    await world.worker.settled(2)  # it is asked for again
    assert [block.name for block in written] == [name(2)]
    assert await world.fetch(1, 2) == {number: world.worker.content(number) for number in (1, 2)}


async def test_whose_blocks_they_are_is_told(world, monkeypatch):
    world.worker.commit(1, 2, 3)
    await world.use()
    asked: list[RoomRequest] = []
    send = world.worker.peers.send
    monkeypatch.setattr(world.worker.peers, "send", lambda to, message: (asked.append(message), send(to, message)))
    for number, tenant in ((1, 0), (2, 77), (3, 2**64 - 1)):
        world.worker.offer(number, tenant=tenant)
        await world.worker.settled(number)
    tenants = {message.names: message.tenant for message in asked if isinstance(message, RoomRequest)}
    assert tenants == {name(1): 0, name(2): 77, name(3): 2**64 - 1}


async def test_of_too_many_that_wait_the_oldest_are_forgotten(world):
    world.worker.commit(1, 2)
    world.worker.offer(1)
    for _ in range(256):
        world.worker.offer(2)
    await world.use()
    await world.worker.settled(1)
    assert (await world.fetch(1, 2)).keys() == {2}
    assert world.worker.offloader.num_dropped == 1


async def test_what_a_request_wants_kept_is_kept_though_too_many_wait(world):
    world.worker.commit(1, 2, 3)
    world.worker.offer(1, 2, hints=(BlockHint(0, 1, None, 60.0),))
    for _ in range(600):
        world.worker.offer(3)
    assert len(world.worker.offloader._waiting) == 256
    await world.use()
    await world.worker.settled(3)
    pool = world.process.cache.pool
    rows = pool.records(pool.find(b"".join(map(name, (1, 2, 3)))))
    assert (rows["pinned_until_s"] > 0).tolist() == [True, False, False]


async def test_of_too_many_with_hints_the_oldest_go(world):
    world.worker.commit(1, 2, 3)
    for number in (1, *[2] * 256, 3):
        world.worker.offer(number, hints=(BlockHint(0, None, 1, 0.0),) if number != 3 else ())
    await world.use()
    await world.worker.settled(1)
    assert (await world.fetch(1, 2, 3)).keys() == {2}
    assert world.worker.offloader.num_dropped == 2


@pytest.mark.slow
async def test_a_cache_that_is_killed_under_a_copy_leaves_nothing_pinned_and_its_successor_is_written_to(supervised):
    world, supervisor = supervised
    world.worker.commit(1, 2, 3)
    await world.use()
    world.worker.offer(1)
    await world.worker.settled(1)
    write = world.worker.offloader._write

    def kill_then_write(*args):
        world.worker.offloader._write = write
        os.kill(supervisor.pid, signal.SIGKILL)
        return write(*args)

    world.worker.offloader._write = kill_then_write
    world.worker.offer(1, 2)
    await until(lambda: world.worker.lost and not world.worker.pool.num_used)
    world.worker.offer(1, 3)
    await until(lambda: len(world.infos) == 2, timeout_s=30)
    await world.use()
    await until(lambda: not (world.worker.offloader._waiting or world.worker.offloader._asked))
    assert await world.fetch(1, 2, 3) == {number: world.worker.content(number) for number in (1, 2, 3)}


async def test_nothing_goes_where_there_is_no_shared_memory(world, monkeypatch):
    world.worker.commit(1)
    monkeypatch.setattr(world.worker.peers, "region_of", lambda address, road: None)
    world.worker.offloader.use(world.address)
    world.worker.offer(1)
    await until(lambda: world.worker.peers.layout_of(world.address))
    assert (world.worker.told, world.worker.pool.num_used) == ([], 0)


async def test_what_waited_for_an_arena_that_cannot_be_reached_is_counted(world, monkeypatch):
    def refuse(*_, **__):
        raise RegionError("it is on another machine")

    monkeypatch.setattr("engine.offload.open_region", refuse)
    for number in (1, 2, 3):
        world.worker.offer(number)
    await world.use()
    await until(lambda: not world.worker.offloader._waiting)
    assert world.worker.offloader.num_dropped == 3


async def test_of_a_chain_that_was_heard_of_nothing_is_kept(world, monkeypatch):
    monkeypatch.setattr("engine.offload._HEARD_AFTER_S", 0.05)
    world.worker.commit(1)
    world.worker.offer(1)
    await world.use()
    await world.worker.settled(1)
    await until(lambda: world.worker.offloader._told is None)
    world.worker.offloader.use(None)
    assert not world.worker.offloader._waiting
    assert world.worker.offloader._chain is None


async def test_a_worker_that_leaves_waits_until_all_that_waits_is_written(world):
    await world.use()
    world.worker.commit(*range(1, 9))
    for number in range(1, 9):
        world.worker.offer(number)
    await world.worker.offloader.finish()
    assert world.worker.offloader.num_blocks == 8
    assert len(await world.fetch(*range(1, 9))) == 8


async def test_a_worker_that_leaves_waits_for_nobody_where_there_is_no_cache(world):
    world.worker.commit(1)
    world.worker.offer(1)
    async with asyncio.timeout(0.02):
        await world.worker.offloader.finish()


async def test_a_worker_that_leaves_does_not_wait_for_ever(world, monkeypatch):
    monkeypatch.setattr("engine.offload._FINISH_S", 0.1)
    await world.use()
    with monkeypatch.context() as patch:
        patch.setattr(world.worker.offloader, "on_granted", lambda granted: None)
        world.worker.commit(1)
        world.worker.offer(1)
        async with asyncio.timeout(5.0):
            await world.worker.offloader.finish()
        assert world.worker.offloader.num_blocks == 0
