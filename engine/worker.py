"""What prefill and decode workers have in common: an engine, a channel, a registered region, subscribers, peers.

No Ray. A role (prefill.worker, decode.worker) owns one EngineWorker, is handed the messages and instructions that
concern it, and posts events.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeAlias, assert_never

import torch

from engine.borrower import Borrower
from engine.core import Engine, EngineOptions
from engine.cores import num_cores
from engine.crashing import CrashOnce, guarded
from engine.driver import EngineDriver
from engine.lending import Lender
from engine.loans import SequenceOver
from engine.management import BlockKind, PoolManagement
from engine.memory.kv_pool import LAYOUT_VERSION, block_numbers
from engine.model.load import load_model
from engine.puller import BlockPuller
from engine.scheduling.plan import (
    AskAhead,
    AskBlocks,
    AskRemote,
    CompileGrammar,
    EmitTokens,
    Event,
    Instruction,
    LendBlocks,
    OfferBlocks,
    OffloadBlocks,
    PullBlocks,
    RunStep,
    SequenceCancelled,
    StopAsking,
    StopRemote,
    TakeIn,
)
from kvcache.names import split_names
from kvcache.subscribers import Subscribers
from kvcache.told_requests import ToldRequests, report_pause_s
from messages.cache import CacheQuestion
from messages.errors import InvariantError, KvrayError
from messages.fleet import (
    GetStats,
    LoadReport,
    NodeCacheFound,
    Role,
    SpareBlocks,
    Stats,
    Subscribe,
    TakeBlocks,
    WorkerInfo,
)
from messages.handoff import (
    BlocksRequest,
    DescribeRegions,
    RegionsDescribed,
    ReleaseLease,
    RenewLease,
    RoadMessage,
)
from messages.price import MovePrice
from messages.scaling import WorkerScaling
from messages.wire import Message
from nodecache.process import CacheOptions, CacheSettings, cache_options
from transport.channel import ChannelConfig, ChannelServer
from transport.checksum import checksum_path
from transport.incoming import IncomingLinks
from transport.memory import Memory
from transport.opening import RoadOptions, open_roads
from transport.plasma.road import Vaults
from transport.process_stats import process_stats
from transport.roads import PROBE_BYTES, Roads
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

#: Of blocks that were not used for long so many are looked at for a report.
_NUM_LOOKED_AT = 512
#: The node cache is looked for so often, which keeps it alive, and sooner where there is none.
_LOOK_FOR_CACHE_S = 15.0
_LOOK_AGAIN_S = 1.0
_REPORT_S = 1.0  #: a report at least this often

#: the scheduler's counters as operators see them
_METRICS = {
    "num_preemptions": "kvray_preemptions_total",
    "num_prompt_tokens_device": 'kvray_worker_prompt_tokens_total{source="device"}',
    "num_prompt_tokens_peer": 'kvray_worker_prompt_tokens_total{source="peer"}',
    "num_prompt_tokens_host": 'kvray_worker_prompt_tokens_total{source="host"}',
    "num_prompt_tokens_disk": 'kvray_worker_prompt_tokens_total{source="disk"}',
    "num_prompt_tokens_remote": 'kvray_worker_prompt_tokens_total{source="remote"}',
    "num_prompt_tokens_computed": 'kvray_worker_prompt_tokens_total{source="computed"}',
    "num_generated_tokens": "kvray_generated_tokens_total",
    "num_rejected_blocks": "kvray_blocks_recomputed_total",
    "num_remote_fallbacks": "kvray_remote_fallbacks_total",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What a worker is told at its start. Everything in it crosses a process."""

    model_dir: str
    dtype: str
    kv_cache_dtype: str = "auto"  #: fp8: KV in float8
    device: str
    max_model_len: int | None
    num_threads: int | None  #: of a step, at most; None: as many as there are cores
    engine: EngineOptions
    use_kernels: bool
    host: str | None = None  #: where the channel listens; None: the node's address
    channel: ChannelConfig
    lease_s: float
    stall_s: float  #: a pull is given up when nothing arrived for so long
    roads: RoadOptions
    cache: CacheSettings | None = None  #: of this node's cache; None: there is to be none
    tenants: Mapping[int, str] = field(default_factory=dict)  #: names of those that are counted, by number


