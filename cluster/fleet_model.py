"""A small model of a fleet: what first tokens and gaps so many workers give a trace. Simulated time, pure.

    arrives --shortest queue--> prefill worker, one prompt after the other --slots and blocks free--> decode worker

A decode worker makes a token of each of its sequences in a step, which is longer the more there are. What is not
modelled: handoffs, chunks, preemption, faults. Hits are given with each request (cluster.hit_curve).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.autoscaling import Asked, FleetSeen, RoleSeen, WorkerSeen
from kvcache.price import Computation, compute_s
from messages.errors import ConfigError
from messages.price import ComputePrice

_WINDOW_S = 30.0  #: of the rates that a policy is told
_PERIOD_S = 1.0  #: between two decisions of a policy


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShape:
    """What a worker can do; prefill and decode workers are alike."""

    compute: ComputePrice
    max_num_seqs: int
    kv_tokens: int  #: of its pool
    start_s: float = 0.0  #: from being wanted until it takes work


class ModelRequest(NamedTuple):
    """A request to the model."""

    num_prompt_tokens: int
    num_hit_tokens: int
    num_output_tokens: int
    pause_s: float = 0.0  #: after the answer before it


@dataclass(frozen=True, slots=True)
class ModelSession:
    """Requests of which each comes after the answer to the one before it."""

    begin_s: float
    requests: tuple[ModelRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many workers a policy may have."""

    least_prefill: int = 1
    most_prefill: int = 1
    least_decode: int = 1
    most_decode: int = 1


class Numbers(NamedTuple):
    """How many workers were wanted from a time on."""

    at_s: float
    prefill: int
    decode: int


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    ttft_s: list[float] = field(default_factory=list)  #: of each request, as they got it
    arrived_s: list[float] = field(default_factory=list)  #: of the same requests
    itl_s: list[float] = field(default_factory=list)  #: mean of each request with two tokens or more
    numbers: list[Numbers] = field(default_factory=list)  #: each time that they changed
    end_s: float = 0.0
    prefill_worker_s: float = 0.0  #: that workers were there
    decode_worker_s: float = 0.0


Policy = Callable[[FleetSeen, float], tuple[int, int]]  #: what is seen, and when: prefill and decode workers wanted


@dataclass(slots=True)
class _Prefill:
    ready_s: float
    free_s: float  #: when all that is queued is computed
    ends_s: deque[float] = field(default_factory=deque)  #: when each prompt of that is
    is_leaving: bool = False


@dataclass(slots=True)
class _Row:
    """A sequence that is decoded, or waits to be."""

    session: int
    place: int
    arrived_s: float
    first_s: float = 0.0


@dataclass(slots=True)
class _Decode:
    """A decode worker. All its sequences get their tokens at the same pace: `steps` counts them since the start."""

    ready_s: float
    is_leaving: bool = False
    steps: float = 0.0
    as_of_s: float = 0.0
    num_keys: int = 0
    ends: list[tuple[float, int, _Row]] = field(default_factory=list)  #: at which of `steps` each ends
    version: int = 0  #: of the event at which the next one ends


