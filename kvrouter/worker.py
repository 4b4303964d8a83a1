"""The router as a process, without Ray: channels around `kvrouter.router.Router`. kvrouter.actor is the shell."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import assert_never

from kvrouter.gauges import NUM_PREFIXES, Gauges, Sample
from kvrouter.router import (
    AskSnapshot,
    Event,
    Instruction,
    Reply,
    Router,
    RouterConfig,
    TellWorker,
    TimePassed,
    WorkerJoined,
    WorkerLost,
)
from messages.cache import WhereBlocks
from messages.explain import ExplainPlacement, IndexQuestion, RecordAnswer, RecordQuestion
from messages.fleet import (
    GetStats,
    KvEvents,
    LoadReport,
    NodeCacheFound,
    NodeCacheStats,
    SpareBlocks,
    Stats,
    Subscribe,
    TakeBlocks,
    WorkerInfo,
)
from messages.responses import StoredAnswer, StoredQuestion
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.view import AskView
from messages.wire import Message
from transport.channel import ChannelClient, ChannelConfig, ChannelServer, PeerId
from transport.process_stats import process_stats
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_SWEEP_S = 0.02  #: between two pieces of what workers had who are gone
_RECONNECT_S = 0.1  #: first pause before a lost worker is tried again; doubles up to
_MAX_RECONNECT_S = 5.0


@dataclass(slots=True)
class _Link:
    """A worker of the fleet, and the channel to it while there is one."""

    info: WorkerInfo
    client: ChannelClient | None = None
    pause_s: float = _RECONNECT_S
    timer: asyncio.TimerHandle | None = None


class RouterWorker:
    """Answers ingresses, listens to workers. All methods belong to the event loop it was made on."""

    def __init__(
        self,
        worker_id: str,
        secret: ClusterSecret,
        host: str,
        channel: ChannelConfig | None = None,
        config: RouterConfig | None = None,
    ) -> None:
        """Listen on a free port of `host`, an address of this node.

        Raises:
            ConfigError: nothing can be bound there.
        """
        self._worker_id = worker_id
        self._secret = secret
        self._channel = channel or ChannelConfig()
        self._loop = asyncio.get_running_loop()
        self._links: dict[str, _Link] = {}
        self._requests: dict[PeerId, set[str]] = {}  # placed and not ended, by ingress
        self._ingresses: dict[PeerId, Stats] = {}  # what each told last
        self._fleet: dict[str, WorkerInfo] = {}
        self._caches: dict[str, WorkerInfo] = {}  # the node cache that each worker found, by worker id
        self._cache_stats: dict[str, Stats] = {}
        self.router = Router(config or RouterConfig())
        self._gauges = Gauges()
        self._server = ChannelServer(secret, host, self._on_ingress_message, self._on_ingress_lost, self._channel)
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._tick_timer = self._loop.call_later(_TICK_S, self._tick)

    @property
    def address(self) -> str:
        """Where ingresses connect, tcp://KEY_ID@host:port."""
        return self._server.address

    def set_fleet(self, workers: Iterable[WorkerInfo]) -> None:
        """Take in which workers are there now: connect to new ones, forget missing ones."""
        self._fleet = {info.worker_id: info for info in workers}
        self._follow_fleet()

    def _follow_fleet(self) -> None:
        """Have a link to each worker, and to each node cache that one of them found."""
        self._caches = {key: info for key, info in self._caches.items() if key in self._fleet}
        fleet = self._fleet | {info.worker_id: info for info in self._caches.values()}
        self._cache_stats = {key: stats for key, stats in self._cache_stats.items() if key in fleet}
        for worker_id, link in list(self._links.items()):
            if fleet.get(worker_id) != link.info:
                self._unlink(worker_id)
        for worker_id, info in fleet.items():
            if worker_id not in self._links:
                self._links[worker_id] = _Link(info)
                self._connect(worker_id)

    def samples(self) -> list[Sample]:
        """Return what Prometheus is shown, as of now; rates are since the last call."""
        now_s = time.monotonic()
        told = self.router.view(AskView(query_id="", num_prefixes=NUM_PREFIXES), now_s)
        infos = {worker_id: link.info for worker_id, link in self._links.items()}
        ingresses = {one.worker_id: one.values for one in self._ingresses.values()}
        return self._gauges.samples(told, infos, ingresses, now_s)

    def close(self) -> None:
        """Hang up on all workers and ingresses."""
        self._tick_timer.cancel()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for worker_id in list(self._links):
            self._unlink(worker_id)
        self._server.close()

    # ------------------------------------------------------------------------------------------------------- workers

    def _connect(self, worker_id: str) -> None:
        link = self._links[worker_id]
        link.timer = None
        link.client = ChannelClient(
            self._secret,
            link.info.address,
            on_message=lambda message: self._on_worker_message(worker_id, message),
            on_lost=lambda reason: self._on_worker_lost(worker_id, reason),
            on_ready=lambda: self._on_worker_ready(worker_id),
            config=self._channel,
        )

    def _unlink(self, worker_id: str) -> None:
        link = self._links.pop(worker_id)
        if link.timer is not None:
            link.timer.cancel()
        if link.client is not None:
            link.client.close()
        self._decide(WorkerLost(worker_id))

    def _on_worker_ready(self, worker_id: str) -> None:
        self._links[worker_id].pause_s = _RECONNECT_S
        self._decide(WorkerJoined(self._links[worker_id].info))

    def _on_worker_lost(self, worker_id: str, reason: str) -> None:
        link = self._links[worker_id]
        logger.warning("router: worker %s lost (%s); trying again in %.1f s", worker_id, reason, link.pause_s)
        link.client = None
        link.timer = self._loop.call_later(link.pause_s, self._connect, worker_id)
        link.pause_s = min(2 * link.pause_s, _MAX_RECONNECT_S)
        self._decide(WorkerLost(worker_id))

    def _on_worker_message(self, worker_id: str, message: Message) -> None:
        match message:
            case NodeCacheFound(info=info):
                if info is None:
                    self._caches.pop(worker_id, None)
                else:
                    self._caches[worker_id] = info
                self._follow_fleet()
            case Stats() if message.worker_id == worker_id:
                self._cache_stats[worker_id] = message
            case KvEvents() | LoadReport() if message.worker_id == worker_id:
                self._decide(message)
            case _:
                logger.warning("router: unexpected %s from %s", type(message).__name__, worker_id)

    # ----------------------------------------------------------------------------------------------------- ingresses

    def _on_ingress_message(self, peer: PeerId, message: Message) -> None:
        match message:
            case RouteRequest():
                self._decide(message, peer)
            case RequestEnded():
                self._requests.get(peer, set()).discard(message.request_id)
                self._decide(message)
            case GetStats(query_id=query_id):
                stats = Stats(
                    query_id=query_id,
                    worker_id=self._worker_id,
                    role="router",
                    values=self.router.stats() | process_stats(),
                    ingresses=tuple(told for other, told in self._ingresses.items() if other != peer),
                    caches=tuple(
                        NodeCacheStats(info=self._links[cache_id].info, values=told.values)
                        for cache_id, told in self._cache_stats.items()
                        if cache_id in self._links
                    ),
                )
                self._server.send(peer, stats)
            case WhereBlocks():
                self._server.send(peer, self.router.where(message))
            case ExplainPlacement():
                self._server.send(peer, self.router.explained(message))
            case IndexQuestion():
                self._server.send(peer, self.router.who_holds(message))
            case AskView():
                self._server.send(peer, self.router.view(message, time.monotonic()))
            case Stats():
                self._ingresses[peer] = message
            case StoredQuestion():
                if not self._pass_on(message.holder, message):
                    self._server.send(peer, StoredAnswer(query_id=message.query_id, asker=message.asker, reply=None))
            case RecordQuestion():
                if not self._pass_on(message.holder, message):
                    self._server.send(peer, RecordAnswer(query_id=message.query_id, asker=message.asker, records=None))
            case StoredAnswer() | RecordAnswer():
                self._pass_on(message.asker, message)
            case _:
                logger.warning("router: unexpected %s from an ingress", type(message).__name__)

    def _pass_on(self, ingress_id: str, message: StoredQuestion | StoredAnswer | RecordQuestion | RecordAnswer) -> bool:
        """Send `message` to the ingress of that name; False: there is none."""
        peers = [peer for peer, told in self._ingresses.items() if told.worker_id == ingress_id]
        return any(self._server.send(peer, message) for peer in peers)

    def _on_ingress_lost(self, peer: PeerId) -> None:
        self._ingresses.pop(peer, None)
        for request_id in self._requests.pop(peer, ()):
            self._decide(RequestEnded(request_id=request_id))

    # ------------------------------------------------------------------------------------------------------ the rest

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(_TICK_S, self._tick)
        self._decide(TimePassed())
        for peer, request_ids in list(self._requests.items()):
            self._requests[peer] = {request_id for request_id in request_ids if self.router.has(request_id)}

    def _decide(self, event: Event, peer: PeerId | None = None) -> None:
        self._carry_out(self.router.on_event(event, time.monotonic()), peer)
        if self._sweep_timer is None and not self.router.is_swept:
            self._sweep_timer = self._loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweep_timer = None
        self._carry_out(self.router.sweep(), None)
        if not self.router.is_swept:
            self._sweep_timer = self._loop.call_later(_SWEEP_S, self._sweep)

    def _carry_out(self, instructions: Sequence[Instruction], peer: PeerId | None) -> None:
        for instruction in instructions:
            match instruction:
                case Reply(message):
                    assert peer is not None, "only ingresses ask for placements"
                    self._reply(peer, message)
                case AskSnapshot(worker_id):
                    self._send(worker_id, Subscribe())
                case TellWorker(worker_id, told):
                    self._send(worker_id, told)
                case _:
                    assert_never(instruction)

    def _send(self, worker_id: str, message: Subscribe | SpareBlocks | TakeBlocks) -> None:
        client = self._links[worker_id].client
        if client is not None:
            client.send(message)

    def _reply(self, peer: PeerId, message: Placement | RouteFailed) -> None:
        if isinstance(message, Placement):
            self._requests.setdefault(peer, set()).add(message.request_id)
        if not self._server.send(peer, message) and isinstance(message, Placement):
            # The ingress went meanwhile, and its loss may have been told already.
            self._on_ingress_lost(peer)
