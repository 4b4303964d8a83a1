"""The node cache process: a decider, an arena that peers pull from, a channel, threads that wait for stores.

`python -m nodecache`, started by `nodecache.supervisor`: one JSON line with a `Start` on standard input, whose end ends
the process; one with a `Started` on standard output, then a byte of life now and then. Nothing of it is to be seen in
the command line or the environment. SIGTERM ends it in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from kvcache.leases import AskerLost, TimePassed
from kvcache.region import GENERATION_BYTES, BlockNumbers
from kvcache.subscribers import Subscribers
from messages.cache import CacheQuestion
from messages.errors import ErrorInfo, KvrayError
from messages.fleet import GetStats, LoadReport, Stats, Subscribe, WorkerInfo
from messages.handoff import (
    BlocksRequest,
    BlocksWritten,
    DescribeRegions,
    PrefetchBlocks,
    RegionsDescribed,
    ReleaseLease,
    RenewLease,
    RoadMessage,
    RoomRequest,
)
from messages.price import ComputePrice
from messages.tier import Tier
from messages.wire import Message
from nodecache.arena import RECORD, Arena, ArenaLayout
from nodecache.cache import BlocksKept, BlocksRead, CacheEvent, CacheInstruction, CacheLimits, NodeCache, Said, Tell
from nodecache.disk.layout import Model
from nodecache.disk.store import DiskStore
from nodecache.long_work import LongWorker
from nodecache.management import Answer, Asked, LongWork, Management, ManagementEvent, ManagementInstruction
from nodecache.pool import HostPool
from nodecache.quotas import Accounts, TenantQuota, tenant_stats
from nodecache.reading import ReadBlocks
from nodecache.store import BlockStore, StoreError
from nodecache.worth import Worth
from nodecache.writing_down import WriteBlocks
from transport.channel import ChannelConfig, ChannelServer
from transport.checksum import checksum
from transport.incoming import IncomingLinks
from transport.memory import PAGE_BYTES, Memory, available_bytes
from transport.opening import RoadOptions, open_roads
from transport.plasma.road import NoVaults
from transport.process_stats import process_stats
from transport.roads import Roads
from transport.secret import ClusterSecret

if TYPE_CHECKING:
    from nodecache.remote.index import Changes  # with pyarrow, which only who has such a tier waits for

logger = logging.getLogger(__name__)

_INPUT: Final = 0
_OUTPUT: Final = 1
_BEAT_S: Final = 0.5
_REPORT_S: Final = 1.0
_CLOSE_S: Final = 5.0  #: that stores have to finish what they are at
_CONFIG_STATUS: Final = 2  #: exit status of what cannot start as configured
_CRASH_STATUS: Final = 70


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator wants of the node caches."""

    host_memory_bytes: int | None = None  #: of the arena; None: a tenth of what is free, at most 1 GiB
    disk_dir: str | None = None  #: None: no disk tier
    disk_capacity_bytes: int = 100 << 30
    remote: str | None = None  #: URI of the remote tier; None: there is none
    remote_compression: Literal["off", "lossless", "int8"] = "lossless"  #: of what is written there
    tenants: tuple[TenantQuota, ...] = ()  #: who is counted, and what each may have

    def fingerprint_of(self, fingerprint: bytes) -> bytes:
        """Return the fingerprint, 32 bytes, of a model whose blocks are kept so.

        What is read back with a loss is nothing for who did not ask for it, in any tier: it goes by other names.
        """
        if self.remote is None or self.remote_compression != "int8":
            return fingerprint
        return blake2b(b"remote int8" + fingerprint, digest_size=32).digest()

    def num_blocks(self, block_bytes: int) -> int:
        """Count the blocks that the arena has room for, at least one."""
        num_bytes = self.host_memory_bytes or min(available_bytes() // 10, 1 << 30)
        return max(1, num_bytes // (block_bytes + GENERATION_BYTES + RECORD.itemsize))


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a node cache is told at its start. Everything in it crosses a process."""

    layout: ArenaLayout
    block_size: int  #: tokens
    host: str  #: the node's address, where the channel and the roads listen
    channel: ChannelConfig
    roads: RoadOptions
    limits: CacheLimits
    stall_s: float  #: a pull is given up when nothing arrived for so long
    settings: CacheSettings = CacheSettings()
    ray_node_id: str = ""  #: in hex, of the node that the process runs on; "": there is no Ray
    kernel_path: str = ""  #: what computes the model's blocks
    numbers: BlockNumbers | None = None  #: what the bytes of a block are; None: unknown, so that none is compressed
    compute: ComputePrice | None = None  #: what computing costs the workers, as they measured it
    log_level: str = "info"


def cache_options(
    settings: CacheSettings, *, fingerprint: bytes, layout_version: int, block_bytes: int, lease_s: float, **others: Any
) -> CacheOptions:
    """Put together what a node cache is told; `others` are fields of CacheOptions."""
    layout = ArenaLayout(
        fingerprint=fingerprint,
        version=layout_version,
        block_bytes=block_bytes,
        num_blocks=settings.num_blocks(block_bytes),
    )
    return CacheOptions(layout=layout, limits=CacheLimits(lease_s=lease_s), settings=settings, **others)


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on standard input."""

    options: CacheOptions
    secret: str  #: of the cluster, as hexadecimal digits
    arena_fd: int  #: an inherited descriptor: the arena's memory


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on standard output: one of the two."""

    info: WorkerInfo | None = None
    error: ErrorInfo | None = None


class CacheProcess:
    """A node cache on the running event loop. `start` comes first, `close` last."""

    def __init__(
        self, options: CacheOptions, secret: ClusterSecret, memory: Memory, stores: Mapping[Tier, BlockStore]
    ) -> None:
        """Take over the arena in `memory`, with all that was committed there; `stores`: the nearest first.

        Both are closed with this.

        Raises:
            ConfigError: a road is named that there is not, or nothing can be bound at the host.
        """
        self._options = options
        self._stores = stores
        self._memory = memory
        self.worker_id = f"cache-{os.uname().nodename}-{secrets.token_hex(4)}"
        arena = Arena(memory, options.layout)
        worth = Worth(options.block_size, options.compute)
        accounts = Accounts.of(options.settings.tenants, "host", options.layout.block_bytes)
        pool = HostPool(arena, worth, time.monotonic(), options.limits.quarantine_s, accounts)
        self.cache = NodeCache(pool, stores, options.limits)
        self.management = Management(self.cache, options.kernel_path)
        self._long_work = LongWorker(arena, stores)
        self._scratch = Memory.allocate(PAGE_BYTES)  # nothing is pulled by this process
        vaults = NoVaults(options.ray_node_id) if options.ray_node_id else None
        opened = open_roads(options.roads, secret, options.host, vaults, lambda: None)
        self._roads = Roads(opened, memory, self._scratch, options.stall_s)
        self._threads = {
            tier: (
                ThreadPoolExecutor(options.limits.max_reads, thread_name_prefix=f"{tier}-read"),
                ThreadPoolExecutor(1, thread_name_prefix=f"{tier}-write"),
            )
            for tier in stores
        }
        self._management_thread = ThreadPoolExecutor(1, thread_name_prefix="management")
        self._server = ChannelServer(
            secret, options.host, on_message=self._on_message, on_peer_lost=self._on_lost, config=options.channel
        )
        self._links = IncomingLinks(self._roads, self._server.send)
        self._subscribers = Subscribers(self.worker_id, self._server.send)
        self._tasks: set[asyncio.Task[None]] = set()
        logger.info(
            "node cache %s: %d blocks of %d bytes, %d of them adopted (owner %d of this arena)",
            *(self.worker_id, pool.num_blocks, options.layout.block_bytes, pool.num_adopted, arena.epoch),
        )

    async def start(self) -> WorkerInfo:
        """Begin to serve; the answer is what the rest of the fleet needs to know."""
        self._spawn(self._tick_forever())
        self._spawn(self._report_forever())
        layout = self._options.layout
        return WorkerInfo(
            worker_id=self.worker_id,
            role="cache",
            address=self._server.address,
            node_id=os.uname().nodename,
            fingerprint=layout.fingerprint,
            block_size=self._options.block_size,
            num_blocks=layout.num_blocks,
            block_bytes=layout.block_bytes,
            max_model_len=0,
            max_num_seqs=0,
            roads=self._roads.names,
            kernel_path=self._options.kernel_path,
        )

    async def close(self) -> None:
        """Hang up, let stores finish what they are at, give memory back."""
        self._server.close()
        self._roads.close()
        moving = [task for task in self._tasks if task.get_name() == _MOVING]
        for task in self._tasks.difference(moving):
            task.cancel()
        if moving:
            await asyncio.wait(moving, timeout=_CLOSE_S)
        for reads, writes in self._threads.values():
            reads.shutdown(wait=False, cancel_futures=True)
            writes.shutdown(wait=False, cancel_futures=True)
        self._management_thread.shutdown(wait=False, cancel_futures=True)
        for store in self._stores.values():
            store.close()
        self._scratch.close()
        self._memory.close()

    # ------------------------------------------------------------------------------------------------- the channel

    def _on_message(self, sender: bytes, message: Message) -> None:
        match message:
            case RoomRequest() | BlocksWritten() | BlocksRequest() | PrefetchBlocks() | RenewLease() | ReleaseLease():
                self._post(Said(sender, message))
            case _ if isinstance(message, CacheQuestion):
                self._manage(Asked(sender, message))
            case Subscribe():
                self._tell_changes()
                self._subscribers.add(sender, self.cache.snapshot())
                self._server.send(sender, self._report())
                self._server.send(sender, self._told_stats(""))
            case GetStats(query_id=query_id):
                self._server.send(sender, self._told_stats(query_id))
            case DescribeRegions():
                self._links.open(sender)
                described = RegionsDescribed(
                    regions=list(self._roads.regions),
                    num_blocks=self._options.layout.num_blocks,
                    has_generations=True,
                )
                self._server.send(sender, described)
            case RoadMessage():
                self._links.on_message(sender, message)
            case _:
                logger.warning("a %s, which is nothing for a node cache", type(message).__name__)

    def on_remote_changes(self, changes: Changes) -> None:
        """Tell the router what others wrote to the remote store, or removed there."""
        self.cache.tiers["remote"].on_changed(changes.stored, changes.removed)
        self._tell_changes()

    def _on_lost(self, sender: bytes) -> None:
        self._subscribers.remove(sender)
        self._links.on_lost(sender)
        self._post(AskerLost(sender))

    def _post(self, event: CacheEvent) -> None:
        """Give an event to the decider, and carry out what it wants done."""
        for instruction in self.cache.on_event(event, time.monotonic()):
            self._carry_out(instruction)
        self._tell_changes()

    def _manage(self, event: ManagementEvent) -> None:
        for instruction in self.management.on_event(event, time.monotonic()):
            self._carry_out(instruction)
        self._tell_changes()

    def _carry_out(self, instruction: CacheInstruction | ManagementInstruction) -> None:
        match instruction:
            case Tell(asker, message) | Answer(asker, message):
                self._server.send(asker, message)
            case ReadBlocks():
                self._spawn(self._read(instruction), _MOVING)
            case WriteBlocks():
                self._spawn(self._write(instruction), _MOVING)
            case _:
                self._spawn(self._look_after(instruction), _MOVING)

    # ----------------------------------------------------------------------------------------------------- the stores

    async def _read(self, read: ReadBlocks) -> None:
        targets = [self.cache.pool.arena.block(block_id) for block_id in read.block_ids]
        threads, _ = self._threads[read.tier]
        call = partial(self._stores[read.tier].read, read.names, targets, read.deadline_s)
        arrived = await _outcome_of(threads, call, read.tier)
        self._post(BlocksRead(read.read_id, None if arrived is None else tuple(arrived)))

    async def _write(self, write: WriteBlocks) -> None:
        sources = [self.cache.pool.arena.block(block_id) for block_id in write.block_ids]
        _, threads = self._threads[write.tier]
        call = partial(self._stores[write.tier].write, write.blocks, sources, write.deadline_s)
        dropped = await _outcome_of(threads, call, write.tier)
        self._post(BlocksKept(write.write_id, None if dropped is None else tuple(dropped)))

    async def _look_after(self, work: LongWork) -> None:
        """Do what managing takes time for, one thing after the other."""
        self._manage(
            await asyncio.get_running_loop().run_in_executor(self._management_thread, self._long_work.do, work)
        )

    # --------------------------------------------------------------------------------------- what others are told

    def _tell_changes(self) -> None:
        """Tell subscribers what changed in every tier: write path step b."""
        for tier, stored, removed in self.cache.take_events():
            self._subscribers.tell(tier, stored, removed)

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            self._post(TimePassed())

    async def _report_forever(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            stats = self._told_stats("")
            for subscriber in self._subscribers:
                self._server.send(subscriber, self._report())
                self._server.send(subscriber, stats)

    def _report(self) -> LoadReport:
        return LoadReport(
            worker_id=self.worker_id,
            queued_s=0.0,
            num_waiting=self.cache.num_waiting,
            num_running=self.cache.leases.num_open,
            free_blocks=self.cache.pool.num_free,
            decode_step_s=0.0,
        )

    def _told_stats(self, query_id: str) -> Stats:
        return Stats(query_id=query_id, worker_id=self.worker_id, role="cache", values=self.stats())

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges by metric name."""
        values = self.cache.stats() | self.management.stats() | self._roads.stats() | process_stats()
        for store in self._stores.values():
            values |= store.stats()
        for tier, accounts in self._accounts():
            values |= tenant_stats(self._options.settings.tenants, tier, accounts, self._options.layout.block_bytes)
        values["kvray_block_size_tokens"] = float(self._options.block_size)
        return values

    def _accounts(self) -> Iterator[tuple[Tier, Accounts]]:
        yield "host", self.cache.pool.accounts
        for tier, store in self._stores.items():
            yield tier, store.accounts

    def _spawn(self, coroutine: Any, name: str = "") -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # what it raised goes to the loop's handler, which ends the process


_MOVING: Final = "moving"


async def _outcome_of(
    threads: ThreadPoolExecutor, call: Callable[[], Sequence[Any]], tier: Tier
) -> Sequence[Any] | None:
    """Make a call of a store in its threads; None where the store failed."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
    except StoreError as error:
        logger.warning("%s: %s", tier, error.message)
        return None


# ------------------------------------------------------------------------------------------------------- the program


def main() -> None:
    """Be the process; exits with 2 and an error in `Started` where it cannot start as configured."""
    start = msgspec.json.decode(_first_line(), type=Start)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.addLevelName(level, logging.getLevelName(level).lower())  # as all other processes write them
    logging.basicConfig(
        level=start.options.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    sys.exit(asyncio.run(_serve(start)))


async def _serve(start: Start) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    def crash(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Nobody knows what state is left; the arena says what was committed, and a successor reads it."""
        logger.critical("the node cache cannot go on: %s", context["message"], exc_info=context.get("exception"))
        end(_CRASH_STATUS)

    def on_remote_changes(changes: Changes) -> None:
        """Take in what other clusters did; what was there at first is in the first snapshot."""
        loop.call_soon_threadsafe(lambda: None if process is None else process.on_remote_changes(changes))

    process: CacheProcess | None = None
    loop.set_exception_handler(crash)
    loop.add_signal_handler(signal.SIGTERM, end, 0)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is its supervisor's
    loop.add_reader(_INPUT, lambda: end(0) if not os.read(_INPUT, 4096) else None)
    try:
        memory = start.options.layout.adopt(start.arena_fd)
        stores = await asyncio.to_thread(open_stores, start.options, on_remote_changes)
        process = CacheProcess(start.options, ClusterSecret.from_hex(start.secret), memory, stores)
    except KvrayError as error:
        _say(Started(error=error.info()))
        return _CONFIG_STATUS
    _say(Started(info=await process.start()))
    os.set_blocking(_OUTPUT, False)
    beats = loop.create_task(_beat_forever())
    status = await ended
    beats.cancel()
    if status == 0:
        await process.close()
    return status


def open_stores(options: CacheOptions, on_remote_changes: Callable[[Changes], None]) -> dict[Tier, BlockStore]:
    """Open the tiers below the arena that are wanted, the nearest first. Arguments as RemoteStore's; may take seconds.

    Raises:
        ConfigError: one cannot be opened as configured: another instance has it, for example.
    """
    settings, layout = options.settings, options.layout
    stores: dict[Tier, BlockStore] = {}
    if settings.disk_dir is not None:
        model = Model(layout.fingerprint, layout.version, layout.block_bytes)
        accounts = Accounts.of(settings.tenants, "disk", layout.block_bytes)
        root, capacity_bytes = Path(settings.disk_dir), settings.disk_capacity_bytes
        stores["disk"] = DiskStore(root, model, capacity_bytes, checksum, accounts=accounts)
    if settings.remote is not None:
        from nodecache.codec import INT8, PLAIN, lossless_codec  # pyarrow takes 0.3 s: only who has such a tier waits
        from nodecache.remote.layout import Model as RemoteModel
        from nodecache.remote.store import RemoteStore

        remote_model = RemoteModel(layout.fingerprint, layout.version, layout.block_bytes, options.kernel_path)
        codec = PLAIN
        if options.numbers is not None and settings.remote_compression == "lossless":
            codec = lossless_codec(options.numbers.element_bytes)
        elif options.numbers is not None and settings.remote_compression == "int8":
            codec = INT8
            remote_model = remote_model._replace(numbers=options.numbers)
        accounts = Accounts.of(settings.tenants, "remote", layout.block_bytes)
        stores["remote"] = RemoteStore(
            settings.remote, remote_model, codec=codec, on_changes=on_remote_changes, accounts=accounts
        )
    return stores


async def _beat_forever() -> None:
    while True:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the supervisor hangs, or has ended
            os.write(_OUTPUT, b".")
        await asyncio.sleep(_BEAT_S)


def _say(started: Started) -> None:
    os.write(_OUTPUT, msgspec.json.encode(started) + b"\n")


def _first_line() -> bytes:
    """Read standard input up to a line's end, and no byte further."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(_INPUT, 1)
        if not byte:
            break
        line += byte
    return bytes(line)
