"""What clients asked for, from asked to ended: where it runs, what has come, what has to move. Pure: no clock, no IO.

    RequestAdded --> waiting -----> routing -----> running --> ended
                     (no decode     (the router    |     ^
                      worker)        is asked)     '-----'  its worker was lost or failed it: placed anew, on another
                                                            one, with the tokens that have come so far

Steps 2 and 8 of the read path (docs/ARCHITECTURE.md); cluster.dispatch carries the instructions out. A request is what
one client asked for: one sequence per choice, all on one worker. Tokens are delivered in order, each once, however
often the request moves: a worker goes on after the tokens it is given, exactly as the one before would have.

Each time a request is routed its sequences get ids that were not used before, so that what comes late, from a router
that was given up or a worker that was left, meets no id; and a chunk says which output token it begins with, so that
none is delivered twice and none is missing. Messages to one process arrive in the order in which they were sent:
RequestEnded after a RouteRequest ends the reservation, whether or not the answer is there yet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

import msgspec

from cluster.request_errors import crash_error, is_retryable, nobody_there, timeout_error
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
from cluster.suspects import Suspects, digest
from kvcache.names import TOKEN_BYTES, block_names, pack_tokens
from kvrouter.fallback import OwnQueues, choose
from messages.errors import CapacityError, InvariantError, KvrayError, WorkerError, error_from_info
from messages.fleet import WorkerInfo
from messages.request import SUSPECT_TOKENS, CancelRequest, Choice, GenerateRequest
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.stream import TokenChunk

#: Workers that one request is given to, at most; one that crashes them is given to two, alone at the second one.
MAX_PLACEMENTS = 3
_ROUTE_TIMEOUT_S = 1.0  #: a router that answers later than this is as good as gone
#: A request whose worker was lost waits so long for another one, where there is none: for a process to be started and
#: to load its model, after some 10 s in which one that stopped was not missed yet.
_REPLACEMENT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How long requests may take."""

    request_timeout_s: float  #: from RequestAdded to the end, for requests without a deadline of their own
    #: how long a new request waits where no decode worker is there; a worker that does not even end a request at its
    #: deadline is given twice as long before the request is ended here
    lost_after_s: float
    max_ttft_s: float  #: predicted; a new request beyond it is refused where there is no router to do so


class _Stage(Enum):
    WAITING = "waiting"  #: for a decode worker to be there
    ROUTING = "routing"  #: for the router's answer
    RUNNING = "running"  #: on a decode worker


@dataclass(slots=True, eq=False)
class _Sequence:
    """One choice that has not ended."""

    asked: GenerateRequest  #: as the client asked for it
    request: _Request
    token_ids: list[int] = field(default_factory=list)  #: delivered
    has_begun: bool = False  #: its first chunk, which tells about the prompt, was delivered
    placed_id: str | None = None  #: its id on the worker, while it runs
    is_alone: bool = False  #: its worker computes a step of nothing else, as far as is known
    suspect_until_tokens: int = 0  #: of a suspect: with so many delivered it is none any more


@dataclass(slots=True, eq=False)
class _Request:
    """A client's request that has not ended."""

    request_id: str
    deadline_s: float
    sequences: dict[str, _Sequence] = field(default_factory=dict)  #: those that have not ended, by the client's id
    stage: _Stage = _Stage.WAITING
    due_s: float = 0.0  #: when the stage has taken too long
    route: RouteRequest | None = None  #: the last one
    is_reserved: bool = False  #: the router was told of `route`, and not yet of its end
    num_routes: int = 0
    num_placements: int = 0
    worker_id: str = ""  #: where it runs
    address: str = ""
    failed: list[str] = field(default_factory=list)  #: workers that were lost with it or failed it
    was_lost: bool = False  #: one of them was lost: another is started in its place
    digest: bytes = b""  #: of what the client asked for
    is_suspect: bool = False  #: a worker may have been lost by computing it
    num_unaccepted: int = 0  #: of its prompts, those that its worker has not accepted yet
    is_accepted: bool = False  #: all of it, by a worker, which whoever reads it was told
    is_queued: bool = False  #: it was placed and counts as prefill that waits: nothing has come of it since
    error: KvrayError | None = None  #: what the last of them ended with


