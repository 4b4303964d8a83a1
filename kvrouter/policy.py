"""What a placement costs, in seconds, and which one is best. Pure; the router feeds it.

For one request, each decode worker d, alone or with a prefill worker p that can hand KV over to it:

    time to first token = wait(d)                        until d has a sequence slot and blocks for it
                        + wait(p) + load(p) + queue(p) + compute(p) + handoff of what d lacks
                          or, alone: load(d) + queue(d) + compute(d)
    cost                = time to first token
                        + harm to the sequences on d: one more beside them, and its prefill where d does that
                        + computing again what d, and p, evict for it though nobody else keeps it

Load is what others hold of the prompt and a worker lacks, where bringing it costs less than computing it.

Workers keep a share of steps, slots and blocks for short prompts: one that has little to compute waits for such alone.

Prices are those that workers learn about themselves and about each source that they pull from (kvcache.price); before
their first measurement, and for what nobody measures, those of `Assumptions`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple

from kvcache.price import (
    ASSUMED_COMPUTE,
    ASSUMED_MOVE,
    ASSUMED_MOVES,
    HARM_WEIGHT,
    SHORT_SHARE,
    SHORT_TOKENS,
    Computation,
    compute_s,
    handoff_s,
    harm_s,
    move_s,
)
from kvrouter.fit import NODE_ROADS, can_hand_over, ceil_div
from kvrouter.index import Run
from kvrouter.worker_state import WorkerState, least_price
from messages.errors import CapacityError
from messages.fleet import WorkerInfo
from messages.price import ComputePrice, MovePrice
from messages.request import Copy, HeldRun
from messages.route import RouteRequest
from messages.tier import Tier

#: Costs that agree to so many digits (a millisecond) are equal: predictions are no better.
_COST_DIGITS = 3
_COST_STEP_S = 0.5e-3
#: As many copies of a run are priced, and named to workers: of what everybody holds, any will do.
_MAX_COPIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What is assumed until it is measured, and what nobody measures."""

    compute: ComputePrice = ASSUMED_COMPUTE
    move: MovePrice = ASSUMED_MOVE
    decode_step_s: float = 0.05
    sequence_s: float = 10.0  #: how long a sequence holds its slot and blocks
    doubt: float = 0.5  #: a worker is taken to compute at least at this share of the fastest one's rate


class Candidate(NamedTuple):
    """One placement and what it costs."""

    decode: WorkerState
    prefill: WorkerState | None
    decode_match_tokens: int
    prefill_match_tokens: int
    num_computed_tokens: int
    wait_s: float
    load_s: float  #: of what others hold
    queue_s: float
    compute_s: float
    pull_s: float  #: what the handoff adds, with what is pulled after the computation
    harm_s: float
    displaced_s: float  #: of computing again what is evicted for it
    prefill_s: float  #: once the prefill worker is asked, until its KV lies on the decode worker; 0 without one

    @property
    def ttft_s(self) -> float:
        """Predicted time to first token."""
        return self.wait_s + self.load_s + self.queue_s + self.compute_s + self.pull_s

    @property
    def cost_s(self) -> float:
        """Seconds that placements are compared by: time to first token, the harm to others, and what is lost."""
        return self.ttft_s + self.harm_s + self.displaced_s

    @property
    def delay_s(self) -> float:
        """The part of the time to first token that is others' work."""
        return self.wait_s + self.queue_s

    @property
    def is_short(self) -> bool:
        """Whether little of the prompt is to be computed."""
        return self.num_computed_tokens <= SHORT_TOKENS

    def reason(self) -> str:
        """Say in a few words what the placement is worth, for people."""
        match = f"decode holds {self.decode_match_tokens} tokens"
        if self.prefill is not None:
            match += f", prefill {self.prefill_match_tokens}"
        where = "on decode" if self.prefill is None else "on prefill"
        return (
            f"{match}; {self.num_computed_tokens} computed {where} in {self.compute_s:.3f} s, "
            f"behind {self.delay_s:.3f} s, load {self.load_s:.3f} s, pull {self.pull_s:.3f} s"
        )


class _Cover(NamedTuple):
    """What a worker need not compute of the prompt."""

    num_leading: int  #: blocks at its head that the worker holds
    num_held: int  #: blocks that it holds
    num_covered: int  #: blocks at its head that it holds or loads
    load_s: float