class FleetModel:
    """Runs sessions through a fleet of `shape`, once."""

    def __init__(
        self,
        shape: WorkerShape,
        sessions: Sequence[ModelSession],
        num_prefill: int,
        num_decode: int,
        policy: Policy | None = None,
        limits: Limits = Limits(),
    ) -> None:
        """`policy` is asked every second, as long as there is something to do; without one the numbers stay.

        Raises:
            ConfigError: a request does not fit into a worker's pool.
        """
        longest = max(r.num_prompt_tokens + r.num_output_tokens for session in sessions for r in session.requests)
        if longest > shape.kv_tokens:
            raise ConfigError(f"the longest request has {longest} tokens, a worker has KV for {shape.kv_tokens}")
        self._shape, self._sessions, self._policy, self._limits = shape, sessions, policy, limits
        self._prefills = [_Prefill(0.0, 0.0) for _ in range(num_prefill)]
        self._decodes = [_Decode(0.0) for _ in range(num_decode)]
        self._waiting: deque[_Row] = deque()  # for slots or blocks
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now_s = 0.0
        self._num_open = sum(len(session.requests) for session in sessions)
        self._asked: deque[tuple[float, float, float, int, int]] = deque()  # when, compute, TTFT, tokens, hits
        self._busy: deque[tuple[float, float]] = deque()  # when, seconds of prefill computed by then
        self._busy_s = 0.0
        self.outcome = Outcome(numbers=[Numbers(0.0, num_prefill, num_decode)])

    def run(self) -> Outcome:
        """Return what came of it, when the last answer has ended."""
        for number, session in enumerate(self._sessions):
            self._at(session.begin_s, lambda number=number: self._arrive(number, 0))  # type: ignore[misc]
        if self._policy is not None:
            self._at(_PERIOD_S, self._decide)
        while self._events and self._num_open:
            at_s, _, act = heapq.heappop(self._events)
            self._pass_time(at_s)
            act()
        self.outcome.end_s = self._now_s
        return self.outcome

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), act))

    def _pass_time(self, now_s: float) -> None:
        elapsed_s = now_s - self._now_s
        self.outcome.prefill_worker_s += elapsed_s * len(self._prefills)
        self.outcome.decode_worker_s += elapsed_s * len(self._decodes)
        computing = sum(worker.free_s > self._now_s for worker in self._prefills)
        self._busy_s += elapsed_s * computing  # as of the last event, of which there are many
        self._now_s = now_s

    # ------------------------------------------------------------------------------------------------------ requests

    def _arrive(self, session: int, place: int) -> None:
        request = self._sessions[session].requests[place]
        taking = [w for w in self._prefills if not w.is_leaving and w.ready_s <= self._now_s]
        worker = min(taking or [w for w in self._prefills if not w.is_leaving], key=lambda w: max(w.free_s, w.ready_s))
        taken_s = compute_s(self._shape.compute, Computation.of(request.num_hit_tokens, request.num_prompt_tokens))
        begin_s = max(self._now_s, worker.free_s, worker.ready_s)
        worker.free_s = begin_s + taken_s
        worker.ends_s.append(worker.free_s)
        ttft_s = worker.free_s - self._now_s
        self._asked.append((self._now_s, taken_s, ttft_s, request.num_prompt_tokens, request.num_hit_tokens))
        row = _Row(session, place, self._now_s)
        self._at(worker.free_s, lambda: self._admit(row))

    def _admit(self, row: _Row) -> None:
        self._waiting.append(row)
        self._go_on()

    def _go_on(self) -> None:
        """Admit what waits and has room, in order."""
        while self._waiting:
            row = self._waiting[0]
            wanted = self._keys(row)
            free = [
                worker
                for worker in self._decodes
                if not worker.is_leaving
                and worker.ready_s <= self._now_s
                and len(worker.ends) < self._shape.max_num_seqs
                and worker.num_keys + wanted <= self._shape.kv_tokens
            ]
            if not free:
                return
            self._waiting.popleft()
            self._begin(min(free, key=lambda worker: len(worker.ends)), row)

    def _keys(self, row: _Row) -> int:
        request = self._sessions[row.session].requests[row.place]
        return request.num_prompt_tokens + request.num_output_tokens

    def _begin(self, worker: _Decode, row: _Row) -> None:
        row.first_s = self._now_s
        self.outcome.ttft_s.append(self._now_s - row.arrived_s)
        self.outcome.arrived_s.append(row.arrived_s)
        num_more = self._sessions[row.session].requests[row.place].num_output_tokens - 1
        if num_more <= 0:
            self._end(row)
            return
        self._catch_up(worker)
        worker.num_keys += self._keys(row)
        heapq.heappush(worker.ends, (worker.steps + num_more, next(self._order), row))
        self._await_next(worker)

    def _step_s(self, worker: _Decode) -> float:
        price = self._shape.compute
        return price.step_s + len(worker.ends) * price.row_s + worker.num_keys * price.row_key_s

    def _catch_up(self, worker: _Decode) -> None:
        if worker.ends:
            worker.steps += (self._now_s - worker.as_of_s) / max(1e-9, self._step_s(worker))
        worker.as_of_s = self._now_s

    def _await_next(self, worker: _Decode) -> None:
        worker.version = version = next(self._order)
        if worker.ends:
            left_s = (worker.ends[0][0] - worker.steps) * self._step_s(worker)
            self._at(self._now_s + max(0.0, left_s), lambda: self._end_next(worker, version))
        elif worker.is_leaving:
            self._decodes.remove(worker)

    def _end_next(self, worker: _Decode, version: int) -> None:
        if worker.version != version:
            return
        self._catch_up(worker)
        _, _, row = heapq.heappop(worker.ends)
        worker.num_keys -= self._keys(row)
        num_more = self._sessions[row.session].requests[row.place].num_output_tokens - 1
        self.outcome.itl_s.append((self._now_s - row.first_s) / num_more)
        self._await_next(worker)
        self._end(row)
        self._go_on()

    def _end(self, row: _Row) -> None:
        self._num_open -= 1
        requests = self._sessions[row.session].requests
        if row.place + 1 < len(requests):
            pause_s = requests[row.place + 1].pause_s
            self._at(self._now_s + pause_s, lambda: self._arrive(row.session, row.place + 1))

    # -------------------------------------------------------------------------------------------------------- policy

    def _decide(self) -> None:
        assert self._policy is not None
        prefill, decode = self._policy(self._seen(), self._now_s)
        last = self.outcome.numbers[-1]
        if (prefill, decode) != (last.prefill, last.decode):
            self.outcome.numbers.append(Numbers(self._now_s, prefill, decode))
            self._resize(prefill, decode)
        self._at(self._now_s + _PERIOD_S, self._decide)

    def _resize(self, num_prefill: int, num_decode: int) -> None:
        ready_s = self._now_s + self._shape.start_s
        prefills = [worker for worker in self._prefills if not worker.is_leaving]
        for _ in range(num_prefill - len(prefills)):
            self._prefills.append(_Prefill(ready_s, ready_s))
        for prefill in sorted(prefills, key=lambda worker: worker.free_s)[: max(0, len(prefills) - num_prefill)]:
            prefill.is_leaving = True
            self._at(max(self._now_s, prefill.free_s), lambda prefill=prefill: self._prefills.remove(prefill))  # type: ignore[misc]
        decodes = [worker for worker in self._decodes if not worker.is_leaving]
        for _ in range(num_decode - len(decodes)):
            self._decodes.append(_Decode(ready_s))
            self._at(ready_s, self._go_on)
        for decode in sorted(decodes, key=lambda worker: len(worker.ends))[: max(0, len(decodes) - num_decode)]:
            decode.is_leaving = True
            if not decode.ends:
                self._decodes.remove(decode)

    def _seen(self) -> FleetSeen:
        """Return what workers and a router would have told."""
        now_s = self._now_s
        prefills = [worker for worker in self._prefills if not worker.is_leaving]
        decodes = [worker for worker in self._decodes if not worker.is_leaving]
        there = [worker for worker in prefills if worker.ready_s <= now_s]
        serving = [worker for worker in decodes if worker.ready_s <= now_s]
        while self._asked and self._asked[0][0] < now_s - _WINDOW_S:
            self._asked.popleft()
        self._busy.append((now_s, self._busy_s))
        while self._busy[0][0] < now_s - _WINDOW_S:
            self._busy.popleft()
        span_s = max(_PERIOD_S, now_s - self._busy[0][0])
        busy = (self._busy_s - self._busy[0][1]) / span_s / max(1, len(there))
        limits = self._limits
        return FleetSeen(
            prefill=RoleSeen(
                num_wanted=len(prefills),
                num_there=len(there),
                least=limits.least_prefill,
                most=limits.most_prefill,
                workers=tuple(_seen_prefill(worker, now_s, min(1.0, busy)) for worker in there),
            ),
            decode=RoleSeen(
                num_wanted=len(decodes),
                num_there=len(serving),
                least=limits.least_decode,
                most=limits.most_decode,
                workers=tuple(self._seen_decode(w, len(self._waiting) / len(serving)) for w in serving),
            ),
            asked=self._asked_lately(min(_WINDOW_S, max(_PERIOD_S, now_s))),
        )

    def _seen_decode(self, worker: _Decode, num_waiting: float) -> WorkerSeen:
        price = self._shape.compute
        return WorkerSeen(
            queued_s=0.0,
            busy_share=float(bool(worker.ends)),
            num_waiting=num_waiting,
            num_running=len(worker.ends),
            max_num_seqs=self._shape.max_num_seqs,
            used_share=worker.num_keys / self._shape.kv_tokens,
            step_s=self._step_s(worker) if worker.ends else 0.0,
            step_fixed_s=price.step_s + price.row_s,
        )

    def _asked_lately(self, span_s: float) -> Asked:
        tokens = sum(asked[3] for asked in self._asked)
        return Asked(
            prefill_s_per_s=sum(asked[1] for asked in self._asked) / span_s,
            decode_s_per_s=0.0,
            ttft_s=sum(asked[2] for asked in self._asked) / len(self._asked) if self._asked else 0.0,
            hit_share=sum(asked[4] for asked in self._asked) / tokens if tokens else 0.0,
        )


def _seen_prefill(worker: _Prefill, now_s: float, busy_share: float) -> WorkerSeen:
    while worker.ends_s and worker.ends_s[0] <= now_s:
        worker.ends_s.popleft()
    return WorkerSeen(
        queued_s=max(0.0, worker.free_s - now_s),
        busy_share=busy_share,
        num_waiting=len(worker.ends_s),
        num_running=0,
        max_num_seqs=1,
        used_share=0.0,
        step_s=0.0,
        step_fixed_s=0.0,
    )