class RequestTable:
    """All requests of one ingress that have not ended. One thread."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._fleet: Mapping[str, WorkerInfo] = {}
        self._has_router = False
        self._requests: dict[str, _Request] = {}
        self._sequences: dict[str, _Sequence] = {}  #: by the client's id
        self._placed: dict[str, _Sequence] = {}  #: running ones, by their id on the worker
        self._routes: dict[str, _Request] = {}  #: those that the router knows of, by its id
        self._num_sequences: Counter[str] = Counter()  #: running ones, by worker
        self._queues = OwnQueues()
        self._num_placed = {"router": 0, "hashing": 0}  #: requests, by who chose the worker
        self._num_moved = 0
        self._suspects = Suspects()

    def stats(self) -> dict[str, float]:
        """Return the counters by metric name."""
        placed = {f'kvray_requests_placed_total{{by="{by}"}}': float(n) for by, n in self._num_placed.items()}
        return {"kvray_requests_moved_total": float(self._num_moved), **placed}

    def __len__(self) -> int:
        """Return how many requests have not ended."""
        return len(self._requests)

    def on_event(self, event: Event, now_s: float) -> list[Instruction]:
        """Take in `event`; return what is to be done, in order. Unknown ids are ignored; `now_s` never goes back.

        Raises:
            InvariantError: an added sequence's id is in use; nothing changed.
        """
        out: list[Instruction] = []
        match event:
            case RequestAdded(sequences):
                self._add(sequences, now_s, out)
            case RequestLeft(request_id):
                self._leave(request_id, out)
            case SequenceCancelled(request_id):
                self._cancel(request_id, out)
            case FleetChanged(workers):
                self._change_fleet(workers, now_s, out)
            case RouterFound():
                self._has_router = True
            case RouterLost():
                self._lose_router(now_s, out)
            case Placement():
                self._take_placement(event, now_s, out)
            case RouteFailed():
                self._take_refusal(event, now_s, out)
            case ChunksArrived(worker_id, chunks):
                for chunk in chunks:
                    self._take_chunk(worker_id, chunk, now_s, out)
            case WorkerLost(worker_id, reason):
                self._lose_worker(worker_id, reason, now_s, out)
            case TimePassed():
                for request in list(self._requests.values()):
                    self._check_time(request, now_s, out)
            case _:
                assert_never(event)
        return out

    def check_invariants(self) -> None:
        """Raise InvariantError where the table's parts do not agree: nothing is kept of what has ended."""
        requests = list(self._requests.values())
        sequences = [sequence for request in requests for sequence in request.sequences.values()]
        running = [sequence for sequence in sequences if sequence.request.stage is _Stage.RUNNING]
        pairs: list[tuple[str, object, object]] = [
            ("sequences", self._sequences, {sequence.asked.request_id: sequence for sequence in sequences}),
            ("placed", self._placed, {sequence.placed_id: sequence for sequence in running}),
            (
                "routes",
                self._routes,
                {r.route.request_id: r for r in requests if r.is_reserved and r.route is not None},
            ),
            ("counts", dict(self._num_sequences), dict(Counter(s.request.worker_id for s in running))),
            ("requests without a sequence", [], [r.request_id for r in requests if not r.sequences]),
            ("reservations without a router", [], [] if self._has_router else list(self._routes)),
        ]
        for name, seen, wanted in pairs:
            if seen != wanted:
                raise InvariantError(f"request table: {name}: {seen}, wanted {wanted}")

    def _at(self, stage: _Stage) -> list[_Request]:
        return [request for request in self._requests.values() if request.stage is stage]

    # ----------------------------------------------------------------------------------------------- beginning, ending

    def _add(self, asked: Sequence[GenerateRequest], now_s: float, out: list[Instruction]) -> None:
        known = [one.request_id for one in asked if one.request_id in self._sequences]
        if known:
            raise InvariantError(f"request ids {known} are in use, wanted new ones")
        first = asked[0]
        request = _Request(first.request_id, now_s + (first.deadline_s or self._limits.request_timeout_s))
        request.sequences = {one.request_id: _Sequence(one, request) for one in asked}
        request.digest = digest(asked)
        if self._suspects.has(request.digest, now_s):
            _suspect(request)
        self._requests[request.request_id] = request
        self._sequences |= request.sequences
        self._place(request, now_s, out)

    def _leave(self, request_id: str, out: list[Instruction]) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, out)

    def _cancel(self, request_id: str, out: list[Instruction]) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end_sequence(sequence, out, tells_worker=True)

    def _end_sequence(self, sequence: _Sequence, out: list[Instruction], *, tells_worker: bool) -> None:
        """End one sequence, of which nothing more is wanted or will come; tell its worker where it does not know."""
        request = sequence.request
        self._unplace(sequence, out, tells_worker=tells_worker)
        del self._sequences[sequence.asked.request_id]
        del request.sequences[sequence.asked.request_id]
        if not request.sequences:
            self._end(request, out)

    def _end(self, request: _Request, out: list[Instruction]) -> None:
        for sequence in request.sequences.values():
            self._unplace(sequence, out, tells_worker=True)
            del self._sequences[sequence.asked.request_id]
        self._end_route(request, out)
        self._queues.end(request.request_id)
        del self._requests[request.request_id]
        out.append(End(request.request_id))

    def _fail(self, request: _Request, error: KvrayError, out: list[Instruction]) -> None:
        info = error.info()
        for request_id in request.sequences:
            chunk = TokenChunk(request_id=request_id, finish_reason="error", error=info)
            out.append(Deliver(request.request_id, chunk))
        self._end(request, out)

    def _check_time(self, request: _Request, now_s: float, out: list[Instruction]) -> None:
        if now_s < min(request.due_s, request.deadline_s):
            return
        if request.stage is _Stage.RUNNING:  # its worker ends it at the deadline, unless it does not even do that
            if now_s >= request.due_s:
                self._fail(request, timeout_error(request.stage.value), out)
        elif now_s >= request.deadline_s:
            self._fail(request, timeout_error(request.stage.value), out)
        elif request.stage is _Stage.ROUTING:
            out.append(Warn(f"the router did not answer within {_ROUTE_TIMEOUT_S:g} s: placing by rendezvous hashing"))
            self._place_by_hashing(request, now_s, out)
        else:
            self._fail(request, request.error or nobody_there(), out)

    # ------------------------------------------------------------------------------------------------------ placement

    def _has_candidate(self, request: _Request) -> bool:
        return any(info.role == "decode" and info.worker_id not in request.failed for info in self._fleet.values())

    def _change_fleet(self, workers: Mapping[str, WorkerInfo], now_s: float, out: list[Instruction]) -> None:
        self._fleet = workers
        self._queues.set_fleet(workers.values())
        for request in self._at(_Stage.WAITING):
            if self._has_candidate(request):
                self._place(request, now_s, out)

    def _place(self, request: _Request, now_s: float, out: list[Instruction]) -> None:
        """Have a request placed: ask the router, or hash where there is none: read path step 2."""
        if not self._has_candidate(request):
            self._wait(request, now_s, out)
            return
        request.route = self._route(request)
        if not self._has_router:
            self._place_by_hashing(request, now_s, out)
            return
        request.stage, request.due_s = _Stage.ROUTING, now_s + _ROUTE_TIMEOUT_S
        request.is_reserved = True
        self._routes[request.route.request_id] = request
        out.append(SendToRouter(request.route))

    def _wait(self, request: _Request, now_s: float, out: list[Instruction]) -> None:
        is_empty = not any(info.role == "decode" for info in self._fleet.values())
        if request.error is not None and not request.was_lost and not is_empty:
            self._fail(request, request.error, out)  # all that are there failed it, and nobody will take their place
            return
        timeout_s = _REPLACEMENT_TIMEOUT_S if request.was_lost else self._limits.lost_after_s
        request.stage, request.due_s = _Stage.WAITING, now_s + timeout_s

    def _route(self, request: _Request) -> RouteRequest:
        """Make the question to the router, under an id that the worker will report as one of its sequences."""
        request.num_routes += 1
        first = next(iter(request.sequences.values()))
        num_generated_tokens = max(len(sequence.token_ids) for sequence in request.sequences.values())
        info = next(info for info in self._fleet.values() if info.role == "decode")
        others = {sequence.asked.token_ids: sequence for sequence in request.sequences.values()}  # shared by choices
        del others[first.asked.token_ids]
        prompt = first.asked.token_ids[: TOKEN_BYTES * first.asked.num_prompt_tokens]
        return RouteRequest(
            request_id=_placed_id(first),
            names=block_names(info.fingerprint, first.asked.salt, prompt, info.block_size),
            num_prompt_tokens=first.asked.num_prompt_tokens + num_generated_tokens,  # all that is to be computed
            max_tokens=first.asked.params.max_tokens - num_generated_tokens,
            num_sequences=len(request.sequences),
            other_prompts=tuple(other.asked.num_prompt_tokens + len(other.token_ids) for other in others.values()),
            exclude=tuple(request.failed),
            tenant=first.asked.tenant,
        )

    def _take_placement(self, placement: Placement, now_s: float, out: list[Instruction]) -> None:
        request = self._routes.get(placement.request_id)
        if request is None or request.stage is not _Stage.ROUTING:
            return  # it was told the end of this reservation when it was no longer waited for
        if placement.decode_worker in self._fleet:
            self._num_placed["router"] += 1
            self._run(request, placement, now_s, out)
        else:  # the router does not know yet that it is gone
            self._place_by_hashing(request, now_s, out)

    def _take_refusal(self, failed: RouteFailed, now_s: float, out: list[Instruction]) -> None:
        request = self._routes.get(failed.request_id)
        if request is None or request.stage is not _Stage.ROUTING:
            return
        self._forget_route(request)
        error = error_from_info(failed.error)
        # It may see no worker though Serve says that some are there; and what was taken in once is not turned away.
        is_full = isinstance(error, CapacityError) and error.status == CapacityError.default_status
        if isinstance(error, WorkerError | CapacityError) and (request.num_placements > 0 or not is_full):
            self._place_by_hashing(request, now_s, out)
        else:
            self._fail(request, error, out)

    def _place_by_hashing(self, request: _Request, now_s: float, out: list[Instruction]) -> None:
        assert request.route is not None, "_place comes first"
        self._end_route(request, out)
        if not self._has_candidate(request):
            self._wait(request, now_s, out)
            return
        try:
            max_ttft_s = math.inf if request.num_placements else self._limits.max_ttft_s
            placement = choose(request.route, list(self._fleet.values()), self._num_sequences, self._queues, max_ttft_s)
        except KvrayError as error:
            self._fail(request, error, out)
            return
        self._num_placed["hashing"] += 1
        self._run(request, placement, now_s, out)

    def _lose_router(self, now_s: float, out: list[Instruction]) -> None:
        self._has_router = False
        for request in list(self._routes.values()):
            self._forget_route(request)
        for request in self._at(_Stage.ROUTING):
            self._place_by_hashing(request, now_s, out)

    def _end_route(self, request: _Request, out: list[Instruction]) -> None:
        if request.is_reserved:
            assert request.route is not None
            out.append(SendToRouter(RequestEnded(request_id=request.route.request_id)))
            self._forget_route(request)

    def _forget_route(self, request: _Request) -> None:
        if request.is_reserved:
            assert request.route is not None
            del self._routes[request.route.request_id]
            request.is_reserved = False

    # ------------------------------------------------------------------------------------------------- on its worker

    def _run(self, request: _Request, placement: Placement, now_s: float, out: list[Instruction]) -> None:
        request.num_placements += 1
        request.stage, request.due_s = _Stage.RUNNING, request.deadline_s + 2 * self._limits.lost_after_s
        request.worker_id, request.address = placement.decode_worker, placement.decode_address
        self._num_sequences[request.worker_id] += len(request.sequences)
        assert request.route is not None
        self._queues.add(msgspec.structs.replace(request.route, request_id=request.request_id), placement)
        request.is_queued = True
        prompts = _by_prompt(request)
        request.num_unaccepted = len(prompts)
        for choices in prompts:
            for sequence in choices:
                sequence.placed_id = _placed_id(sequence)
                self._placed[sequence.placed_id] = sequence
            first, *others = choices
            message = msgspec.structs.replace(
                first.asked,
                request_id=_placed_id(first),
                token_ids=first.asked.token_ids + pack_tokens(first.token_ids),
                others=tuple(
                    Choice(_placed_id(one), one.asked.params.choice, pack_tokens(one.token_ids)) for one in others
                ),
                prefill_worker=placement.prefill_worker,
                prefill_address=placement.prefill_address,
                prefill_s=placement.prefill_s,
                held=placement.held,
                predicted_ttft_s=placement.predicted_ttft_s,
                deadline_s=max(0.0, request.deadline_s - now_s),
                is_suspect=request.is_suspect,
            )
            out.append(SendToWorker(request.worker_id, request.address, message))

    def _unplace(self, sequence: _Sequence, out: list[Instruction], *, tells_worker: bool) -> None:
        """Expect nothing more of a sequence on its worker, if it has one."""
        if sequence.placed_id is None:
            return
        request, placed_id = sequence.request, sequence.placed_id
        sequence.placed_id, sequence.is_alone = None, False
        del self._placed[placed_id]
        self._num_sequences[request.worker_id] -= 1
        if not self._num_sequences[request.worker_id]:
            del self._num_sequences[request.worker_id]
        if tells_worker:
            cancel = CancelRequest(request_id=placed_id)
            out.append(SendToWorker(request.worker_id, request.address, cancel))

    def _take_chunk(self, worker_id: str, chunk: TokenChunk, now_s: float, out: list[Instruction]) -> None:
        """Deliver what a sequence's worker sent of it: read path step 8."""
        sequence = self._placed.get(chunk.request_id)
        if sequence is None or sequence.request.worker_id != worker_id:
            return  # of a sequence that was cancelled, or has left that worker
        request = sequence.request
        if chunk.error is not None and is_retryable(chunk.error):
            self._unplace(sequence, out, tells_worker=False)
            self._move(request, error_from_info(chunk.error), now_s, out, is_lost=False)
            return
        if chunk.token_ids and chunk.position != len(sequence.token_ids):
            self._take_strange_chunk(sequence, chunk, now_s, out)
            return
        if chunk.is_accepted:
            request.num_unaccepted -= 1
            if not request.num_unaccepted and not request.is_accepted:
                request.is_accepted = True
                out.append(Deliver(request.request_id, _as_asked(chunk, sequence)))
            return
        sequence.is_alone = chunk.is_alone
        if not chunk.token_ids and chunk.finish_reason is None:
            return  # of a suspect: a step of its own begins or has ended
        sequence.token_ids += chunk.token_ids
        if not sequence.has_begun or chunk.sources is not None or request.num_routes > 1:
            chunk = _as_asked(chunk, sequence)
            sequence.has_begun = True
        out.append(Deliver(request.request_id, chunk))
        if request.is_queued:
            request.is_queued = False
            self._queues.end(request.request_id)
        if chunk.finish_reason is not None:
            self._end_sequence(sequence, out, tells_worker=False)
        if request.is_suspect and chunk.error is None:
            self._clear_if_harmless(request)

    def _take_strange_chunk(self, sequence: _Sequence, chunk: TokenChunk, now_s: float, out: list[Instruction]) -> None:
        """Drop tokens that were delivered already; where some are missing another worker goes on with what there is."""
        request, num_delivered = sequence.request, len(sequence.token_ids)
        if chunk.position < num_delivered:
            out.append(Warn(f"{request.worker_id} sent output token {chunk.position} of {chunk.request_id} again"))
            return
        error = WorkerError(
            f"the worker {request.worker_id} sent output token {chunk.position}, wanted {num_delivered}",
            code="stream_broken",
        )
        self._move(request, error, now_s, out, is_lost=False)

    def _clear_if_harmless(self, request: _Request) -> None:
        if all(len(one.token_ids) >= one.suspect_until_tokens for one in request.sequences.values()):
            request.is_suspect = False
            self._suspects.discard(request.digest)

    def _lose_worker(self, worker_id: str, reason: str, now_s: float, out: list[Instruction]) -> None:
        error = WorkerError(f"the worker {worker_id} was lost: {reason}", code="worker_lost")
        lost = [request for request in self._at(_Stage.RUNNING) if request.worker_id == worker_id]
        guilty = [request for request in lost if any(one.is_alone for one in request.sequences.values())]
        for request in lost:
            if request in guilty:
                self._suspects.add(request.digest, now_s)
                self._fail(request, crash_error(worker_id, reason), out)
                continue
            if not guilty:  # whoever it was is among these
                self._suspects.add(request.digest, now_s)
                _suspect(request)
            self._move(request, error, now_s, out, is_lost=True)

    def _move(
        self, request: _Request, error: KvrayError, now_s: float, out: list[Instruction], *, is_lost: bool
    ) -> None:
        """Place a request anew whose worker was lost or failed it: it goes on after the tokens that were delivered."""
        for sequence in request.sequences.values():
            self._unplace(sequence, out, tells_worker=not is_lost)
        self._end_route(request, out)
        request.failed.append(request.worker_id)
        request.was_lost |= is_lost
        request.error = error
        if request.num_placements >= MAX_PLACEMENTS:
            self._fail(request, error, out)
            return
        self._num_moved += 1
        out.append(Warn(f"request {request.request_id} is placed anew: {error.message}"))
        self._place(request, now_s, out)


