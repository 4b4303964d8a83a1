"""A worker's side of the node cache without an engine: its pool, its way down (engine.offload), its pulls."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from engine.memory.checksums import BlockChecksums
from engine.memory.kv_pool import KvPool, LayerSpec
from engine.offload import Offloader
from engine.peers import Peers
from engine.puller import BlockPuller
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import BlocksReleased, Event, LendBlocks, OffloadBlocks
from engine.scheduling.scheduler import Scheduler
from kvcache.locations import BlockLocation, each_location
from kvcache.names import NAME_BYTES
from kvcache.pool import BlockPool
from kvcache.region import GENERATION_BYTES, RegionLayout
from messages.fleet import GetStats, Stats
from messages.handoff import BlocksRequest, KvHandoff, ReleaseLease, RoomGranted
from messages.wire import Message
from transport.channel import ChannelConfig
from transport.memory import Memory
from transport.roads import PROBE_BYTES, Roads
from transport.secret import ClusterSecret
from transport.shm import ShmTransport

BLOCK_SIZE = 16
#: Eight layers, four KV heads of 64: 8 KiB a token in two bytes, 128 KiB a block.
LAYERS = [LayerSpec(4, 64, 64)] * 8
BLOCK_BYTES = 128 << 10
_STALL_S = 10.0


def names_of(first: int, num_blocks: int) -> list[bytes]:
    """Make the names of blocks number `first` and on: digests, as all names are."""
    return [blake2b(b"%d" % number, digest_size=NAME_BYTES).digest() for number in range(first, first + num_blocks)]


class TierWorker:
    """The pool of a worker with random bytes in it, and what it takes to store and retrieve. One event loop."""

    def __init__(self, num_blocks: int, secret: ClusterSecret) -> None:
        self._layout = RegionLayout(num_blocks, BLOCK_BYTES)
        self.memory = Memory.allocate(self._layout.num_bytes)
        kv = KvPool(LAYERS, BLOCK_SIZE, torch.bfloat16, "cpu", memory=self.memory.view[self._layout.data_offset :])
        assert kv.block_bytes == BLOCK_BYTES
        rows = np.frombuffer(self.memory.view, np.uint8)[self._layout.data_offset :]
        rows[:] = np.random.default_rng(7).integers(0, 256, len(rows), np.uint8)
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, self.memory.view[: num_blocks * GENERATION_BYTES].cast("Q"))
        checksums = BlockChecksums(self.pool, kv)
        self._scheduler = Scheduler(SchedulerConfig(max_model_len=num_blocks * BLOCK_SIZE), self.pool, b"model")
        self._roads = Roads([ShmTransport()], self.memory, Memory.allocate(PROBE_BYTES), _STALL_S)
        self.peers = Peers(
            BlockPuller(self._layout, self.memory, checksums, self._roads),
            *(self._roads, secret, ChannelConfig(), self._take, self._lose, self._lose),
            lambda _: self._offloader.go_on(),
        )
        self._offloader = Offloader(self.peers, checksums, self._post, self._spawn)
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._numbers = itertools.count()
        self._released = asyncio.Event()
        self._address = ""

    async def use(self, address: str) -> None:
        """Store in, and retrieve from, the node cache at `address`."""
        self._address = address
        self._offloader.use(address)
        while self.peers.region_of(address, "shm") is None:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)

    def block_offset(self, block_id: int) -> int:
        """Return where a block begins in the worker's memory."""
        return self._layout.block_offset(block_id)

    def make(self, names: list[bytes]) -> list[int]:
        """Let somebody have computed these blocks; return which they are."""
        block_ids = self.pool.allocate(len(names))
        for block_id, name in zip(block_ids, names, strict=True):
            self.pool.commit(block_id, name)
        self.pool.unpin(block_ids)
        return block_ids

    async def store(self, names: list[bytes]) -> None:
        """Write blocks of the pool into the arena, until the node cache has them committed."""
        num_wanted = self._offloader.num_blocks + len(names)
        self._offloader.offer(OffloadBlocks(tuple(names), tenant=0))
        while self._offloader.num_blocks < num_wanted:
            await self._released.wait()
            self._released.clear()
        self.peers.send(self._address, GetStats(query_id="stored"))
        while not isinstance(await self._answers.get(), Stats):
            pass

    async def retrieve(self, names: list[bytes]) -> list[tuple[BlockLocation, int]]:
        """Bring blocks into the pool, verified; return whence each came and whither it went."""
        request_id = f"retrieve {next(self._numbers)}"
        pairs: list[tuple[BlockLocation, int]] = []
        pulls: list[Coroutine[Any, Any, Any]] = []
        self.peers.send(self._address, BlocksRequest(request_id=request_id, first_index=0, names=b"".join(names)))
        block_ids = iter(self.pool.allocate(len(names)))
        is_last = False
        while not is_last:
            handoff = await self._answers.get()
            assert isinstance(handoff, KvHandoff)
            some = [(location, next(block_ids)) for location in each_location(handoff.blocks)]
            is_last = handoff.is_last
            pairs += some
            if some:
                targets = [block_id for _, block_id in some]
                pulls.append(self.peers.pull(self._address, handoff.blocks, targets, lambda: None))
        outcomes = await asyncio.gather(*pulls)
        self.peers.send(self._address, ReleaseLease(request_id=request_id))
        assert not any(outcome.bad for outcome in outcomes), "blocks did not come whole"
        assert len(pairs) == len(names), f"{len(pairs)} of {len(names)} blocks came"
        self.pool.unpin([block_id for _, block_id in pairs])
        return pairs

    def close(self) -> None:
        """Hang up."""
        self.peers.close()
        self._roads.close()

    def _post(self, event: Event) -> None:
        if isinstance(event, BlocksReleased):
            self._released.set()
        for instruction in self._scheduler.on_event(event, 0.0):
            assert isinstance(instruction, LendBlocks)
            self._offloader.on_pinned(instruction)

    def _take(self, address: str, message: Message) -> None:
        if isinstance(message, RoomGranted):
            self._offloader.on_granted(message)
        else:
            self._answers.put_nowait(message)

    def _lose(self, reason: object) -> None:
        raise SystemExit(f"the node cache is lost: {reason}")  # what an event loop lets through

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