class _PrefillPart(NamedTuple):
    """The part of a placement's cost that a prefill worker adds, whoever decodes."""

    worker: WorkerState
    match_tokens: int
    num_computed_tokens: int
    wait_s: float
    load_s: float
    queue_s: float
    compute_s: float
    displaced_s: float
    seconds: float  #: of waiting, loading, queueing and computing
    cost_s: float  #: with what is displaced


class _DecodePart(NamedTuple):
    """The part of a placement's cost that a decode worker adds, whoever prefills."""

    worker: WorkerState
    cover: _Cover
    num_bytes: int  #: of the prompt's blocks that it lacks
    num_sequences: int
    wait_s: float
    crowding_s: float  #: the harm of one sequence more
    displaced_s: float


class Prices(NamedTuple):
    """What is known of the whole fleet, for workers and links that were not measured."""

    best_compute: Mapping[bytes, ComputePrice] = MappingProxyType({})  #: the fastest worker's, by fingerprint
    by_road: Mapping[str, MovePrice] = MappingProxyType({})  #: some link's, by its road


class Pricing:
    """Prices one request at each worker. `runs`: who holds its blocks, of `workers`, by worker id."""

    def __init__(
        self,
        request: RouteRequest,
        runs: Sequence[Run],
        workers: Mapping[str, WorkerState],
        assumed: Assumptions,
        prices: Prices,
    ) -> None:
        self._request = request
        self._prices = prices
        self._runs = runs
        self._workers = workers
        self._assumed = assumed
        self._held_by = [{holder.worker_id for holder in run.holders if holder.tier == "device"} for run in runs]
        self._sources = [  # of each run, some
            [
                (workers[holder.worker_id], holder.tier)
                for holder in run.holders[:_MAX_COPIES]
                if holder.worker_id in workers
            ]
            for run in runs
        ]
        self._reachable: dict[tuple[str, str, tuple[str, ...], bytes], bool] = {}
        self._num_leading: dict[str, int] = {}
        self._num_held: dict[str, int] = {}
        for run in runs:
            for worker_id, tier in run.holders:
                if tier == "device":
                    if self._num_leading.get(worker_id, 0) == run.begin:
                        self._num_leading[worker_id] = run.end
                    self._num_held[worker_id] = self._num_held.get(worker_id, 0) + run.end - run.begin
        self._key = affinity_key(request)
        self._computations: dict[tuple[int, bytes], tuple[Computation, float, float]] = {}
        self._road_moves: dict[tuple[object, ...], MovePrice] = {}
        self._least_unmeasured = least_price(prices.by_road.values()) if prices.by_road else assumed.move

    def best(self, decodes: Sequence[WorkerState], prefills: Iterable[WorkerState]) -> Candidate:
        """Return the cheapest placement; equals are told apart by least load, then by rendezvous hashing of the prompt.

        `decodes` must not be empty.
        """
        parts = self._ordered([self._prefill_part(worker) for worker in prefills])
        reachable: dict[tuple[object, ...], list[_PrefillPart]] = {}
        candidates: list[Candidate] = []
        for decode in decodes:
            info = decode.info
            group = (info.fingerprint, info.block_size, info.block_bytes, info.node_id, info.roads)
            if group not in reachable:
                reachable[group] = [part for part in parts if can_hand_over(part.worker.info, info)]
            part = self._decode_part(decode)
            candidates.append(self._alone(part))
            pair = self._best_pair(part, reachable[group])
            if pair is not None:
                candidates.append(pair)
        return self._cheapest(candidates)

    def all(self, decodes: Iterable[WorkerState], prefills: Iterable[WorkerState]) -> Iterator[Candidate]:
        """Yield every placement there is, in no order: to explain a choice."""
        prefill_parts = [self._prefill_part(worker) for worker in prefills]
        for decode in decodes:
            part = self._decode_part(decode)
            yield self._alone(part)
            for prefill in prefill_parts:
                if can_hand_over(prefill.worker.info, decode.info):
                    yield self._pair(part, prefill, self._handoff_s(part, prefill))

    def _best_pair(self, part: _DecodePart, prefills: Sequence[_PrefillPart]) -> Candidate | None:
        """Return the cheapest placement with one of `prefills`, which are in order: most are not looked at.

        None can be cheaper than its own cost and the least that a link takes.
        """
        least_move = self._least_unmeasured
        if part.worker.least_move is not None:
            least_move = least_price((least_move, part.worker.least_move))
        best, best_s, best_handoff_s = None, math.inf, 0.0
        for prefill in prefills:
            enough_s = best_s - _COST_STEP_S
            if prefill.cost_s + handoff_s(least_move, part.num_bytes, prefill.compute_s) > enough_s:
                break
            added_s = self._handoff_s(part, prefill)
            if prefill.cost_s + added_s < enough_s:
                best, best_s, best_handoff_s = prefill, prefill.cost_s + added_s, added_s
        return None if best is None else self._pair(part, best, best_handoff_s)

    def _alone(self, part: _DecodePart) -> Candidate:
        decode, cover = part.worker, part.cover
        num_computed = self._num_computed(cover.num_covered * decode.info.block_size)
        computing_s = self._compute_s(decode, num_computed)
        return Candidate(
            decode=decode,
            prefill=None,
            decode_match_tokens=cover.num_leading * decode.info.block_size,
            prefill_match_tokens=0,
            num_computed_tokens=num_computed,
            wait_s=part.wait_s,
            load_s=cover.load_s,
            queue_s=decode.queue_s(num_computed),
            compute_s=computing_s,
            pull_s=0.0,
            harm_s=part.crowding_s + harm_s(computing_s, part.num_sequences),
            displaced_s=part.displaced_s,
            prefill_s=0.0,
        )

    def _pair(self, part: _DecodePart, prefill: _PrefillPart, added_s: float) -> Candidate:
        return Candidate(
            decode=part.worker,
            prefill=prefill.worker,
            decode_match_tokens=part.cover.num_leading * part.worker.info.block_size,
            prefill_match_tokens=prefill.match_tokens,
            num_computed_tokens=prefill.num_computed_tokens,
            wait_s=prefill.wait_s + part.wait_s,
            load_s=prefill.load_s,
            queue_s=prefill.queue_s,
            compute_s=prefill.compute_s,
            pull_s=added_s,
            harm_s=part.crowding_s,
            displaced_s=part.displaced_s + prefill.displaced_s,
            prefill_s=prefill.seconds + added_s,
        )

    def _handoff_s(self, part: _DecodePart, prefill: _PrefillPart) -> float:
        return handoff_s(self._move_price(prefill.worker, part.worker), part.num_bytes, prefill.compute_s)

    def _decode_part(self, decode: WorkerState) -> _DecodePart:
        info, load = decode.info, decode.load
        cover = self._cover(decode)
        num_blocks = ceil_div(self._request.num_prompt_tokens, info.block_size)
        num_sequences = decode.num_sequences
        # Each sequence there makes each step of this one longer, and the other way round.
        step_s = (load.decode_step_s if load else 0.0) or self._assumed.decode_step_s
        return _DecodePart(
            decode,
            cover,
            (num_blocks - cover.num_held) * info.block_bytes,
            num_sequences,
            self._wait_s(decode, cover.num_covered, num_blocks - cover.num_held, num_sequences),
            HARM_WEIGHT * step_s * num_sequences,
            self._displaced_s(decode, num_blocks - cover.num_held),
        )

    def _prefill_part(self, prefill: WorkerState) -> _PrefillPart:
        info, cover = prefill.info, self._cover(prefill)
        num_lacking = ceil_div(self._request.num_prompt_tokens, info.block_size) - cover.num_held
        num_computed = self._num_computed(cover.num_covered * info.block_size)
        wait_s = self._wait_s(prefill, cover.num_covered, num_lacking, prefill.num_sequences)
        queue_s, computing_s = prefill.queue_s(num_computed), self._compute_s(prefill, num_computed)
        displaced_s = self._displaced_s(prefill, num_lacking)
        seconds = wait_s + cover.load_s + queue_s + computing_s
        return _PrefillPart(
            prefill,
            cover.num_leading * info.block_size,
            num_computed,
            wait_s,
            cover.load_s,
            queue_s,
            computing_s,
            displaced_s,
            seconds,
            seconds + displaced_s,
        )

    def held(self, placed: Candidate) -> tuple[HeldRun, ...]:
        """Tell the workers of a placement where blocks of the prompt lie: a few copies of each, their own first."""
        chosen = (placed.decode.info.worker_id, "" if placed.prefill is None else placed.prefill.info.worker_id)
        runs = []
        for run in self._runs:
            holders = sorted(run.holders, key=lambda holder: holder.worker_id not in chosen)
            copies = [
                Copy(self._workers[holder.worker_id].info.address, holder.tier)
                for holder in holders
                if holder.worker_id in self._workers
            ]
            runs.append(HeldRun(run.begin, run.end, tuple(copies[:_MAX_COPIES])))
        return tuple(runs)

    def _cover(self, worker: WorkerState) -> _Cover:
        """Tell what `worker` need not compute: what it holds, and what others do, where loading is cheaper."""
        info = worker.info
        num_leading = self._num_leading.get(info.worker_id, 0)
        num_held = self._num_held.get(info.worker_id, 0)
        num_covered = self._runs[-1].end if self._runs else 0
        if num_covered == num_leading:
            return _Cover(num_leading, num_held, num_leading, 0.0)
        num_bytes = (num_covered - num_held) * info.block_bytes
        load_s = 0.0 if num_held == num_covered else self._load_s(worker, num_bytes)
        size = info.block_size
        held_s = self._compute_s(worker, self._num_computed(num_leading * size))
        if load_s >= held_s - self._compute_s(worker, self._num_computed(num_covered * size)):
            return _Cover(num_leading, num_held, num_leading, 0.0)
        return _Cover(num_leading, num_held, num_covered, load_s)

    def _load_s(self, worker: WorkerState, num_bytes: int) -> float:
        """Return the seconds that bringing `num_bytes` takes from the cheapest copy of the longest run it lacks."""
        worker_id = worker.info.worker_id
        longest = max(
            (number for number, held_by in enumerate(self._held_by) if worker_id not in held_by),
            key=lambda number: self._runs[number].end - self._runs[number].begin,
        )
        prices = [
            self._move_price(source, worker, tier)
            for source, tier in self._sources[longest]
            if self._can_reach(source.info, worker.info)
        ]
        return min((price.handoff_s + move_s(price, num_bytes) for price in prices), default=math.inf)

    def _can_reach(self, source: WorkerInfo, target: WorkerInfo) -> bool:
        key = (source.worker_id, target.node_id, target.roads, target.fingerprint)
        if key not in self._reachable:
            self._reachable[key] = can_hand_over(source, target)
        return self._reachable[key]

    def _num_computed(self, match_tokens: int) -> int:
        """Count the tokens to compute: at least the last one, as somebody has to sample what follows it."""
        return max(self._request.num_prompt_tokens - match_tokens, 1)

    def _compute_s(self, worker: WorkerState, num_computed: int) -> float:
        """Return the seconds for `num_computed` tokens by the worker's own price, where measured, else by the best.

        Never longer than the fleet's best with a share of its rate: who once measured badly, under another load or with
        a few tokens, would else get no prompt any more and so never measure better.
        """
        key = (num_computed, worker.info.fingerprint)
        known = self._computations.get(key)
        if known is None:
            known = self._computations[key] = self._computation(*key)
        computation, unmeasured_s, limit_s = known
        own = worker.compute_price
        if own is None:
            return unmeasured_s
        own_s = compute_s(own, computation)
        return own_s if own_s < limit_s else limit_s

    def _computation(self, num_computed: int, fingerprint: bytes) -> tuple[Computation, float, float]:
        """Return the work of the last `num_computed` tokens, its seconds if the worker never measured, and at most."""
        end = max(self._request.num_prompt_tokens, 1)
        computation = Computation.of(end - num_computed, end)
        best = self._prices.best_compute.get(fingerprint)
        if best is None:
            return computation, compute_s(self._assumed.compute, computation), math.inf
        best_s = compute_s(best, computation)
        return computation, best_s, best_s / self._assumed.doubt

    def _move_price(self, owner: WorkerState, worker: WorkerState, tier: Tier = "device") -> MovePrice:
        """Return the price that `worker` measured of `owner` as a source; else of the road that they would take."""
        measured = worker.moves.get((owner.info.address, tier))
        if measured is not None:
            return measured
        source, target = owner.info, worker.info
        kind = (source.node_id == target.node_id, source.roads, target.roads)
        if kind not in self._road_moves:
            common = [road for road in target.roads if road in source.roads]
            is_near = source.node_id == target.node_id
            road = next((road for road in common if (road in NODE_ROADS) is is_near), "")
            self._road_moves[kind] = self._prices.by_road.get(road, self._assumed.move)
        return self._road_moves[kind] if tier in ("device", "host") else ASSUMED_MOVES[tier]

    def _displaced_s(self, worker: WorkerState, num_lacking_blocks: int) -> float:
        """Return the seconds of computing again what `worker` evicts for blocks that it lacks, and nobody else keeps.

        As if it were of a prompt as long as this one.
        """
        num_displaced = min(num_lacking_blocks, num_lacking_blocks - worker.idle_blocks)
        if num_displaced <= 0:
            return 0.0
        num_tokens = min(num_displaced * worker.info.block_size, self._request.num_prompt_tokens)
        return (worker.load.reused_share if worker.load else 0.0) * self._compute_s(worker, num_tokens)

    def _wait_s(self, worker: WorkerState, num_covered: int, num_lacking_blocks: int, num_sequences: int) -> float:
        """Predict the seconds until slots and blocks come free, if all of them turn over once in `sequence_s`."""
        info, num_new = worker.info, self._request.num_sequences
        if (
            self._num_computed(num_covered * info.block_size) <= SHORT_TOKENS
            and worker.num_short + num_new <= int(SHORT_SHARE * info.max_num_seqs)
            and num_lacking_blocks + num_new <= int(SHORT_SHARE * info.num_blocks)
        ):
            return 0.0
        missing_blocks = num_lacking_blocks + num_new - worker.free_blocks  # each choice writes a block of its own
        missing_slots = num_sequences + num_new - info.max_num_seqs
        if missing_blocks <= 0 and missing_slots <= 0:
            return 0.0
        return max(missing_blocks / info.num_blocks, missing_slots / info.max_num_seqs) * self._assumed.sequence_s

    def _ordered(self, parts: list[_PrefillPart]) -> list[_PrefillPart]:
        """Sort the best first: by cost, then by least load, then by rendezvous hashing of the prompt."""
        keyed = [((round(part.cost_s, _COST_DIGITS), part.worker.num_sequences), part) for part in parts]
        keyed.sort(key=itemgetter(0))
        ordered: list[_PrefillPart] = []
        for _, group in groupby(keyed, key=itemgetter(0)):
            equals = [part for _, part in group]
            if len(equals) > 1:
                first = max(equals, key=lambda part: rendezvous(self._key, part.worker.info.worker_id))
                equals = [first, *(part for part in equals if part is not first)]
            ordered += equals
        return ordered

    def _cheapest(self, candidates: Sequence[Candidate]) -> Candidate:
        costs = [(round(candidate.cost_s, _COST_DIGITS), candidate.decode.num_sequences) for candidate in candidates]
        least = min(costs)
        equals = [candidate for candidate, cost in zip(candidates, costs, strict=True) if cost == least]
        if len(equals) == 1:
            return equals[0]
        return max(equals, key=lambda candidate: rendezvous(self._key, candidate.decode.info.worker_id))


