"""The costs of placements by their plain definition, a worker and a pair at a time: what the fast one must equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvcache.price import (
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
from kvrouter.policy import Assumptions
from kvrouter.rendezvous import affinity, ranks, worker_hash
from kvrouter.worker_state import WorkerState
from messages.fleet import LoadReport
from messages.price import ComputePrice, MovePrice
from messages.route import RouteRequest
from messages.tier import Tier

_MAX_COPIES = 4


@dataclass
class PlainFleet:
    """Workers, and the prices of links between them, as they were reported."""

    workers: dict[str, WorkerState] = field(default_factory=dict)
    moves: dict[str, dict[tuple[str, Tier], MovePrice]] = field(default_factory=dict)
    by_road: dict[str, MovePrice] = field(default_factory=dict)

    def report(self, load: LoadReport) -> None:
        """Take in what a worker says."""
        self.workers[load.worker_id].report(load)
        for price in load.moves:
            self.moves.setdefault(load.worker_id, {})[price.source, price.tier] = price
            self.by_road[price.road] = price

    def best_compute(self) -> dict[bytes, ComputePrice]:
        """The fastest worker's price, by fingerprint."""
        best: dict[bytes, ComputePrice] = {}
        usual = Computation.of(0, 1024)
        for worker in self.workers.values():
            price, fingerprint = worker.compute_price, worker.info.fingerprint
            if price and (fingerprint not in best or compute_s(price, usual) < compute_s(best[fingerprint], usual)):
                best[fingerprint] = price
        return best


class Priced(NamedTuple):
    """A placement, what it costs, and what placements are compared by."""

    decode: str
    prefill: str | None
    num_computed: int
    load_s: float
    cost_s: float
    order: tuple


class _Part(NamedTuple):
    num_bytes: int
    num_computed: int
    wait_s: float
    load_s: float
    queue_s: float
    compute_s: float
    displaced_s: float


