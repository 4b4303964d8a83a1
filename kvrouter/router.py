"""The router: folds what workers report, and answers where a prompt should run. Pure: events in, instructions out.

Read path step 2, write path steps c and d (docs/ARCHITECTURE.md). Choosing and reserving are one step, so that
requests that come together see each other; a reservation ends when the worker's own report lists the request, when
the ingress says that it ended, or by its deadline.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, assert_never

import msgspec
import numpy as np

from kvcache.names import NAME_BYTES, split_names
from kvrouter.candidate import Candidate
from kvrouter.demand import Demand
from kvrouter.explanations import Explanations, explained
from kvrouter.feeds import Feeds
from kvrouter.fit import blocks_wanted
from kvrouter.fleet_table import FleetTable
from kvrouter.hot_prefixes import HotPrefixes
from kvrouter.index import Appointed, Holder
from kvrouter.links import Ints
from kvrouter.name_memory import NameMemory
from kvrouter.opening import open_index
from kvrouter.policy import Assumptions, Pricing, check_ttft
from kvrouter.view import NOMINAL_TOKENS, holder_views, prefix_views
from kvrouter.warming import Warming
from kvrouter.worker_state import Reserved, WorkerState
from messages.cache import BlockHolder, BlocksKnown, KnownRun, WhereBlocks
from messages.errors import CapacityError, InvariantError, KvrayError, RequestError, WorkerError
from messages.explain import ExplainPlacement, IndexAnswer, IndexQuestion, PlacementExplained
from messages.fleet import KvEvents, LoadReport, Role, SpareBlocks, TakeBlocks, WorkerInfo
from messages.miss import MissedRun
from messages.request import HeldRun
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.view import AskView, ViewTold

logger = logging.getLogger(__name__)

#: A request that no worker reports for so long has ended: workers report every second.
_UNSEEN_S = 30.0
#: Runs of a prompt that are priced and named to workers: what lies behind them, in pieces elsewhere, is computed.
_MAX_RUNS = 128
_LATELY = 1024  #: names of stored blocks that are remembered, for who wants some
#: There at 0, so that whoever watches them sees the first time, too.
_COUNTED_FROM_THE_START = ("kvray_router_gaps_total", "kvray_router_index_full_total", "kvray_router_forgotten_total")
_DURATION_WEIGHT = 0.05  #: of a new sequence duration in the running mean, at least: the first ones count for more


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The router's own limits."""

    #: load: as if nobody held anything of any prompt, and every worker were on its own; to measure what `cache` brings
    routing: Literal["cache", "load"] = "cache"
    assumed: Assumptions = field(default_factory=Assumptions)
    max_ttft_s: float = 20.0  #: predicted time to first token beyond which a request is refused (429)
    reservation_grace_s: float = 3.0  #: a placed request that its worker never reports counts this long past its TTFT
    snapshot_timeout_s: float = 5.0  #: then it is asked for again
    explained_requests: int = 0  #: of so many what was priced for them is kept
    is_observed: bool = False  #: remember what became of blocks that nobody holds, count what prompts begin with


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """The channel to the worker is up."""

    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker, or the channel to it, is gone."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Some time passed; comes about once a second."""


