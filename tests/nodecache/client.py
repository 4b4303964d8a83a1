"""A worker's side of the node cache's protocol, over real sockets and shared memory: writes blocks, pulls blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from kvcache.locations import BlockLocation, each_location, pack_locations
from kvcache.names import split_names
from kvcache.region import RegionLayout
from messages.fleet import GetStats, KvEvents, LoadReport, Stats, Subscribe
from messages.handoff import (
    BlocksRequest,
    BlocksWritten,
    DescribeRegions,
    KvHandoff,
    RegionsDescribed,
    ReleaseLease,
    RoadMessage,
    RoomGranted,
    RoomRequest,
)
from messages.wire import Message
from tests.nodecache.blocks import BLOCK_SIZE, checksum, content_of
from transport.channel import ChannelClient, ChannelConfig
from transport.memory import Memory
from transport.protocol import Copy, TransferError, Transport
from transport.roads import PROBE_BYTES, Roads
from transport.secret import ClusterSecret
from transport.shm import ShmTransport, open_region

_ids = count()


class CacheLostError(Exception):
    """The node cache is gone."""


class CacheClient:
    """One connection to one node cache process. `on_step` is called between any two steps of what is done."""

    def __init__(
        self,
        secret: ClusterSecret,
        address: str,
        block_bytes: int,
        on_step: Callable[[], None] = lambda: None,
        transports: Sequence[Transport] = (),
    ) -> None:
        self.block_bytes = block_bytes
        self.on_step = on_step
        self.tiers: dict[str, set[bytes]] = {}  #: what the events said is held, by tier
        self.seqs: list[int] = []
        self.lost = asyncio.Event()
        self._answers: dict[str, asyncio.Queue[Message]] = {}
        self._target = Memory.allocate(block_bytes)
        self._scratch = Memory.allocate(PROBE_BYTES)
        self._roads = Roads(transports or [ShmTransport()], self._target, self._scratch, stall_s=5.0)
        self.client = ChannelClient(secret, address, self._take, self._lose, config=ChannelConfig(heartbeat_s=0.1))
        self._link = self._roads.connect(lambda road, body: self.client.send(RoadMessage(road=road, body=body)))

    async def open(self) -> None:
        """Ask where the blocks lie, and map them writable."""
        self.client.send(DescribeRegions())
        described = await self._answer("regions")
        assert isinstance(described, RegionsDescribed)
        self.layout = RegionLayout(described.num_blocks, self.block_bytes, described.has_generations)
        self._roads.learn(self._link, described.regions)
        region = next(region for region in described.regions if region.road == "shm")
        assert region.num_bytes == self.layout.num_bytes
        self.arena = open_region(region, is_writable=True)
        self._generations = np.frombuffer(self.arena.view, np.uint64, described.num_blocks)

    async def room(self, names: Sequence[bytes], first_index: int = 0, tenant: int = 0) -> RoomGranted:
        request_id = f"room {next(_ids)}"
        indexes = list(range(first_index, first_index + len(names)))
        self.client.send(RoomRequest(request_id=request_id, names=b"".join(names), indexes=indexes, tenant=tenant))
        granted = await self._answer(request_id)
        assert isinstance(granted, RoomGranted)
        return granted

    async def write(self, names: Sequence[bytes], first_index: int = 0, tenant: int = 0) -> list[bytes]:
        """Write blocks into the arena; return the names of those that the node cache has for sure taken in."""
        granted = await self.room(names, first_index, tenant)
        written: list[BlockLocation] = []
        for location in each_location(granted.blocks):
            self.on_step()
            if int(self._generations[location.block_id]) == location.generation:
                written.append(self.fill(location))
        self.on_step()
        self.client.send(BlocksWritten(request_id=granted.request_id, blocks=pack_locations(written)))
        self.on_step()
        await self.stats()
        return [location.name for location in written]

    def fill(self, location: BlockLocation) -> BlockLocation:
        """Write a granted block's bytes; return what is to be told of it."""
        data = content_of(location.name, self.block_bytes)
        begin = self.layout.block_offset(location.block_id)
        half = self.block_bytes // 2
        self.arena.view[begin : begin + half] = data[:half]
        self.on_step()
        self.arena.view[begin + half : begin + self.block_bytes] = data[half:]
        return BlockLocation(
            *(location.index, location.block_id, location.generation, location.name),
            *(BLOCK_SIZE, checksum(memoryview(data))),
        )

    async def offers(self, request_id: str, names: Sequence[bytes], **options) -> list[KvHandoff]:
        """Ask for blocks and wait for all that is offered."""
        self.client.send(BlocksRequest(request_id=request_id, names=b"".join(names), **{"first_index": 0} | options))
        handoffs: list[KvHandoff] = []
        while not handoffs or not handoffs[-1].is_last:
            handoff = await self._answer(request_id)
            assert isinstance(handoff, KvHandoff)
            handoffs.append(handoff)
        return handoffs

    async def fetch(self, names: Sequence[bytes], **options) -> dict[bytes, bytes]:
        """Pull what is offered of these blocks, verify it, release it; the bytes of those that came whole."""
        request_id = f"fetch {next(_ids)}"
        handoffs = await self.offers(request_id, names, **options)
        arrived: dict[bytes, bytes] = {}
        for location in (location for handoff in handoffs for location in each_location(handoff.blocks)):
            self.on_step()
            data = await self.pull(location)
            if data is not None:
                arrived[location.name] = data
        self.client.send(ReleaseLease(request_id=request_id))
        return arrived

    async def pull(self, location: BlockLocation) -> bytes | None:
        """Pull one block; None where it does not come or does not have its checksum."""
        copy = Copy(self.layout.block_offset(location.block_id), 0, self.block_bytes)
        try:
            await self._roads.pull(self._link, [copy], self._target)
        except TransferError:
            return None
        data = bytes(self._target.view[: self.block_bytes])
        return data if checksum(memoryview(data)) == location.checksum else None

    async def stats(self) -> dict[str, float]:
        query_id = f"stats {next(_ids)}"
        self.client.send(GetStats(query_id=query_id))
        answer = await self._answer(query_id)
        assert isinstance(answer, Stats)
        return answer.values

    async def subscribe(self) -> None:
        self.client.send(Subscribe())
        assert isinstance(await self._answer("report"), LoadReport)

    def close(self) -> None:
        self.client.close()
        self._roads.disconnect(self._link)
        self._roads.close()
        self._target.close()
        self._scratch.close()

    async def _answer(self, key: str) -> Message:
        queue = self._answers.setdefault(key, asyncio.Queue())
        waiting = asyncio.ensure_future(queue.get())
        lost = asyncio.ensure_future(self.lost.wait())
        await asyncio.wait([waiting, lost], return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        raise CacheLostError

    def _take(self, message: Message) -> None:
        match message:
            case RegionsDescribed():
                key = "regions"
            case RoadMessage(road=road, body=body):
                self._roads.on_message(self._link, road, body)
                return
            case KvEvents():
                self._fold(message)
                return
            case LoadReport():
                key = "report"
            case Stats(query_id=query_id):
                key = query_id
            case RoomGranted(request_id=request_id) | KvHandoff(request_id=request_id):
                key = request_id
            case _:
                raise AssertionError(message)
        self._answers.setdefault(key, asyncio.Queue()).put_nowait(message)

    def _fold(self, events: KvEvents) -> None:
        """Do as the router's index does."""
        if events.cleared:
            self.tiers.clear()
            self.seqs.clear()
        self.seqs.append(events.seq)
        held = self.tiers.setdefault(events.tier, set())
        held.update(split_names(events.stored))
        held.difference_update(split_names(events.removed))

    def _lose(self, reason: str) -> None:
        self.lost.set()
