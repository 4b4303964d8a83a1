"""The node cache over real sockets and shared memory, in this process, with a store that can fail."""

import asyncio
import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcache.locations import each_location, num_locations, pack_locations
from messages.fleet import WorkerInfo
from messages.handoff import BlocksWritten, KvHandoff, ReleaseLease
from nodecache.cache import CacheLimits
from nodecache.loopback import LoopbackStore
from nodecache.process import CacheOptions, CacheProcess, CacheSettings
from nodecache.store import StoreError
from tests.nodecache.blocks import BLOCK_SIZE, checksum, content_of, layout_of, names_of
from tests.nodecache.client import CacheClient
from transport.channel import ChannelConfig
from transport.opening import RoadOptions
from transport.protocol import Transport
from transport.secret import ClusterSecret
from transport.socket.road import SocketTransport

ROOT = Path(__file__).parents[2]
BLOCK_BYTES = 4096


def options_of(num_blocks: int, **limits) -> CacheOptions:
    return CacheOptions(
        layout=layout_of(num_blocks, BLOCK_BYTES),
        block_size=BLOCK_SIZE,
        host="127.0.0.1",
        channel=ChannelConfig(heartbeat_s=0.1, lost_after_s=2.0),
        roads=RoadOptions(names=("shm", "socket")),
        limits=CacheLimits(**{"lease_s": 30.0, "batch_bytes": 4 * BLOCK_BYTES} | limits),
        stall_s=5.0,
    )


def test_blocks_kept_with_a_loss_go_by_other_names():
    fingerprint = b"f" * 32
    settings = [CacheSettings(remote="/b", remote_compression=each) for each in ("off", "lossless", "int8")]
    exact, also_exact, lossy = (each.fingerprint_of(fingerprint) for each in settings)
    assert exact == also_exact == fingerprint != lossy
    assert len(lossy) == 32
    assert settings[2].fingerprint_of(b"g" * 32) != lossy
    assert CacheSettings(disk_dir="/d", remote_compression="int8").fingerprint_of(fingerprint) == fingerprint


class Served:
    """A node cache on this loop, and its clients."""

    def __init__(self, num_blocks: int, stores, **limits) -> None:
        options = options_of(num_blocks, **limits)
        self.secret = ClusterSecret.generate()
        self.process = CacheProcess(options, self.secret, options.layout.allocate(), stores)
        self.clients: list[CacheClient] = []

    async def open(self, *transports: Transport) -> CacheClient:
        if not self.clients:
            self.info = await self.process.start()
        client = CacheClient(self.secret, self.info.address, BLOCK_BYTES, transports=transports)
        self.clients.append(client)
        await client.open()
        return client

    async def settled(self, is_so) -> None:
        """Wait until `is_so()`: what is sent at the same time is done by and by."""
        async with asyncio.timeout(20):
            while not is_so():  # noqa: ASYNC110 - the state has no event
                await asyncio.sleep(0.005)


@pytest.fixture
async def served():
    async with contextlib.AsyncExitStack() as stack:

        def serve(num_blocks=64, stores=None, **limits):
            made = Served(num_blocks, stores or {}, **limits)
            stack.push_async_callback(close, made)
            return made

        async def close(made):
            made.process.cache.check_invariants()
            for client in made.clients:
                client.close()
            await made.process.close()

        yield serve


async def test_blocks_written_by_one_worker_are_read_by_another(served):
    made = served()
    writer, reader = await made.open(), await made.open()
    names = names_of(range(20))
    assert await writer.write(names) == names
    assert await writer.write(names) == []
    assert await reader.fetch(names) == {name: content_of(name, BLOCK_BYTES) for name in names}
    assert await reader.fetch(names_of(range(100, 110))) == {}
    values = await reader.stats()
    assert values["kvray_blocks_pinned"] == 0
    assert values["kvray_cache_written_total"] == 20
    assert values['kvray_cache_offered_total{tier="host"}'] == 20
    assert values["kvray_cache_missed_total"] == 10
    assert values["kvray_cache_bookkeeping_bytes"] <= 160 * 64 + 1024


async def test_the_info_describes_an_owner_of_blocks(served):
    made = served()
    await made.open()
    assert isinstance(made.info, WorkerInfo)
    assert (made.info.role, made.info.num_blocks, made.info.block_bytes) == ("cache", 64, BLOCK_BYTES)
    assert made.info.roads == ("shm", "socket")


