"""A request's way from the HTTP surface to a decode worker and back, carried out.

Steps 2 and 8 of the read path (docs/ARCHITECTURE.md). One Dispatcher per ingress replica, on its event loop: it knows
the fleet from Serve's replica sets, talks to the router and to decode workers directly, and does what
cluster.request_table decides.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

import msgspec

from cluster.fleet_metrics import HELP
from cluster.openai.backend import Readiness
from cluster.openai.exposition import Family, families
from cluster.request_events import (
    ChunksArrived,
    Deliver,
    End,
    Event,
    FleetChanged,
    Instruction,
    RequestAdded,
    RequestLeft,
    RouterFound,
    RouterLost,
    SendToRouter,
    SendToWorker,
    SequenceCancelled,
    TimePassed,
    Warn,
    WorkerLost,
)
from cluster.request_table import RequestLimits, RequestTable
from cluster.route_log import RouteLog
from cluster.span_recorder import SpanRecorder
from messages.cache import BlocksFetched, BlocksKnown, BlocksListed, CacheAnswer, CacheQuestion, PieceDone, WhereBlocks
from messages.errors import CapacityError, WorkerError
from messages.explain import (
    IndexAnswer,
    PlacementExplained,
    RecordAnswer,
    RecordQuestion,
    RouterAnswer,
    RouterQuestion,
)
from messages.fleet import GetStats, Role, Stats, TakeBlocks, WorkerInfo
from messages.request import GenerateRequest
from messages.responses import StoredAnswer, StoredQuestion
from messages.route import Placement, RouteFailed
from messages.stream import TokenBatch, TokenChunk
from messages.view import ViewTold
from messages.wire import Message
from transport.channel import ChannelClient, ChannelConfig
from transport.process_stats import process_stats
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_STATS_TIMEOUT_S = 2.0
_STATS_AGE_S = 1.0  #: for which an answer is given again: workers do not work for whoever asks for numbers
_ROLES: tuple[Role, ...] = ("decode", "prefill")
_RECONNECT_S = 0.2  #: first pause before the router is tried again; doubles up to
_RECONNECT_MAX_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOptions:
    """The settings of a Dispatcher."""

    ingress_id: str  #: by which its numbers are told apart from others'
    secret: ClusterSecret
    channel: ChannelConfig
    request_timeout_s: float
    max_ttft_s: float  #: predicted; new requests beyond it are refused
    tells_stats: bool = True  #: to the router, every second


_Answer: TypeAlias = Stats | BlocksKnown | CacheAnswer | StoredAnswer | RouterAnswer | RecordAnswer


@dataclass(slots=True)
class _Connection:
    """The channel to a worker or to the router, and who waits for its answers."""

    client: ChannelClient
    answers: dict[str, asyncio.Future[_Answer]] = field(default_factory=dict)  #: that are waited for, by query id


class Dispatcher:
    """A `cluster.openai.backend.Backend` over a fleet of workers. All methods belong to the running event loop."""

    def __init__(
        self,
        options: DispatchOptions,
        values: Callable[[], Mapping[str, float]] = dict,
        log: RouteLog | None = None,
        spans: SpanRecorder | None = None,
    ) -> None:
        """Make it ready on the running loop.

        Args:
            options: settings.
            values: what else this ingress counts, to be shown by the others too.
            log: is told of each request; None: nobody is.
            spans: is told what happens; None: nobody wants to know.
        """
        self._spans = spans
        self._options = options
        self._values = values
        self._log = log
        self._counts: list[Callable[[], Mapping[str, float]]] = [] if log is None else [log.stats]
        self._loop = asyncio.get_running_loop()
        self.table = RequestTable(
            RequestLimits(
                request_timeout_s=options.request_timeout_s,
                lost_after_s=options.channel.lost_after_s,
                max_ttft_s=options.max_ttft_s,
            )
        )
        self._events: deque[Event] = deque()  #: of which the table was not told yet
        self._is_deciding = False
        self._readers: dict[str, Callable[[TokenChunk | None], None]] = {}  #: by request
        self._fleet: dict[str, WorkerInfo] = {}
        self._workers: dict[str, _Connection] = {}  #: by worker id; those that are or were talked to
        self._router: _Connection | None = None
        self._router_addresses: list[str] = []
        self._router_retry_s = _RECONNECT_S
        self._router_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._query_ids = itertools.count()
        self._note: Callable[[Sequence[GenerateRequest]], None] = lambda _: None
        self._answer_stored: Callable[[StoredQuestion], StoredAnswer] = _no_answer
        self._answer_records: Callable[[RecordQuestion], RecordAnswer] = _no_records
        self._fleet_stats: asyncio.Task[list[Stats]] | None = None  #: being asked for, or the last answer
        self._stats_end_s = 0.0  #: until when that answer is good
        self._tell_timer = self._loop.call_later(_STATS_AGE_S, self._tell_stats) if options.tells_stats else None

    # ------------------------------------------------------------------------------------------------------- requests

    def start(self, requests: Sequence[GenerateRequest], take: Callable[[TokenChunk | None], None]) -> None:
        """Begin all sequences of one client request, as `Backend.start` says."""
        request_id = requests[0].request_id
        self._note(requests)
        self._readers[request_id] = take
        if self._log is not None:
            self._log.begin(requests, time.time(), time.monotonic())
        if self._spans is not None:
            self._spans.start(requests)
        self._decide(RequestAdded(tuple(requests)))

    def leave(self, request_id: str) -> None:
        """Stop all that still runs of a client request, as `Backend.leave` says."""
        if self._readers.pop(request_id, None) is not None:
            self._decide(RequestLeft(request_id))

    def cancel(self, request_id: str) -> None:
        """Cancel one sequence, as `Backend.cancel` says."""
        self._decide(SequenceCancelled(request_id))

    def _decide(self, event: Event) -> None:
        """Tell the table, and do what it says; only then tell it what readers did meanwhile.

        Else the end of a request could be sent before its beginning, where it was placed anew in the same breath.
        """
        self._events.append(event)
        if self._is_deciding:
            return
        self._is_deciding = True
        try:
            while self._events:
                event, now_s = self._events.popleft(), time.monotonic()
                instructions = self.table.on_event(event, now_s)
                if self._spans is not None:
                    self._spans.see(event, instructions, now_s)
                for instruction in instructions:
                    self._carry_out(instruction)
        finally:
            self._is_deciding = False
        if self._tick_timer is None and len(self.table) > 0:
            self._tick_timer = self._loop.call_later(_TICK_S, self._tick)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Deliver(request_id, chunk):
                if self._log is not None and (chunk.sources is not None or chunk.error is not None):
                    self._log.take_chunk(chunk, time.monotonic())
                # Whoever takes a chunk may leave, or cancel a sequence, and be told no more by what follows here.
                if (take := self._readers.get(request_id)) is not None:
                    take(chunk)
            case End(request_id):
                if self._log is not None:
                    self._log.end(request_id)
                if (take := self._readers.pop(request_id, None)) is not None:
                    take(None)
            case SendToWorker(worker_id, address, message):
                if self._log is not None and isinstance(message, GenerateRequest):
                    self._log.send(worker_id, address, message)
                self._worker(worker_id, address).client.send(message)
            case SendToRouter(message):
                if self._router is not None:
                    self._router.client.send(message)
            case Warn(message):
                logger.warning("%s", message)
            case _:
                assert_never(instruction)

    def _tick(self) -> None:
        self._tick_timer = None
        self._decide(TimePassed())

    # ------------------------------------------------------------------------------------------------------ the fleet

    def set_workers(self, role: str, infos: Sequence[WorkerInfo]) -> None:
        """Take in the replica set of one role, as Serve has it now.

        A worker that is not in it any more gets nothing new; what it still streams goes on until its channel ends.
        """
        kept = {worker_id: info for worker_id, info in self._fleet.items() if info.role != role}
        self._fleet = kept | {info.worker_id: info for info in infos}
        if self._log is not None:
            self._log.fleet = self._fleet
        self._decide(FleetChanged(self._fleet))

    def set_routers(self, addresses: Sequence[str]) -> None:
        """Take in where routers listen now; the first is used."""
        self._router_addresses = list(addresses)
        self._router_retry_s = _RECONNECT_S
        if self._router is None and addresses:
            self._connect_router()

    @property
    def fleet(self) -> dict[str, WorkerInfo]:
        """The workers that are there now, by id."""
        return self._fleet

    def close(self) -> None:
        """Hang up on the router and all workers; no request may be under way."""
        for timer in (self._router_timer, self._tick_timer, self._tell_timer):
            if timer is not None:
                timer.cancel()
        if self._fleet_stats is not None:
            self._fleet_stats.cancel()
        connections = [*self._workers.values(), *([self._router] if self._router is not None else [])]
        self._workers.clear()
        self._router = None
        for connection in connections:
            _hang_up(connection)

    def _connect_router(self) -> None:
        self._router_timer = None
        if self._router is not None or not self._router_addresses:
            return
        address = self._router_addresses[0]
        self._router = self._connect(address, self._on_router_message, self._on_router_lost)
        logger.info("router at %s", address)
        self._send_stats()
        self._decide(RouterFound())

    def _on_router_lost(self, reason: str) -> None:
        router, self._router = self._router, None
        if router is None:
            return
        logger.warning("router lost (%s): placing by rendezvous hashing until it is back", reason)
        _hang_up(router)
        self._router_timer = self._loop.call_later(self._router_retry_s, self._connect_router)
        self._router_retry_s = min(2 * self._router_retry_s, _RECONNECT_MAX_S)
        self._decide(RouterLost())

    def _on_router_message(self, message: Message) -> None:
        self._router_retry_s = _RECONNECT_S
        match message:
            case Placement(request_id=request_id, predicted_ttft_s=ttft_s, reason=reason):
                logger.debug("request %s: first token in %.3f s predicted: %s", request_id, ttft_s, reason)
                if self._log is not None:
                    self._log.take_placement(message)
                self._decide(message)
            case RouteFailed():
                self._decide(message)
            case (
                Stats()
                | BlocksKnown()
                | StoredAnswer()
                | PlacementExplained()
                | IndexAnswer()
                | RecordAnswer()
                | ViewTold()
            ):
                _take_answer(self._router, message)
            case StoredQuestion() if self._router is not None:
                self._router.client.send(self._answer_stored(message))
            case RecordQuestion() if self._router is not None:
                self._router.client.send(self._answer_records(message))
            case _:
                logger.warning("unexpected %s from the router", type(message).__name__)

    def _worker(self, worker_id: str, address: str) -> _Connection:
        connection = self._workers.get(worker_id)
        if connection is None:
            connection = self._workers[worker_id] = self._connect(
                address,
                lambda message: self._on_worker_message(worker_id, message),
                lambda reason: self._on_worker_lost(worker_id, reason),
            )
        return connection

    def _on_worker_lost(self, worker_id: str, reason: str) -> None:
        connection = self._workers.pop(worker_id, None)
        if connection is None:
            return
        logger.warning("worker %s lost: %s", worker_id, reason)
        _hang_up(connection)
        self._decide(WorkerLost(worker_id, reason))

    def _on_worker_message(self, worker_id: str, message: Message) -> None:
        match message:
            case TokenBatch(chunks=chunks):
                self._decide(ChunksArrived(worker_id, chunks))
            case Stats() | BlocksListed() | PieceDone() | BlocksFetched():
                _take_answer(self._workers.get(worker_id), message)
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, worker_id)

    def _connect(
        self, address: str, on_message: Callable[[Message], None], on_lost: Callable[[str], None]
    ) -> _Connection:
        client = ChannelClient(
            self._options.secret, address, on_message=on_message, on_lost=on_lost, config=self._options.channel
        )
        return _Connection(client)

    # ---------------------------------------------------------------------------------------------- what others ask

    async def ready(self) -> Readiness:
        """Tell whether a request could be answered now."""
        roles = Counter(info.role for info in self._fleet.values())
        detail: dict[str, object] = {
            "decode_workers": roles["decode"],
            "prefill_workers": roles["prefill"],
            "router": self._router is not None,
        }
        return Readiness(is_ready=roles["decode"] > 0, detail=detail)

    async def fleet_stats(self) -> list[Stats]:
        """Return every worker's and the router's numbers, at most 1 s old; who does not answer within 2 s is left out.

        However many ask for them at once or in that second, workers are asked once.
        """
        if self._fleet_stats is None or (self._fleet_stats.done() and self._loop.time() >= self._stats_end_s):
            self._fleet_stats = self._loop.create_task(self._ask_fleet())
        return await asyncio.shield(self._fleet_stats)  # one who asks may leave, the others wait on

    async def _ask_fleet(self) -> list[Stats]:
        connections = [self._worker(worker_id, info.address) for worker_id, info in self._fleet.items()]
        if self._router is not None:
            connections.append(self._router)
        answers = await asyncio.gather(*(self._ask_stats(one) for one in connections), return_exceptions=True)
        self._stats_end_s = self._loop.time() + _STATS_AGE_S
        return [answer for answer in answers if isinstance(answer, Stats)]

    async def metrics(self) -> list[Family]:
        """Return the fleet's numbers, each with whom it comes from, and of this ingress what the dispatcher counts."""
        stats = await self.fleet_stats()
        answering = Counter(one.role for one in stats)
        own_values = self._own_values() | {
            f'kvray_fleet_workers_answering{{role="{role}"}}': float(answering[role]) for role in _ROLES
        }
        own = ({"ingress": self._options.ingress_id}, own_values)
        others = [({"ingress": told.worker_id}, told.values) for one in stats for told in one.ingresses]
        fleet = [({"worker": one.worker_id, "role": one.role}, one.values) for one in stats]
        caches = [
            ({"worker": cache.info.worker_id, "role": "cache"}, cache.values) for one in stats for cache in one.caches
        ]
        return families([own, *others, *fleet, *caches], HELP)

    def _own_values(self) -> dict[str, float]:
        roles = Counter(info.role for info in self._fleet.values())
        workers = {f'kvray_fleet_workers{{role="{role}"}}': float(roles[role]) for role in _ROLES}
        has_router = {"kvray_ingress_has_router": float(self._router is not None)}
        values = {**self.table.stats(), **workers, **has_router, **process_stats()}
        for counted in self._counts:
            values |= counted()
        return values

    def count_with(self, counted: Callable[[], Mapping[str, float]]) -> None:
        """Have `counted` tell more numbers of this ingress, by metric name."""
        self._counts.append(counted)

    def _tell_stats(self) -> None:
        """Tell the router what this ingress counts, for whoever is asked for the numbers of all."""
        self._tell_timer = self._loop.call_later(_STATS_AGE_S, self._tell_stats)
        self._send_stats()

    def _send_stats(self) -> None:
        if self._router is not None:
            values = {**self._own_values(), **self._values()} if self._options.tells_stats else {}
            stats = Stats(query_id="", worker_id=self._options.ingress_id, role="ingress", values=values)
            self._router.client.send(stats)

    async def where(self, names: bytes) -> BlocksKnown:
        """Ask the router who holds the blocks of a prompt, by their concatenated names.

        Raises:
            CapacityError: there is no router now.
            WorkerError: it was lost, or does not answer in time.
        """
        query = WhereBlocks(query_id=self._query_id(), names=names)
        answer = await self._answer(self._require_router(), query, _STATS_TIMEOUT_S)
        assert isinstance(answer, BlocksKnown)
        return answer

    async def ask_router(self, question: RouterQuestion) -> RouterAnswer:
        """Ask the router; the question's id may be any, it gets another one.

        Raises:
            CapacityError: there is no router now.
            WorkerError: it was lost, or does not answer in time.
        """
        asked = msgspec.structs.replace(question, query_id=self._query_id())
        answer = await self._answer(self._require_router(), asked, _STATS_TIMEOUT_S)
        assert isinstance(answer, RouterAnswer)
        return answer

    async def router_stats(self) -> Stats:
        """Ask the router for its numbers, with the other ingresses and the node caches. Raises as `ask_router` does."""
        return await self._ask_stats(self._require_router())

    def answer_records_with(self, answer: Callable[[RecordQuestion], RecordAnswer]) -> None:
        """Have `answer` say what other ingresses ask of the requests that this one knows."""
        self._answer_records = answer

    async def ask_records(self, holder: str, tenant: int | None, request_id: str | None, limit: int) -> RecordAnswer:
        """Ask the ingress `holder` what it knows of a request, or of the newest ones. Raises as `ask_router` does."""
        question = RecordQuestion(
            query_id=self._query_id(),
            asker=self._options.ingress_id,
            holder=holder,
            tenant=tenant,
            request_id=request_id,
            limit=limit,
        )
        answer = await self._answer(self._require_router(), question, _STATS_TIMEOUT_S)
        assert isinstance(answer, RecordAnswer)
        return answer

    def note_with(self, note: Callable[[Sequence[GenerateRequest]], None]) -> None:
        """Have `note`, which is quick and never raises, told what each client asks for."""
        self._note = note

    def answer_with(self, answer: Callable[[StoredQuestion], StoredAnswer]) -> None:
        """Have `answer` say what other ingresses ask of the responses that this one keeps."""
        self._answer_stored = answer

    async def ask_ingress(self, holder: str, owner: str, response_id: str, *, drops: bool) -> StoredAnswer:
        """Ask the ingress `holder` for a response that it keeps.

        Raises:
            CapacityError: there is no router now, which passes it on.
            WorkerError: it was lost, or does not answer in time.
        """
        question = StoredQuestion(
            query_id=self._query_id(),
            asker=self._options.ingress_id,
            holder=holder,
            owner=owner,
            response_id=response_id,
            drops=drops,
        )
        answer = await self._answer(self._require_router(), question, _STATS_TIMEOUT_S)
        assert isinstance(answer, StoredAnswer)
        return answer

    async def ask_owner(self, owner: WorkerInfo, question: CacheQuestion, timeout_s: float) -> CacheAnswer:
        """Ask a worker or a node cache; the question's id may be any, it gets another one.

        Raises:
            WorkerError: it was lost, or does not answer in time.
        """
        asked = msgspec.structs.replace(question, query_id=self._query_id())
        answer = await self._answer(self._worker(owner.worker_id, owner.address), asked, timeout_s)
        assert isinstance(answer, CacheAnswer)
        return answer

    def have_taken(self, worker: WorkerInfo, wanted: TakeBlocks) -> None:
        """Tell a worker to pull blocks, as far as others there are worth less."""
        self._worker(worker.worker_id, worker.address).client.send(wanted)

    def _require_router(self) -> _Connection:
        if self._router is None:
            raise CapacityError("no router answers: nobody knows what lies where", status=503, retry_after_s=1.0)
        return self._router

    async def _ask_stats(self, connection: _Connection) -> Stats:
        answer = await self._answer(connection, GetStats(query_id=self._query_id()), _STATS_TIMEOUT_S)
        assert isinstance(answer, Stats)
        return answer

    def _query_id(self) -> str:
        return f"{os.getpid()}-{next(self._query_ids)}"

    async def _answer(
        self,
        connection: _Connection,
        question: GetStats | WhereBlocks | CacheQuestion | StoredQuestion | RouterQuestion | RecordQuestion,
        timeout_s: float,
    ) -> _Answer:
        future: asyncio.Future[_Answer] = self._loop.create_future()
        connection.answers[question.query_id] = future
        connection.client.send(question)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise WorkerError(f"no answer within {timeout_s:g} s") from None
        finally:
            connection.answers.pop(question.query_id, None)


def _no_answer(question: StoredQuestion) -> StoredAnswer:
    return StoredAnswer(query_id=question.query_id, asker=question.asker, reply=None)


def _no_records(question: RecordQuestion) -> RecordAnswer:
    return RecordAnswer(query_id=question.query_id, asker=question.asker, records=b"[]")


def _take_answer(connection: _Connection | None, answer: _Answer) -> None:
    future = None if connection is None else connection.answers.get(answer.query_id)
    if future is not None and not future.done():
        future.set_result(answer)


def _hang_up(connection: _Connection) -> None:
    for future in connection.answers.values():
        if not future.done():
            future.set_exception(WorkerError("the channel was lost"))
    connection.client.close()