class PlainPricing:
    """Prices one request; `runs` as the index gives them."""

    def __init__(self, request: RouteRequest, runs: Sequence[Run], fleet: PlainFleet) -> None:
        self.request, self.runs, self.fleet, self.assumed = request, runs, fleet, Assumptions()
        self.best_compute = fleet.best_compute()

    def placements(self, decodes: Sequence[str], prefills: Sequence[str]) -> list[Priced]:
        """Every placement there is."""
        workers = self.fleet.workers
        prefill_parts = {worker_id: self._part(workers[worker_id]) for worker_id in prefills}
        priced = []
        for worker_id in decodes:
            worker, part = workers[worker_id], self._part(workers[worker_id])
            step_s = (worker.load.decode_step_s if worker.load else 0.0) or self.assumed.decode_step_s
            crowding_s = HARM_WEIGHT * step_s * worker.num_sequences
            ttft_s = part.wait_s + part.load_s + part.queue_s + part.compute_s
            cost_s = ttft_s + (crowding_s + harm_s(part.compute_s, worker.num_sequences)) + part.displaced_s
            priced.append(self._priced(worker, None, part, cost_s))
            decode_s = part.wait_s + crowding_s + part.displaced_s
            for prefill_id, other in prefill_parts.items():
                prefill = workers[prefill_id]
                if can_hand_over(prefill.info, worker.info):
                    price = self._move_price(prefill, worker, "device")
                    own_s = other.wait_s + other.load_s + other.queue_s + other.compute_s + other.displaced_s
                    added_s = handoff_s(price, part.num_bytes, other.compute_s)
                    priced.append(self._priced(worker, prefill, other, own_s + added_s + decode_s))
        return priced

    def _priced(self, decode: WorkerState, prefill: WorkerState | None, computing: _Part, cost_s: float) -> Priced:
        order = (
            round(cost_s * 1000),
            decode.num_sequences,
            -self._rank(decode),
            prefill is not None,
            prefill.num_sequences if prefill else 0,
            -self._rank(prefill) if prefill else 0,
        )
        prefill_id = prefill.info.worker_id if prefill else None
        return Priced(decode.info.worker_id, prefill_id, computing.num_computed, computing.load_s, cost_s, order)

    def _rank(self, worker: WorkerState) -> int:
        hashes = np.array([worker_hash(worker.info.worker_id)], np.uint64)
        return int(ranks(affinity(self.request), hashes)[0])

    def _part(self, worker: WorkerState) -> _Part:
        info = worker.info
        held = [any(holder == (info.worker_id, "device") for holder in run.holders) for run in self.runs]
        num_held = sum(run.end - run.begin for run, is_held in zip(self.runs, held, strict=True) if is_held)
        num_leading = next((run.begin for run, is_held in zip(self.runs, held, strict=True) if not is_held), num_held)
        num_lacking = ceil_div(self.request.num_prompt_tokens, info.block_size) - num_held
        num_computed, load_s = self._num_computed(num_leading * info.block_size), 0.0
        if not all(held):
            covered = self.runs[-1].end
            loading_s = self._load_s(worker, held, (covered - num_held) * info.block_bytes)
            num_left = self._num_computed(covered * info.block_size)
            if loading_s < self._compute_s(worker, num_computed) - self._compute_s(worker, num_left):
                num_computed, load_s = num_left, loading_s
        num_displaced = min(num_lacking, num_lacking - worker.idle_blocks)
        num_again = min(max(num_displaced, 0) * info.block_size, self.request.num_prompt_tokens)
        return _Part(
            num_lacking * info.block_bytes,
            num_computed,
            self._wait_s(worker, num_computed, num_lacking),
            load_s,
            worker.queue_s(num_computed),
            self._compute_s(worker, num_computed),
            (worker.load.reused_share if worker.load else 0.0) * self._compute_s(worker, num_again),
        )

    def _num_computed(self, match_tokens: int) -> int:
        return max(self.request.num_prompt_tokens - match_tokens, 1)

    def _load_s(self, worker: WorkerState, held: Sequence[bool], num_bytes: int) -> float:
        lacking = [run for run, is_held in zip(self.runs, held, strict=True) if not is_held]
        longest = max(lacking, key=lambda run: run.end - run.begin)
        prices = [
            self._move_price(source, worker, holder.tier)
            for holder in longest.holders[:_MAX_COPIES]
            if (source := self.fleet.workers.get(holder.worker_id)) and can_hand_over(source.info, worker.info)
        ]
        return min((price.handoff_s + move_s(price, num_bytes) for price in prices), default=math.inf)

    def _compute_s(self, worker: WorkerState, num_tokens: int) -> float:
        end = max(self.request.num_prompt_tokens, 1)
        computation = Computation.of(end - num_tokens, end)
        best = self.best_compute.get(worker.info.fingerprint)
        if worker.compute_price is None:
            return compute_s(best or self.assumed.compute, computation)
        assert best is not None, "who measured is at most as good as the best"
        return min(compute_s(worker.compute_price, computation), compute_s(best, computation) / self.assumed.doubt)

    def _move_price(self, owner: WorkerState, worker: WorkerState, tier: Tier) -> MovePrice:
        measured: Mapping[tuple[str, Tier], MovePrice] = self.fleet.moves.get(worker.info.worker_id, {})
        if (owner.info.address, tier) in measured:
            return measured[owner.info.address, tier]
        if tier not in ("device", "host"):
            return ASSUMED_MOVES[tier]
        is_near = owner.info.node_id == worker.info.node_id
        common = [road for road in worker.info.roads if road in owner.info.roads]
        road = next((road for road in common if (road in NODE_ROADS) is is_near), "")
        return self.fleet.by_road.get(road, self.assumed.move)

    def _wait_s(self, worker: WorkerState, num_computed: int, num_lacking: int) -> float:
        info, num_new = worker.info, self.request.num_sequences
        if (
            num_computed <= SHORT_TOKENS
            and worker.num_short + num_new <= int(SHORT_SHARE * info.max_num_seqs)
            and num_lacking + num_new <= int(SHORT_SHARE * info.num_blocks)
        ):
            return 0.0
        blocks_share = (num_lacking + num_new - worker.free_blocks) / info.num_blocks
        slots_share = (worker.num_sequences + num_new - info.max_num_seqs) / info.max_num_seqs
        return max(blocks_share, slots_share, 0.0) * self.assumed.sequence_s