async def test_a_worker_of_another_node_pulls_over_the_network(served):
    made = served()
    writer = await made.open()
    names = names_of(range(8))
    await writer.write(names)
    reader = await made.open(SocketTransport(made.secret, "127.0.0.1", port_range=(20000, 20999)))
    assert await reader.fetch(names) == {name: content_of(name, BLOCK_BYTES) for name in names}
    assert (await reader.stats())["kvray_blocks_pinned"] == 0


async def test_two_writers_of_one_block_get_room_once_and_two_readers_lease_it_twice(served):
    made = served()
    one, other = await made.open(), await made.open()
    names = names_of(range(4))
    granted, refused = await one.room(names), await other.room(names)
    assert num_locations(granted.blocks) == 4
    assert refused.blocks == b""
    one.client.send(
        BlocksWritten(
            request_id=granted.request_id, blocks=pack_locations(one.fill(b) for b in each_location(granted.blocks))
        )
    )
    await one.stats()
    # The same id from two askers is two questions.
    for client in (one, other):
        [handoff] = await client.offers("q", names)
        assert [location.name for location in each_location(handoff.blocks)] == names
        assert handoff.tier == "host"
    pool = made.process.cache.pool
    one.client.send(ReleaseLease(request_id="q"))
    await one.stats()
    assert pool.num_used == 4
    other.client.send(ReleaseLease(request_id="q"))
    await other.stats()
    assert pool.num_used == 0


@pytest.mark.slow
async def test_a_lost_asker_holds_nothing_and_a_lost_writer_gives_its_room_back_later(served):
    made = served(8, quarantine_s=0.2)
    keeper, lost = await made.open(), await made.open()
    await keeper.write(names_of(range(4)))
    await lost.offers("q", names_of(range(4)))
    granted = await lost.room(names_of(range(10, 14)))
    assert num_locations(granted.blocks) == 4
    pool = made.process.cache.pool
    assert pool.num_used == 8
    lost.close()
    await made.settled(lambda: pool.num_used == 0)
    assert pool.num_quarantined + pool.num_empty == 4
    await made.settled(lambda: pool.num_empty == 4)
    assert len(await keeper.write(names_of(range(10, 14)))) == 4


@pytest.mark.slow
async def test_leases_end_and_late_words_about_ended_grants_are_ignored(served):
    made = served(8, lease_s=0.2, quarantine_s=0.1)
    client = await made.open()
    await client.write(names_of(range(2)))
    await client.offers("q", names_of(range(2)))
    granted = await client.room(names_of(range(10, 12)))
    pool = made.process.cache.pool
    await made.settled(lambda: pool.num_used == 0 and pool.num_quarantined == 0)
    client.client.send(
        BlocksWritten(
            request_id=granted.request_id, blocks=pack_locations(client.fill(b) for b in each_location(granted.blocks))
        )
    )
    assert (await client.stats())["kvray_leases_expired_total"] == 2
    assert await client.fetch(names_of(range(10, 12))) == {}


async def test_what_left_the_arena_comes_back_from_the_store_batch_by_batch(served):
    store = LoopbackStore(1000, checksum)
    made = served(16, {"disk": store})
    client = await made.open()
    names = names_of(range(40))
    for begin in range(0, 40, 8):
        await client.write(names[begin : begin + 8], begin)
        await made.settled(lambda end=begin + 8: len(list(store.names())) == end)
    handoffs = await client.offers("q", names[:12])
    assert {location.name for handoff in handoffs for location in each_location(handoff.blocks)} == set(names[:12])
    assert [handoff.is_last for handoff in handoffs] == [False] * (len(handoffs) - 1) + [True]
    assert [handoff.tier for handoff in handoffs] == ["disk"] * len(handoffs)
    indexes = [location.index for handoff in handoffs for location in each_location(handoff.blocks)]
    assert sorted(indexes) == list(range(12))  # batches are read beside each other
    client.client.send(ReleaseLease(request_id="q"))
    assert await client.fetch(names[:12]) == {name: content_of(name, BLOCK_BYTES) for name in names[:12]}


async def test_of_a_prompt_larger_than_the_arena_comes_what_has_room(served):
    store = LoopbackStore(1000, checksum)
    made = served(8, {"disk": store})
    client = await made.open()
    names = names_of(range(24))
    for begin in range(0, 24, 4):
        await client.write(names[begin : begin + 4], begin)
        await made.settled(lambda end=begin + 4: len(list(store.names())) == end)
    arrived = await client.fetch(names)
    assert 0 < len(arrived) <= 8
    assert all(arrived[name] == content_of(name, BLOCK_BYTES) for name in arrived)
    assert (await client.stats())["kvray_blocks_pinned"] == 0