#: Finds the node cache of this node for a model, which is started if it does not run; a KvrayError where it cannot.
FindCache: TypeAlias = Callable[[CacheOptions], Awaitable[WorkerInfo]]

#: What a scheduler wants done that is its role's business.
RoleInstruction: TypeAlias = EmitTokens | OfferBlocks | AskRemote


class WorkerRole(Protocol):
    """The part of a worker that differs between prefill and decode. A sender is known by its channel's id."""

    def on_message(self, sender: bytes, message: Message) -> None:
        """Handle a sender's message that is not the EngineWorker's own."""
        ...

    def on_sender_lost(self, sender: bytes) -> None:
        """Handle the loss of a sender, which comes once for each."""
        ...

    def on_instructions(self, instructions: Sequence[RoleInstruction]) -> None:
        """Carry out what the scheduler wants done, in order."""
        ...

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges of the role, by metric name."""
        ...


class EngineWorker:
    """An engine on its thread, behind a channel, with its KV registered for peers."""

    def __init__(
        self,
        role: Role,
        worker_id: str,
        host: str,
        options: WorkerOptions,
        secret: ClusterSecret,
        on_crash: Callable[[BaseException], None],
        vaults: Vaults | None = None,
        find_cache: FindCache | None = None,
    ) -> None:
        """Load the model; this blocks for as long as that takes. `host`: the node's address, where the channel listens.

        `vaults`: Ray's object store, where there is a Ray. `find_cache`: finds the node cache of this node, or starts
        it; None: there is to be none.

        Raises:
            ConfigError: the model or the memory will not do.
        """
        self.role: Role = role
        self.worker_id = worker_id
        self._host = host
        self.options = options
        model_dir = Path(options.model_dir)
        loaded = load_model(
            model_dir,
            dtype=options.dtype,
            kv_cache_dtype=options.kv_cache_dtype,
            device=options.device,
            num_threads=options.num_threads or num_cores(),
            max_model_len=options.max_model_len,
            use_kernels=options.use_kernels,
            on_progress=lambda text: logger.info("%s", text),
        )
        if options.cache is not None:
            loaded = replace(loaded, fingerprint=options.cache.fingerprint_of(loaded.fingerprint))
        self.engine = Engine.build(loaded, options.engine, model_dir=model_dir)
        self.engine.warm_up()
        self._secret = secret
        self.roads = Roads(
            open_roads(options.roads, self._secret, host, vaults, functools.partial(_prepare_thread, self.engine)),
            self.engine.memory,
            self.engine.scratch(PROBE_BYTES),
            options.stall_s,
        )
        puller = BlockPuller(self.engine.layout, self.engine.memory, self.engine.checksums, self.roads)
        self.crash = CrashOnce(on_crash)  #: for every fault that leaves the worker's state unknown
        self.borrower = Borrower(
            puller,
            self.roads,
            secret,
            options.channel,
            options.lease_s,
            self.post,
            self.spawn,
            self.crash,
        )
        self._find_cache = find_cache
        self._cache: WorkerInfo | None = None  #: of this node, while there is one
        self._cache_wanted = asyncio.Event()
        self.engine.scheduler.set_prices(self.borrower.price_of)
        self._lender = Lender(options.lease_s, self.post, self.send, self.engine.checksums.published)
        self._management = PoolManagement(
            self.engine.pool,
            self.engine.checksums,
            BlockKind(self.engine.layout.block_bytes, LAYOUT_VERSION, loaded.kernel_path),
            self.send,
            self.spawn,
            self._flush_events,
            options.tenants,
        )
        self._role: WorkerRole | None = None
        self._links = IncomingLinks(self.roads, self.send)  #: to those who pull from this worker
        self._num_intakes = count()
        self._subscribers = Subscribers(worker_id, self.send)
        self._told_requests = ToldRequests()
        self._tasks: set[asyncio.Task[None]] = set()
        self._report_wanted = asyncio.Event()
        self.server: ChannelServer | None = None
        self.driver: EngineDriver | None = None

    async def start(self, role: WorkerRole) -> WorkerInfo:
        """Listen and step, on the running loop; the answer is what the rest of the fleet needs to know."""
        self._role = role
        self.server = ChannelServer(
            self._secret,
            self._host,
            on_message=guarded(self._on_message, self.crash),
            on_peer_lost=guarded(self._on_sender_lost, self.crash),
            config=self.options.channel,
        )
        self.borrower.peers.own_address = self.server.address
        self.driver = EngineDriver(self.engine, self._on_instructions, self.crash)
        self.driver.start()
        self.spawn(self._report_forever())
        self.spawn(self._expire_forever())
        if self._find_cache is not None and self.options.cache is not None:
            self.borrower.on_lost = self._on_owner_lost
            self.spawn(self._follow_cache(self._find_cache, self._cache_options(self.options.cache)))
        if isinstance(self.engine.memory, Memory):
            threading.Thread(target=self.engine.memory.populate, name="populate", daemon=True).start()
        return self.info(self.server.address)

    def info(self, address: str) -> WorkerInfo:
        """Describe this worker to the fleet; `address` is its channel's."""
        engine = self.engine
        return WorkerInfo(
            worker_id=self.worker_id,
            role=self.role,
            address=address,
            node_id=os.uname().nodename,
            fingerprint=engine.loaded.fingerprint,
            block_size=engine.options.block_size,
            num_blocks=engine.layout.num_blocks,
            block_bytes=engine.layout.block_bytes,
            max_model_len=engine.loaded.max_model_len,
            max_num_seqs=engine.options.max_num_seqs,
            roads=self.roads.names,
            kernel_path=engine.loaded.kernel_path,
            dtype=str(engine.loaded.dtype).removeprefix("torch."),
            lacks_kernels=(
                self.options.use_kernels and engine.loaded.device.type == "cpu" and not engine.loaded.has_kernels
            ),
            checksum_path=checksum_path(),
            compute=engine.scheduler.cost.price,
        )

    def post(self, event: Event) -> None:
        """Give an event to the scheduler; its instructions are handed out before this returns."""
        assert self.driver is not None, "start() comes first"
        self.driver.post(event)
        if isinstance(event, SequenceCancelled):
            self.borrower.decide(SequenceOver(event.seq_id))
        self._report_wanted.set()

    def send(self, receiver: bytes, message: Message) -> bool:
        """Send a message to a sender; False: it is dropped, as that one is gone."""
        return self.server is not None and self.server.send(receiver, message)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine until it ends or the worker closes; what it raises ends the worker."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.crash(error)

    def scaling(self) -> WorkerScaling:
        """Return what whoever scales the fleet wants to know."""
        return self.engine.scaling(busy_s=0.0 if self.driver is None else self.driver.busy_s)

    async def close(self) -> None:
        """Stop stepping, hang up, give memory back."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.driver is not None:
            await self.driver.close()
        self.borrower.peers.close()
        if self.server is not None:
            self.server.close()
        self.roads.close()
        self.engine.close()

    # ------------------------------------------------------------------------------------------------- the channel

    def _on_message(self, sender: bytes, message: Message) -> None:
        match message:
            case TakeBlocks(address=address, names=names, age_s=age_s):
                used_s = None if age_s is None else time.monotonic() - age_s
                self.post(TakeIn(f"intake {next(self._num_intakes)}", address, tuple(split_names(names)), used_s))
            case SpareBlocks(spare=spare, kept=kept):
                self.engine.pool.mark(split_names(spare), is_spare=True)
                self.engine.pool.mark(split_names(kept), is_spare=False)
            case Subscribe():
                self._flush_events()
                self._tell_load()
                self.engine.pool.mark(self.engine.pool.snapshot(), is_spare=False)
                self._subscribers.add(sender, [("device", b"".join(self.engine.pool.snapshot()))])
                self.send(sender, self._told_requests.whole(self._report(self.borrower.peers.prices())))
                self.send(sender, NodeCacheFound(worker_id=self.worker_id, info=self._cache))
            case GetStats(query_id=query_id):
                self.send(sender, self._stats(query_id))
            case DescribeRegions():
                self._links.open(sender)
                self.send(
                    sender,
                    RegionsDescribed(
                        regions=list(self.roads.regions),
                        num_blocks=self.engine.layout.num_blocks,
                        has_generations=self.engine.layout.has_generations,
                    ),
                )
            case RoadMessage():
                self._links.on_message(sender, message)
            case _ if isinstance(message, CacheQuestion):
                self._management.take(sender, message)
            case BlocksRequest() | RenewLease() | ReleaseLease() if self._lender.take(sender, message):
                pass
            case _:
                assert self._role is not None
                self._role.on_message(sender, message)

    def _on_sender_lost(self, sender: bytes) -> None:
        self._subscribers.remove(sender)
        self._links.on_lost(sender)
        self._lender.lose(sender)
        assert self._role is not None
        self._role.on_sender_lost(sender)

    def _on_instructions(self, instructions: Sequence[Instruction]) -> None:
        assert self._role is not None
        of_role: list[RoleInstruction] = []
        for instruction in instructions:
            match instruction:
                case EmitTokens() | OfferBlocks() | AskRemote():
                    of_role.append(instruction)
                case AskBlocks() | AskAhead() | StopAsking() | StopRemote() | PullBlocks():
                    self.borrower.decide(instruction)
                case LendBlocks() if self.borrower.offloader.is_own(instruction):
                    self.borrower.offloader.on_pinned(instruction)
                case LendBlocks():
                    self._lender.lend(instruction)
                case OffloadBlocks():
                    self.borrower.offloader.offer(instruction)
                case RunStep() | CompileGrammar():
                    raise InvariantError(f"the driver's instruction came out of it: {instruction}")
                case _ as unreachable:
                    assert_never(unreachable)
        self._role.on_instructions(of_role)
        for emitted in of_role:
            if isinstance(emitted, EmitTokens) and emitted.finish_reason is not None:
                self.borrower.decide(SequenceOver(emitted.seq_id))
                self._told_requests.finish(emitted.seq_id)
        self._flush_events()
        self._report_wanted.set()

    # -------------------------------------------------------------------------------------------------- the node cache

    def _on_owner_lost(self, address: str) -> None:
        if self._cache is not None and self._cache.address == address:
            self._use_cache(None)
            self._cache_wanted.set()

    def _use_cache(self, info: WorkerInfo | None) -> None:
        if info == self._cache:
            return
        self._cache = info
        self.borrower.offloader.use(None if info is None else info.address)
        self.engine.scheduler.set_node_cache("" if info is None else info.address)
        for subscriber in self._subscribers:
            self.send(subscriber, NodeCacheFound(worker_id=self.worker_id, info=info))

    async def _follow_cache(self, find: FindCache, options: CacheOptions) -> None:
        """Look for the node cache time and again, at once when it is lost: it is asked to start, or to go on."""
        said = ""
        while True:
            self._cache_wanted.clear()
            try:
                self._use_cache(await find(options))
                said = ""
            except KvrayError as error:
                self._use_cache(None)
                if error.message != said:
                    logger.warning("no node cache: %s", error.message)
                said = error.message
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_FOR_CACHE_S if not said else _LOOK_AGAIN_S):
                    await self._cache_wanted.wait()

    def _cache_options(self, settings: CacheSettings) -> CacheOptions:
        """Put together what the node cache for this worker's model is told, if it is this worker that starts it."""
        engine, options = self.engine, self.options
        return cache_options(
            settings,
            fingerprint=engine.loaded.fingerprint,
            layout_version=LAYOUT_VERSION,
            block_bytes=engine.layout.block_bytes,
            block_size=engine.options.block_size,
            host=self._host,
            channel=options.channel,
            roads=options.roads,
            lease_s=options.lease_s,
            stall_s=options.stall_s,
            kernel_path=engine.loaded.kernel_path,
            numbers=block_numbers(engine.loaded.layer_specs, engine.options.block_size, engine.loaded.kv_dtype),
            compute=engine.scheduler.cost.price,
        )

    async def _expire_forever(self) -> None:
        """Look for ended leases time and again: one that ends frees its blocks even when nobody says anything."""
        while True:
            await asyncio.sleep(min(0.2, self.options.lease_s / 4))
            self._lender.pass_time()

    # --------------------------------------------------------------------------------------- what the router is told

    def _flush_events(self) -> None:
        """Tell subscribers what changed in the pool, numbered for each: write path step b."""
        stored, removed = self.engine.pool.take_events()
        if stored or removed:
            self._subscribers.tell("device", b"".join(stored), b"".join(removed))

    async def _report_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_S):
                    await self._report_wanted.wait()
            self._report_wanted.clear()
            self._flush_events()
            self._tell_load()
            scheduler = self.engine.scheduler
            await asyncio.sleep(report_pause_s(scheduler.num_waiting + scheduler.num_running))

    def _tell_load(self) -> None:
        scheduler = self.engine.scheduler
        report = self._report(self.borrower.peers.changed_prices())
        report = self._told_requests.told(report, scheduler.seq_ids(), scheduler.declined_ids())
        for subscriber in self._subscribers:
            self.send(subscriber, report)

    def _report(self, moves: tuple[MovePrice, ...]) -> LoadReport:
        scheduler, pool = self.engine.scheduler, self.engine.pool
        return LoadReport(
            worker_id=self.worker_id,
            queued_s=scheduler.queued_s * scheduler.lateness.factor,
            queued_short_s=scheduler.queued_short_s,
            num_short=scheduler.num_short,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            free_blocks=pool.num_free,
            idle_blocks=pool.num_idle(pool.num_dispensable + _NUM_LOOKED_AT),
            reused_share=pool.reused_share,
            decode_step_s=scheduler.decode_step_s,
            compute=scheduler.cost.price,
            moves=moves,
        )

    def _stats(self, query_id: str) -> Stats:
        assert self._role is not None
        assert self.driver is not None
        engine = self.engine
        values = {_METRICS[name]: float(value) for name, value in engine.scheduler.stats().items()}
        values |= self._role.stats() | self.roads.stats() | self.borrower.stats()
        values |= self._management.stats() | engine.scheduler.waits.stats() | process_stats()
        roads = self.borrower.peers.statuses()
        for (road, carriers), num_peers in Counter((one.road, one.carriers) for one in roads).items():
            values[f'kvray_peers{{road="{road or "none"}",carriers="{carriers}"}}'] = float(num_peers)
        values |= {
            "kvray_blocks_offloaded_total": float(self.borrower.offloader.num_blocks),
            "kvray_offloads_dropped_total": float(self.borrower.offloader.num_dropped),
            "kvray_blocks_taken_in_total": float(engine.scheduler.num_blocks_taken_in),
            "kvray_leases": values.get("kvray_leases", 0.0) + self._lender.leases.num_leased,
            "kvray_leases_expired_total": values.get("kvray_leases_expired_total", 0.0)
            + self._lender.leases.num_expired,
            "kvray_blocks_lent_total": float(self._lender.num_lent_blocks),
            "kvray_sequences_waiting": float(engine.scheduler.num_waiting),
            "kvray_sequences_running": float(engine.scheduler.num_running),
            "kvray_queued_tokens": float(engine.scheduler.queued_tokens),
            "kvray_queued_seconds": engine.scheduler.queued_s * engine.scheduler.lateness.factor,
            "kvray_prefill_tokens_per_second": float(engine.scheduler.prefill_tokens_per_s),
            "kvray_decode_step_seconds": float(engine.scheduler.decode_step_s),
            "kvray_steps_total": float(self.driver.num_steps),
            "kvray_step_seconds_total": self.driver.busy_s,
        }
        return Stats(query_id=query_id, worker_id=self.worker_id, role=self.role, values=values, roads=roads)


def _prepare_thread(engine: Engine) -> None:
    """Prepare a thread that moves the pool's bytes: an accelerator wants its context there, a CPU nothing."""
    if engine.loaded.device.type == "cuda":
        torch.cuda.set_device(engine.loaded.device)
        torch.cuda.synchronize()