Event: TypeAlias = WorkerJoined | WorkerLost | KvEvents | LoadReport | RouteRequest | RequestEnded | TimePassed


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `message` to whoever sent the RouteRequest that is being handled."""

    message: Placement | RouteFailed


@dataclass(frozen=True, slots=True)
class TellWorker:
    """Send `message` to this worker."""

    worker_id: str
    message: SpareBlocks | TakeBlocks


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """Send Subscribe to this worker."""

    worker_id: str


Instruction: TypeAlias = Reply | TellWorker | AskSnapshot


@dataclass(slots=True)
class _Placed:
    """A request that was placed and has not ended."""

    worker_ids: tuple[str, ...]  #: the decode worker, and the prefill worker while it is to compute
    placed_s: float
    expires_s: float  #: of its reservations, not of itself
    seen_s: float  #: until when a worker reported it; the end of its reservations before that


class Router:
    """Knows the fleet, places requests and reserves for them. One thread."""

    def __init__(self, config: RouterConfig = RouterConfig()) -> None:
        self._config = config
        self._assumed = config.assumed
        self._index = open_index(lambda worker_id: self._workers[worker_id].info.num_blocks)
        self._warming = Warming(self._index.runs, lambda worker_id: self._workers[worker_id].info)
        self._hot = HotPrefixes() if config.is_observed else None
        self._fleet = FleetTable(self._assumed.move)
        self._workers = self._fleet.workers
        self._feeds = Feeds(config.snapshot_timeout_s)
        self._explanations = Explanations(config.explained_requests)
        self._memory = NameMemory() if config.is_observed else None
        self._lately: deque[bytes] = deque(maxlen=_LATELY)  # names, of those that were stored, one of each message
        self._placed: dict[str, _Placed] = {}
        self._watched: dict[str, None] = {}  # of those, who may have reservations, or whom no worker reports
        self._num_reporting: Counter[str] = Counter()  # workers, by request
        self._num_ended = 0
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTED_FROM_THE_START, 0))
        self._heard_s: dict[str, float] = {}  # when each worker joined, or reported last
        self._oldest_report_s = 0.0
        self.demand = Demand()

    def on_event(self, event: Event, now_s: float) -> list[Instruction]:
        """Take in `event`; return what is to be done, in order. Unknown ids are ignored; `now_s` never goes back."""
        told = self._take(event, now_s)
        return told if self._config.routing == "cache" else [one for one in told if not isinstance(one, TellWorker)]

    def _take(self, event: Event, now_s: float) -> list[Instruction]:
        match event:
            case RouteRequest():
                return [Reply(self._route(event, now_s))]
            case KvEvents():
                return self._fold(event, now_s)
            case LoadReport():
                return self._take_report(event, now_s)
            case RequestEnded(request_id=request_id):
                self._end(request_id, now_s)
                return []
            case WorkerJoined(info):
                told = self._forget_worker(info.worker_id, now_s)
                self._fleet.join(WorkerState(info))
                self._heard_s[info.worker_id] = now_s
                self._feeds.begin(info.worker_id)
                if info.role != "cache":
                    self._warming.begin(info.worker_id, now_s)
                return [*told, *self._ask_snapshots(now_s)]
            case WorkerLost(worker_id):
                return [*self._forget_worker(worker_id, now_s), *self._ask_snapshots(now_s)]
            case TimePassed():
                return self._tick(now_s)
            case _:
                assert_never(event)

    def sweep(self) -> list[Instruction]:
        """Forget another piece, some milliseconds' worth, of what workers had who are gone; see `is_swept`."""
        told = _telling(self._index.sweep())
        return told if self._config.routing == "cache" else []

    @property
    def is_swept(self) -> bool:
        """Whether nothing is left of workers who are gone."""
        return self._index.is_swept

    def explain(self, request: RouteRequest) -> list[Candidate]:
        """Return every placement that `request` could get now, cheapest first. Reserves nothing."""
        decodes, prefills = (
            self._that_hold(request, self._candidates(role, request)) for role in ("decode", "prefill")
        )
        return sorted(self._pricing(request).all(decodes, prefills), key=lambda candidate: candidate.cost_s)

    def explained(self, question: ExplainPlacement) -> PlacementExplained:
        """Say what a request was placed by, or what one would be placed by now. Reserves nothing."""
        route = question.route
        if route is None:
            return self._explanations.explained(question.query_id, question.request_id)
        try:
            pricing = self._pricing(route)
            best = self._choose(route, pricing)
            self._check(best)
        except KvrayError as error:
            return PlacementExplained(query_id=question.query_id, error=error.info())
        held = pricing.held(best)
        told = explained(question.query_id, pricing, best)
        return msgspec.structs.replace(told, held=held, missing=self._missing(route, held), reason=best.reason())

    def who_holds(self, question: IndexQuestion) -> IndexAnswer:
        """Tell of each name by itself who holds it; or of some that were stored of late."""
        names = split_names(question.names)
        if question.num_sampled:
            lately = list(dict.fromkeys(self._lately))  # several stored some of them
            names = random.sample(lately, min(question.num_sampled, len(lately)))
        return IndexAnswer(
            query_id=question.query_id,
            names=b"".join(names),
            holders=tuple(tuple(BlockHolder(*one) for one in self._index.holders(name)) for name in names),
            out_of_step=tuple(worker_id for worker_id in self._workers if not self._feeds.is_in_step(worker_id)),
        )

    def where(self, query: WhereBlocks) -> BlocksKnown:
        """Tell who holds the blocks of a prompt."""
        runs = (
            KnownRun(begin, end, tuple(BlockHolder(*holder) for holder in holders))
            for begin, end, holders in self._index.runs(query.names)
        )
        return BlocksKnown(query_id=query.query_id, runs=tuple(runs))

    def view(self, question: AskView, now_s: float) -> ViewTold:
        """Tell people what is known; of a tenant its prefixes alone."""
        hottest = self._hot.hottest(question.num_prefixes, question.tenant, now_s) if self._hot is not None else None
        holders = holder_views(self._workers, self._index, self._feeds.is_in_step) if question.tenant is None else ()
        return ViewTold(
            query_id=question.query_id,
            nominal_tokens=NOMINAL_TOKENS,
            holders=holders,
            prefixes=None if hottest is None else prefix_views(hottest, self._index.runs),
        )

    def has(self, request_id: str) -> bool:
        """Tell whether a request was placed and has neither ended nor been forgotten."""
        return request_id in self._placed

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges by metric name."""
        gauges = {
            "kvray_router_workers": len(self._workers),
            "kvray_router_workers_out_of_step": self._feeds.num_out_of_step,
            "kvray_router_index_names": len(self._index),
            "kvray_router_requests": len(self._placed),
            "kvray_router_oldest_report_seconds": self._oldest_report_s,
            "kvray_router_warmed_blocks_total": self._warming.num_asked,
            "kvray_router_reservations": sum(len(worker.reserved) for worker in self._workers.values()),
        }
        kept = {
            f'kvray_router_kept_share{{of="{worker_id}"}}': self._kept_share(worker_id) for worker_id in self._workers
        }
        return {name: float(value) for name, value in (gauges | kept | self._counts).items()}

    def check_invariants(self) -> None:
        """Raise InvariantError unless what is counted twice agrees."""
        self._index.check_invariants()
        self._fleet.check_invariants()
        if self._hot is not None:
            self._hot.check_invariants()
        if self._workers.keys() != set(self._feeds):
            raise InvariantError(f"router: workers {sorted(self._workers)} but feeds {sorted(self._feeds)}")
        reporting = Counter(request_id for worker in self._workers.values() for request_id in worker.request_ids)
        if reporting != self._num_reporting:
            raise InvariantError(f"router: workers report {reporting}, counted are {self._num_reporting}")
        unwatched = [request_id for request_id in self._placed if request_id not in self._watched | reporting]
        if unwatched or self._watched.keys() - self._placed.keys():
            raise InvariantError(f"router: nobody watches {unwatched}, or what has ended: {self._watched}")
        for worker_id, worker in self._workers.items():
            sums = tuple(sum(column) for column in zip(*worker.reserved.values(), strict=True)) or (0, 0, 0, 0, 0)
            seen = (
                worker.reserved_s,
                worker.reserved_blocks,
                worker.reserved_sequences,
                worker.reserved_short_s,
                worker.reserved_short_sequences,
            )
            if any(abs(a - b) > 1e-6 * max(1.0, a) for a, b in zip(sums, seen, strict=True)):
                raise InvariantError(f"router: {worker_id} has {seen} reserved, its reservations add up to {sums}")
            strangers = [
                request_id
                for request_id in worker.reserved
                if request_id not in self._placed or worker_id not in self._placed[request_id].worker_ids
            ]
            if strangers:
                raise InvariantError(f"router: {worker_id} has reservations of requests not placed there: {strangers}")

    # ---------------------------------------------------------------------------------------------------- placement

    def _route(self, request: RouteRequest, now_s: float) -> Placement | RouteFailed:
        best = None
        num_tokens = request.num_prompt_tokens + sum(request.other_prompts)
        try:
            pricing = self._pricing(request)
            best = self._choose(request, pricing)
            self.demand.note(best, num_tokens)
            self._check(best)
        except KvrayError as error:
            if best is not None:
                self.demand.refuse()
            self._counts[f'kvray_router_refused_total{{kind="{type(error).__name__}"}}'] += 1
            return RouteFailed(request_id=request.request_id, error=error.info())
        self._reserve(request, best, now_s)
        kind = "alone" if best.prefill is None else "pair"
        self._counts[f'kvray_router_placed_total{{kind="{kind}"}}'] += 1
        self._counts["kvray_router_prompt_tokens_total"] += num_tokens
        self._counts["kvray_router_matched_tokens_total"] += num_tokens - best.num_computed_tokens
        held = pricing.held(best)
        self._explanations.keep(request.request_id, pricing, best)
        found = request.names[: NAME_BYTES * held[-1].end if held else 0]
        self._warming.note(found, now_s)
        if self._hot is not None:
            self._hot.count(found, request.request_id, request.tenant, best.decode.info.block_size, now_s)
        decode, prefill = best.decode.info, best.prefill.info if best.prefill else None
        return Placement(
            request_id=request.request_id,
            decode_worker=decode.worker_id,
            decode_address=decode.address,
            prefill_worker=prefill.worker_id if prefill else None,
            prefill_address=prefill.address if prefill else None,
            prefill_s=best.prefill_s,
            decode_match_tokens=best.decode_match_tokens,
            prefill_match_tokens=best.prefill_match_tokens,
            num_computed_tokens=best.num_computed_tokens,
            held=held if self._config.routing == "cache" else None,
            missing=self._missing(request, held),
            predicted_ttft_s=best.ttft_s,
            reason=best.reason(),
        )

    def _missing(self, request: RouteRequest, held: tuple[HeldRun, ...]) -> tuple[MissedRun, ...]:
        if self._memory is None or self._config.routing == "load":  # which goes by nobody's blocks
            return ()
        return self._memory.missing(request.names, held[-1].end if held else 0)

    def _choose(self, request: RouteRequest, pricing: Pricing) -> Candidate:
        if not len(self._fleet.rows("decode")):
            raise CapacityError("no decode worker is there", status=503, code="no_workers", retry_after_s=1.0)
        there = self._candidates("decode", request)
        if not len(there):
            raise WorkerError(f"every decode worker failed this request: {', '.join(request.exclude)}")
        decodes = self._that_hold(request, there)
        if not len(decodes):
            limit = self._max_prompt_tokens(there).max()
            raise RequestError(
                f"the prompt has {_longest(request)} tokens; this model's maximum context length is {limit + 1} tokens "
                f"on any worker, at most {limit} of them the prompt (context_length_exceeded)",
                code="context_length_exceeded",
            )
        return pricing.best(decodes, self._that_hold(request, self._candidates("prefill", request)))

    def _check(self, best: Candidate) -> None:
        # What is only assumed of how long sequences stay orders placements; nobody is refused for it.
        delay_s = best.delay_s if self._num_ended else best.queue_s
        check_ttft(delay_s, best.ttft_s - best.delay_s, self._config.max_ttft_s)

    def _candidates(self, role: Role, request: RouteRequest) -> Ints:
        """Return the rows of workers that may take the request; of one that is warming only where there is no other."""
        there = self._fleet.rows(role)
        if request.exclude:
            there = np.setdiff1d(there, self._fleet.rows_of(request.exclude))
        if warming := self._warming.worker_ids:
            others = np.setdiff1d(there, self._fleet.rows_of(warming))
            return others if len(others) else there
        return there

    def _that_hold(self, request: RouteRequest, rows: Ints) -> Ints:
        """Return the rows of those on which the prompt and one token more fit when they are idle."""
        return rows[_longest(request) <= self._max_prompt_tokens(rows)]

    def _max_prompt_tokens(self, rows: Ints) -> Ints:
        constants = self._fleet.constants(rows)
        limits: Ints = np.minimum(constants.max_model_len, constants.num_blocks * constants.block_size)
        return limits - 1

    def _pricing(self, request: RouteRequest) -> Pricing:
        if self._config.routing == "load":
            request = msgspec.structs.replace(request, names=b"")  # equals are told apart by the request, too
        return Pricing(request, self._index.match(request.names, _MAX_RUNS), self._fleet, self._assumed)

    def _reserve(self, request: RouteRequest, best: Candidate, now_s: float) -> None:
        request_id = request.request_id
        self._release(request_id)
        block_size = best.decode.info.block_size
        num_blocks = blocks_wanted(request, block_size) - best.decode_match_tokens // block_size
        here_s = best.compute_s if best.prefill is None else 0.0
        worker_ids = [best.decode.info.worker_id]
        self._fleet.reserve(worker_ids[0], request_id, _reserved(best, here_s, num_blocks, request.num_sequences))
        if best.prefill is not None:
            num_blocks = blocks_wanted(request, block_size) - best.prefill_match_tokens // block_size
            worker_ids.append(best.prefill.info.worker_id)
            reserved = _reserved(best, best.compute_s, num_blocks, request.num_sequences)
            self._fleet.reserve(worker_ids[1], request_id, reserved)
        expires_s = now_s + best.ttft_s + self._config.reservation_grace_s
        self._placed[request_id] = _Placed(tuple(worker_ids), now_s, expires_s, expires_s)
        self._watched[request_id] = None

    def _end(self, request_id: str, now_s: float) -> None:
        self._release(request_id)
        placed = self._placed.pop(request_id, None)
        self._watched.pop(request_id, None)
        if placed is not None:
            seen, mean = now_s - placed.placed_s, self._assumed.sequence_s
            self._num_ended += 1
            weight = max(_DURATION_WEIGHT, 1 / (1 + self._num_ended))  # what was assumed counts as one that was seen
            self._assumed = replace(self._assumed, sequence_s=mean + weight * (seen - mean))

    def _release(self, request_id: str) -> None:
        placed = self._placed.get(request_id)
        for worker_id in placed.worker_ids if placed is not None else ():
            self._fleet.release(worker_id, request_id)

    # ----------------------------------------------------------------------------------------------- what workers say

    def _take_report(self, report: LoadReport, now_s: float) -> list[Instruction]:
        if report.worker_id not in self._workers:
            return []
        self._heard_s[report.worker_id] = now_s
        changed = self._fleet.report(report)
        if changed is None:
            if not self._feeds.is_in_step(report.worker_id):
                return []
            self._counts["kvray_router_gaps_total"] += 1
            self._feeds.begin(report.worker_id)
            return self._ask_snapshots(now_s)
        self._num_reporting.update(changed.came)
        for request_id in changed.gone:
            self._lose_sight(request_id, now_s)
        for request_id in report.declined_ids:
            placed = self._placed.get(request_id)
            if placed is None or placed.worker_ids == (report.worker_id,) or report.worker_id not in placed.worker_ids:
                continue  # told before, or another placement
            self._release(request_id)  # the decode worker's own report counts it from here on
            placed.worker_ids = (report.worker_id,)
            self._counts["kvray_router_declined_total"] += 1
        return []

    def _lose_sight(self, request_id: str, now_s: float) -> None:
        """Take in that a worker does not report a request any more."""
        self._num_reporting[request_id] -= 1
        if self._num_reporting[request_id]:
            return
        del self._num_reporting[request_id]
        if request_id in self._placed:
            self._placed[request_id].seen_s = max(self._placed[request_id].seen_s, now_s)
            self._watched[request_id] = None

    def _fold(self, event: KvEvents, now_s: float) -> list[Instruction]:
        match self._feeds.take(event, now_s):
            case "ignore":
                return []
            case "gap":
                self._counts["kvray_router_gaps_total"] += 1
                return self._ask_snapshots(now_s)
        is_snapshot = event.cleared or event.num_pieces_left is not None
        told = _telling(self._index.drop(event.worker_id)) if event.cleared else []
        try:
            appointed = self._index.fold(
                event.worker_id,
                event.tier,
                stored=event.stored,
                removed=event.removed,
                is_use=not is_snapshot,  # what a snapshot names may have lain there for long
            )
        except ValueError:
            self._counts["kvray_router_gaps_total"] += 1
            self._feeds.begin(event.worker_id)
            return [*told, *self._ask_snapshots(now_s)]
        except CapacityError as error:
            logger.warning(
                "router: what %s has in tier %s is unknown here: %s", event.worker_id, event.tier, error.message
            )
            self._counts["kvray_router_index_full_total"] += 1
            self._feeds.put_off(event.worker_id, now_s)
            return [*told, *_telling(self._index.drop(event.worker_id))]
        told += _telling(appointed)
        if self._memory is not None:
            self._memory.note(Holder(event.worker_id, event.tier), event.stored, event.removed)
            if event.stored:
                self._lately.append(event.stored[-NAME_BYTES:])
        # Also of a snapshot: one that follows a gap brings what came to be held meanwhile.
        warming = self._warming.on_stored(event.worker_id, event.stored)
        if is_snapshot and not event.num_pieces_left:
            warming += self._warming.on_snapshot(event.worker_id, self._index.num_held(event.worker_id), now_s)
            told += self._ask_snapshots(now_s)
        return told + [TellWorker(event.worker_id, take) for take in warming]

    def _ask_snapshots(self, now_s: float) -> list[Instruction]:
        return [AskSnapshot(worker_id) for worker_id in self._feeds.to_ask(now_s)]

    def _kept_share(self, worker_id: str) -> float:
        """Return the share of a worker's memory that holds blocks which nobody else keeps."""
        num_kept = self._index.num_held(worker_id) - self._index.num_spare(worker_id)
        return num_kept / self._workers[worker_id].info.num_blocks

    def _forget_worker(self, worker_id: str, now_s: float) -> list[Instruction]:
        for request_id in self._workers[worker_id].request_ids if worker_id in self._workers else ():
            self._lose_sight(request_id, now_s)
        self._fleet.leave(worker_id)
        self._heard_s.pop(worker_id, None)
        self._feeds.forget(worker_id)
        self._warming.forget(worker_id)
        if self._memory is not None:
            self._memory.lose(worker_id)
        return _telling(self._index.drop(worker_id))

    def _tick(self, now_s: float) -> list[Instruction]:
        self._warming.on_time(now_s)
        self._oldest_report_s = now_s - min(self._heard_s.values(), default=now_s)
        self._fleet.find_best_compute()
        if self._memory is not None:
            self._memory.flush()
        for request_id in tuple(self._watched):
            placed = self._placed[request_id]
            if placed.expires_s < now_s:
                self._release(request_id)
                if request_id in self._num_reporting:
                    del self._watched[request_id]
                elif placed.seen_s + _UNSEEN_S < now_s:  # it ended, or never began, and its ingress did not say so
                    del self._watched[request_id], self._placed[request_id]
                    self._counts["kvray_router_forgotten_total"] += 1
        return self._ask_snapshots(now_s)


def _telling(appointed: Iterable[Appointed]) -> list[Instruction]:
    return [TellWorker(worker_id, SpareBlocks(spare=spare, kept=kept)) for worker_id, spare, kept in appointed]


def _longest(request: RouteRequest) -> int:
    return max(request.num_prompt_tokens, *request.other_prompts, 0)


def _reserved(best: Candidate, computing_s: float, num_blocks: int, num_sequences: int) -> Reserved:
    if best.is_short:
        return Reserved(computing_s, num_blocks, num_sequences, computing_s, num_sequences)
    return Reserved(computing_s, num_blocks, num_sequences)