def check_ttft(delay_s: float, own_s: float, max_ttft_s: float) -> None:
    """Refuse a request that would wait too long: others' work, and its own, which counts up to half of the limit.

    A prompt that takes longer than that by itself would else be refused even where nearly nobody waits.

    Raises:
        CapacityError: it passes the limit (429); says when to come again.
    """
    excess_s = delay_s + min(own_s, max_ttft_s / 2) - max_ttft_s
    if excess_s > 0 and delay_s > 0:
        raise CapacityError(
            f"all workers are busy: the first token would come after {delay_s + own_s:.1f} s, "
            f"{max_ttft_s:g} s are allowed",
            code="overloaded",
            retry_after_s=max(1.0, float(math.ceil(excess_s))),
        )


def affinity_key(request: RouteRequest) -> bytes:
    """Return the key of rendezvous hashing: the prompt's first four blocks, so that those who share them meet."""
    end = min(len(request.names), 4 * 16)
    return request.names[end - 16 : end] or request.request_id.encode()


def rendezvous(key: bytes, worker_id: str) -> bytes:
    """Rank the worker for this key: whoever ranks highest gets it (Thaler and Ravishankar 1998).

    Workers that come or go move only the keys they get or had.
    """
    return hashlib.blake2b(worker_id.encode(), key=key[:64], digest_size=8).digest()