def _by_prompt(request: _Request) -> list[list[_Sequence]]:
    """Return the choices of each prompt of a request; those of one prompt are neighbours."""
    found: list[list[_Sequence]] = []
    for sequence in request.sequences.values():
        if found and _is_choice_beside(sequence.asked, found[-1][0].asked):
            found[-1].append(sequence)
        else:
            found.append([sequence])
    return found


def _is_choice_beside(one: GenerateRequest, other: GenerateRequest) -> bool:
    params = msgspec.structs.replace(one.params, choice=other.params.choice)
    return msgspec.structs.replace(one, request_id=other.request_id, params=params) == other


def _suspect(request: _Request) -> None:
    """Have a request computed alone from its next placement on, until its sequences gave some tokens more."""
    request.is_suspect = True
    for sequence in request.sequences.values():
        sequence.suspect_until_tokens = len(sequence.token_ids) + SUSPECT_TOKENS


def _placed_id(sequence: _Sequence) -> str:
    """Make a sequence's id under the request's present route, never used before."""
    request_id, num_routes = sequence.asked.request_id, sequence.request.num_routes
    return request_id if num_routes == 1 else f"{request_id}#{num_routes}"


def _as_asked(chunk: TokenChunk, sequence: _Sequence) -> TokenChunk:
    """Return the chunk under the client's id; what was told about the prompt is not told again."""
    request_id = sequence.asked.request_id
    if sequence.has_begun and (chunk.sources is not None or chunk.prompt_logprobs is not None):
        return msgspec.structs.replace(chunk, request_id=request_id, sources=None, prompt_logprobs=None)
    return chunk if chunk.request_id == request_id else msgspec.structs.replace(chunk, request_id=request_id)
