"""A request's way from the HTTP surface to a decode worker and back: route, send, stream, retry, cancel.

Steps 2 and 8 of the read path (docs/ARCHITECTURE.md). One Dispatcher per ingress replica, on its event loop. It knows
the fleet from Serve's replica sets, asks the router where a prompt should run, and talks to decode workers directly.
While no router is there it places by rendezvous hashing, and says so.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from cluster.openai.backend import Readiness
from kvcache.names import block_names
from kvrouter.fallback import choose
from messages.errors import CapacityError, WorkerError, error_from_info
from messages.fleet import GetStats, Stats, WorkerInfo
from messages.request import CancelRequest, GenerateRequest
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.stream import TokenBatch, TokenChunk
from messages.wire import Message
from transport.channel import ChannelClient, ChannelConfig
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_ROUTE_TIMEOUT_S = 1.0  #: a router that answers later than this is as good as gone
_STATS_TIMEOUT_S = 2.0
_MAX_TRIES = 3  #: placements per request before its first token
_RECONNECT_S = 0.2  #: first pause before the router is tried again; doubles up to
_RECONNECT_MAX_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOptions:
    """The numbers a Dispatcher uses."""

    secret: str
    channel: ChannelConfig
    request_timeout_s: float


@dataclass(slots=True)
class _Stream:
    """One sequence on a decode worker, seen from here."""

    worker_id: str
    queue: asyncio.Queue[TokenChunk]


@dataclass(slots=True)
class _Peer:
    """A process this ingress talks to."""

    client: ChannelClient
    stats: dict[str, asyncio.Future[Stats]] = field(default_factory=dict)


class Dispatcher:
    """cluster.openai.backend.Backend over a fleet of workers."""

    def __init__(self, options: DispatchOptions) -> None:
        self._options = options
        self._secret = ClusterSecret.from_hex(options.secret)
        self._fleet: dict[str, WorkerInfo] = {}
        self._workers: dict[str, _Peer] = {}  #: by worker id; decode workers that are being talked to
        self._streams: dict[str, _Stream] = {}
        self._router: _Peer | None = None
        self._router_addresses: list[str] = []
        self._router_retry_s = _RECONNECT_S
        self._router_timer: asyncio.TimerHandle | None = None
        self._routes: dict[str, asyncio.Future[Placement]] = {}
        self._num_routed: Counter[str] = Counter()
        self._query_ids = itertools.count()
        self._fleet_changed = asyncio.Event()

    # ------------------------------------------------------------------------------------------------------ the fleet

    def set_workers(self, role: str, infos: Sequence[WorkerInfo]) -> None:
        """The replica set of one role, as Serve has it now.

        A worker that is not in it any more gets nothing new; what it still streams goes on until its channel ends.
        """
        kept = {worker_id: info for worker_id, info in self._fleet.items() if info.role != role}
        self._fleet = kept | {info.worker_id: info for info in infos}
        self._fleet_changed.set()

    def set_routers(self, addresses: Sequence[str]) -> None:
        """Where routers listen now; the first is used."""
        self._router_addresses = list(addresses)
        self._router_retry_s = _RECONNECT_S
        if self._router is None and addresses:
            self._connect_router()

    @property
    def fleet(self) -> dict[str, WorkerInfo]:
        """The workers that are there, by id."""
        return self._fleet

    def _connect_router(self) -> None:
        self._router_timer = None
        if self._router is not None or not self._router_addresses:
            return
        address = self._router_addresses[0]
        self._router = _Peer(self._client(address, self._on_router_message, self._on_router_lost))
        logger.info("router at %s", address)

    def _client(
        self, address: str, on_message: Callable[[Message], None], on_lost: Callable[[str], None]
    ) -> ChannelClient:
        return ChannelClient(
            self._secret,
            address,
            on_message=on_message,
            on_lost=on_lost,
            config=self._options.channel,
        )

    def _on_router_lost(self, reason: str) -> None:
        router, self._router = self._router, None
        if router is None:
            return
        logger.warning("router lost (%s): placing by rendezvous hashing until it is back", reason)
        for future in self._routes.values():
            if not future.done():
                future.set_exception(WorkerError(f"the router was lost: {reason}"))
        self._routes.clear()
        self._hang_up(router)
        self._router_timer = asyncio.get_running_loop().call_later(self._router_retry_s, self._connect_router)
        self._router_retry_s = min(2 * self._router_retry_s, _RECONNECT_MAX_S)

    def _on_router_message(self, message: Message) -> None:
        self._router_retry_s = _RECONNECT_S
        match message:
            case Placement(request_id=request_id):
                future = self._routes.pop(request_id, None)
                if future is not None and not future.done():
                    future.set_result(message)
                elif future is None:
                    self._tell_router(RequestEnded(request_id=request_id))
            case RouteFailed(request_id=request_id, error=error):
                future = self._routes.pop(request_id, None)
                if future is not None and not future.done():
                    future.set_exception(error_from_info(error))
            case Stats():
                self._on_stats(self._router, message)
            case _:
                logger.warning("unexpected %s from the router", type(message).__name__)

    def _tell_router(self, message: Message) -> None:
        if self._router is not None:
            self._router.client.send(message)

    def _worker(self, worker_id: str, address: str) -> _Peer:
        peer = self._workers.get(worker_id)
        if peer is None:
            peer = self._workers[worker_id] = _Peer(
                self._client(
                    address,
                    lambda message: self._on_worker_message(worker_id, message),
                    lambda reason: self._drop_worker(worker_id, reason),
                )
            )
        return peer

    def _drop_worker(self, worker_id: str, reason: str) -> None:
        """A worker is gone: what it was streaming ends with an error; what it had not begun is placed anew."""
        peer = self._workers.pop(worker_id, None)
        if peer is None:
            return
        logger.warning("worker %s lost: %s", worker_id, reason)
        error = WorkerError(f"the worker {worker_id} was lost: {reason}", code="worker_lost").info()
        for request_id, stream in list(self._streams.items()):
            if stream.worker_id == worker_id:
                stream.queue.put_nowait(TokenChunk(request_id=request_id, finish_reason="error", error=error))
        self._hang_up(peer)

    def _on_worker_message(self, worker_id: str, message: Message) -> None:
        match message:
            case TokenBatch(chunks=chunks):
                for chunk in chunks:
                    stream = self._streams.get(chunk.request_id)
                    if stream is not None:
                        stream.queue.put_nowait(chunk)
            case Stats():
                self._on_stats(self._workers.get(worker_id), message)
            case _:
                logger.warning("unexpected %s from %s", type(message).__name__, worker_id)

    def _hang_up(self, peer: _Peer) -> None:
        for future in peer.stats.values():
            if not future.done():
                future.set_exception(WorkerError("the channel was lost"))
        peer.client.close()

    # ---------------------------------------------------------------------------------------------------- the request

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[TokenChunk, None]:
        """All sequences of one client request; see cluster.openai.backend.Backend."""
        excluded: list[str] = []
        while True:
            placement = await self._place(requests, tuple(excluded))
            queue: asyncio.Queue[TokenChunk] = asyncio.Queue()
            has_begun = False
            try:
                self._send(requests, placement, queue)
                async for chunk in self._stream(requests, queue):
                    if not has_begun and self._is_retryable(chunk) and len(excluded) + 1 < _MAX_TRIES:
                        break
                    has_begun = True
                    yield chunk
                else:
                    return
            finally:
                self._end(requests, placement)
            logger.warning(
                "request %s: %s failed before its first token, placing it anew",
                requests[0].request_id,
                placement.decode_worker,
            )
            excluded.append(placement.decode_worker)

    def cancel(self, request_id: str) -> None:
        """One sequence is not wanted any more; see Backend."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._send_cancel(stream.worker_id, request_id)
            stream.queue.put_nowait(TokenChunk(request_id=request_id, finish_reason="cancelled"))

    def _send(
        self, requests: Sequence[GenerateRequest], placement: Placement, queue: asyncio.Queue[TokenChunk]
    ) -> None:
        peer = self._worker(placement.decode_worker, placement.decode_address)
        for request in requests:
            self._streams[request.request_id] = _Stream(placement.decode_worker, queue)
            peer.client.send(
                msgspec.structs.replace(
                    request,
                    prefill_worker=placement.prefill_worker,
                    prefill_address=placement.prefill_address,
                    deadline_s=request.deadline_s or self._options.request_timeout_s,
                )
            )

    async def _stream(
        self, requests: Sequence[GenerateRequest], queue: asyncio.Queue[TokenChunk]
    ) -> AsyncGenerator[TokenChunk, None]:
        open_ids = {request.request_id for request in requests}
        # The worker ends a request at its deadline; this one is for a worker that does not even do that.
        ends_s = time.monotonic() + self._options.request_timeout_s + 2 * self._options.channel.lost_after_s
        while open_ids:
            try:
                chunk = queue.get_nowait()
            except asyncio.QueueEmpty:
                try:
                    # Not wait_for: before Python 3.12 it loses a cancellation that comes together with a chunk.
                    async with asyncio.timeout(max(0.0, ends_s - time.monotonic())):
                        chunk = await queue.get()
                except TimeoutError:
                    error = WorkerError("the request did not end in time", code="timeout", status=504).info()
                    for request_id in open_ids:
                        yield TokenChunk(request_id=request_id, finish_reason="error", error=error)
                    return
            if chunk.request_id not in open_ids:
                continue
            if chunk.finish_reason is not None:
                open_ids.discard(chunk.request_id)
                self._streams.pop(chunk.request_id, None)
            yield chunk

    def _end(self, requests: Sequence[GenerateRequest], placement: Placement) -> None:
        """Whatever still runs is stopped; the reservation ends."""
        for request in requests:
            if self._streams.pop(request.request_id, None) is not None:
                self._send_cancel(placement.decode_worker, request.request_id)
        self._num_routed[placement.decode_worker] -= len(requests)
        self._tell_router(RequestEnded(request_id=requests[0].request_id))

    def _send_cancel(self, worker_id: str, request_id: str) -> None:
        peer = self._workers.get(worker_id)
        if peer is not None:
            peer.client.send(CancelRequest(request_id=request_id))

    @staticmethod
    def _is_retryable(chunk: TokenChunk) -> bool:
        return chunk.error is not None and chunk.error.kind == WorkerError.__name__ and chunk.error.status != 504

    # ------------------------------------------------------------------------------------------------------ placement

    async def _place(self, requests: Sequence[GenerateRequest], excluded: tuple[str, ...]) -> Placement:
        """Read path step 2."""
        first = requests[0]
        await self._wait_for_fleet(excluded)
        info = next(info for info in self._fleet.values() if info.role == "decode")
        names = block_names(
            info.fingerprint, first.salt, first.token_ids[: 4 * first.num_prompt_tokens], info.block_size
        )
        route = RouteRequest(
            request_id=first.request_id,
            names=names,
            num_prompt_tokens=first.num_prompt_tokens,
            max_tokens=first.params.max_tokens,
            num_sequences=len(requests),
            exclude=excluded,
        )
        placement = await self._ask_router(route)
        if placement is None:
            placement = choose(route, list(self._fleet.values()), dict(self._num_routed))
        self._num_routed[placement.decode_worker] += len(requests)
        return placement

    async def _ask_router(self, route: RouteRequest) -> Placement | None:
        """None: there is no router that answers, or it does not know the fleet yet."""
        if self._router is None:
            return None
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._routes[route.request_id] = future
        self._tell_router(route)
        try:
            async with asyncio.timeout(_ROUTE_TIMEOUT_S):
                placement = await future
        except TimeoutError:
            logger.warning("the router did not answer within %g s: placing by rendezvous hashing", _ROUTE_TIMEOUT_S)
            return None
        except CapacityError as error:
            if error.status == CapacityError.default_status:
                raise
            return None  # 503: it sees no worker, though Serve says that some are there
        except WorkerError:
            return None
        finally:
            self._routes.pop(route.request_id, None)
        is_known = placement.decode_worker in self._fleet
        return placement if is_known else None

    async def _wait_for_fleet(self, excluded: tuple[str, ...]) -> None:
        """Wait a moment for a replacement while every decode worker is gone.

        Raises:
            CapacityError: none came.
        """
        ends_s = time.monotonic() + self._options.channel.lost_after_s
        while not any(info.role == "decode" and key not in excluded for key, info in self._fleet.items()):
            self._fleet_changed.clear()
            try:
                async with asyncio.timeout(max(0.0, ends_s - time.monotonic())):
                    await self._fleet_changed.wait()
            except TimeoutError:
                raise CapacityError(
                    "no decode worker is there; one is being started", code="no_worker", status=503, retry_after_s=5.0
                ) from None

    # ---------------------------------------------------------------------------------------------- what others ask

    async def ready(self) -> Readiness:
        """Whether a request could be answered now."""
        roles = Counter(info.role for info in self._fleet.values())
        detail: dict[str, object] = {
            "decode_workers": roles["decode"],
            "prefill_workers": roles["prefill"],
            "router": self._router is not None,
        }
        return Readiness(is_ready=roles["decode"] > 0, detail=detail)

    async def fleet_stats(self) -> list[Stats]:
        """What every worker and the router say about themselves; who does not answer in time is left out."""
        peers = [self._worker(worker_id, info.address) for worker_id, info in self._fleet.items()]
        if self._router is not None:
            peers.append(self._router)
        answers = await asyncio.gather(*(self._ask_stats(peer) for peer in peers), return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, Stats)]

    async def metrics_text(self) -> str:
        """The fleet's numbers in the Prometheus text format, each with the worker and role it comes from."""
        lines: dict[str, list[str]] = {}
        for stats in await self.fleet_stats():
            for name, value in stats.values.items():
                base, _, labels = name.rstrip("}").partition("{")
                own = f'worker="{stats.worker_id}",role="{stats.role}"'
                lines.setdefault(base, []).append(f"{base}{{{own}{',' + labels if labels else ''}}} {value}")
        text = []
        for base, samples in sorted(lines.items()):
            text.append(f"# TYPE {base} {'counter' if base.endswith('_total') else 'gauge'}")
            text += samples
        return "\n".join(text) + "\n" if text else ""

    def close(self) -> None:
        """Hang up everywhere."""
        if self._router_timer is not None:
            self._router_timer.cancel()
        peers = [*self._workers.values(), *([self._router] if self._router is not None else [])]
        self._workers.clear()
        self._router = None
        for peer in peers:
            self._hang_up(peer)

    async def _ask_stats(self, peer: _Peer) -> Stats:
        query_id = f"{os.getpid()}-{next(self._query_ids)}"
        future: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        peer.stats[query_id] = future
        peer.client.send(GetStats(query_id=query_id))
        try:
            async with asyncio.timeout(_STATS_TIMEOUT_S):
                return await future
        except TimeoutError:
            raise WorkerError(f"no answer within {_STATS_TIMEOUT_S:g} s") from None
        finally:
            peer.stats.pop(query_id, None)

    @staticmethod
    def _on_stats(peer: _Peer | None, stats: Stats) -> None:
        future = None if peer is None else peer.stats.get(stats.query_id)
        if future is not None and not future.done():
            future.set_result(stats)