async def test_the_tail_comes_first_where_it_is_wanted_first(served):
    made = served()
    client = await made.open()
    await client.write(names_of(range(6)))
    [handoff] = await client.offers("q", names_of(range(2, 6)), is_tail_first=True, first_index=2)
    assert [location.index for location in each_location(handoff.blocks)] == [5, 4, 3, 2]


@pytest.mark.slow
async def test_a_store_that_fails_or_damages_costs_its_blocks_and_nothing_else(served):
    store = LoopbackStore(1000, checksum)
    made = served(8, {"disk": store})
    client = await made.open()
    names = names_of(range(16))
    for begin in range(0, 16, 4):
        await client.write(names[begin : begin + 4], begin)
        await made.settled(lambda end=begin + 4: len(list(store.names())) == end)
    missing = [name for name in names if made.process.cache.pool.find(name)[0] < 0]
    store.damage(missing[0])
    assert set(await client.fetch(missing[:4])) == set(missing[1:4])
    assert store.find(missing[0]) is None
    store.error = StoreError("gone")
    assert await client.fetch(missing[4:8]) == {}
    # Left alone for a while, then asked again.
    assert await client.fetch(missing[4:8]) == {}
    assert (await client.stats())['kvray_cache_store_failures_total{tier="disk"}'] == 1
    store.error = None
    await made.settled(lambda: made.process.cache.tiers["disk"].is_usable(time.monotonic()))
    assert set(await client.fetch(missing[4:8])) == set(missing[4:8])


async def test_a_store_that_does_not_answer_delays_nobody_else_and_is_given_up(served):
    store = LoopbackStore(1000, checksum)
    made = served(8, {"disk": store}, read_deadline_s=0.3)
    client, other = await made.open(), await made.open()
    names = names_of(range(16))
    for begin in range(0, 16, 4):
        await client.write(names[begin : begin + 4], begin)
        await made.settled(lambda end=begin + 4: len(list(store.names())) == end)
    held = [name for name in names if made.process.cache.pool.find(name)[0] >= 0]
    missing = [name for name in names if name not in held]
    store.answers.clear()
    asked = asyncio.create_task(client.offers("q", missing[:4]))
    await made.settled(lambda: made.process.cache.reading.num_bound == 4)
    there = [name for name in held if made.process.cache.pool.find(name)[0] >= 0]
    assert set(await other.fetch(held)) == set(there)
    assert not asked.done()
    [handoff] = await asked
    assert (handoff.blocks, handoff.is_last) == (b"", True)
    store.answers.set()
    await made.settled(lambda: made.process.cache.pool.num_used == 0)


async def test_a_subscriber_knows_every_tier_and_hears_every_change_once(served):
    store = LoopbackStore(12, checksum)
    made = served(8, {"disk": store})
    client, late = await made.open(), await made.open()
    await client.subscribe()
    names = names_of(range(24))
    for begin in range(0, 24, 4):
        await client.write(names[begin : begin + 4], begin)
    await made.settled(lambda: made.process.cache.writing_down.num_bound == 0)
    await client.stats()
    await late.subscribe()
    for told in (client, late):
        assert told.tiers["host"] == {name for name in names if made.process.cache.pool.find(name)[0] >= 0}
        assert told.tiers["disk"] == set(store.names())
        assert told.seqs == list(range(len(told.seqs)))
    assert late.seqs == [0, 1]


async def test_the_answer_to_nothing_is_nothing(served):
    made = served()
    client = await made.open()
    [handoff] = await client.offers("q", [])
    assert handoff == KvHandoff(request_id="q", lease_s=30.0, blocks=b"", tier="host", elapsed_s=handoff.elapsed_s)
    assert (await client.stats())["kvray_leases"] == 0


@pytest.mark.slow
async def test_a_prompt_of_a_million_tokens_is_looked_up_in_one_answer(served):
    store = LoopbackStore(10, checksum)
    made = served(64, {"disk": store})
    client = await made.open()
    names = names_of(range(1_000_000 // BLOCK_SIZE))
    assert await client.write(names[:32]) == names[:32]
    [handoff] = await client.offers("q", names)
    assert [location.name for location in each_location(handoff.blocks)] == names[:32]
    assert (await client.stats())["kvray_cache_missed_total"] == len(names) - 32


@pytest.mark.slow
def test_the_process_is_imported_at_once_and_without_torch_or_ray():
    code = (
        "import sys, time; import nodecache.process; print(time.process_time());"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    seconds, names = [], set()
    for _ in range(3):
        out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).splitlines()
        seconds.append(float(out[0]))
        names |= set(out[1].split())
    assert not names & {"torch", "ray", "transformers", "fastapi", "pyarrow"}
    assert min(seconds) < 0.5
