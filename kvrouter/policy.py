"""What a placement costs, in seconds, and which one is best. Pure; the router feeds it.

For one request, each decode worker d, alone or with a prefill worker p that can hand KV over to it:

    time to first token = wait(d)                        until d has a sequence slot and blocks for it
                        + wait(p) + queue(p) + compute(p) + handoff + pull of what d lacks
                          or, alone: queue(d) + compute(d)
    cost                = time to first token
                        + harm to the sequences on d: one more beside them, and its prefill where d does that

Rates are those that workers measure about themselves; before their first measurement, and for what nobody measures,
those of `Rates`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from messages.fleet import LoadReport, WorkerInfo
from messages.route import RouteRequest

#: Roads that end at the node.
_NODE_ROADS = frozenset({"shm", "loopback"})
#: Costs that agree to so many digits (a millisecond) are equal: predictions are no better.
_COST_DIGITS = 3


class _Costed(Protocol):
    @property
    def cost_s(self) -> float: ...


T = TypeVar("T", bound=_Costed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What is assumed until it is measured, and what nobody measures."""

    prefill_tokens_per_s: float = 1000.0
    decode_step_s: float = 0.05
    pull_bytes_per_s: float = 1e9
    handoff_s: float = 0.005  #: fixed part: ask, publish, release
    sequence_s: float = 10.0  #: how long a sequence holds its slot and blocks
    doubt: float = 0.5  #: a worker is taken to prefill at least at this share of the fastest one's rate
    harm_weight: float = 0.2  #: what a second that another sequence stalls is worth, in seconds of time to first token


class Reserved(NamedTuple):
    """What a placement will take at one worker, until the worker's own report shows it."""

    tokens: int  #: to compute
    blocks: int
    sequences: int


@dataclass(slots=True)
class WorkerState:
    """The router's view of one worker: its constants, its last report, and what was promised since."""

    info: WorkerInfo
    load: LoadReport | None = None
    reserved: dict[str, Reserved] = field(default_factory=dict)  #: by request id
    reserved_tokens: int = 0  #: the three are sums over `reserved`
    reserved_blocks: int = 0
    reserved_sequences: int = 0

    def reserve(self, request_id: str, reserved: Reserved) -> None:
        """Count a placement, in the stead of one counted before for the same request."""
        self.release(request_id)
        self.reserved[request_id] = reserved
        self.reserved_tokens += reserved.tokens
        self.reserved_blocks += reserved.blocks
        self.reserved_sequences += reserved.sequences

    def release(self, request_id: str) -> None:
        """Count it no longer; unknown ids are fine."""
        reserved = self.reserved.pop(request_id, None)
        if reserved is not None:
            self.reserved_tokens -= reserved.tokens
            self.reserved_blocks -= reserved.blocks
            self.reserved_sequences -= reserved.sequences

    def report(self, load: LoadReport) -> None:
        """Take the worker's word: what it lists needs no prediction any more."""
        self.load = load
        for request_id in self.reserved.keys() & set(load.request_ids):
            self.release(request_id)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to compute before a new one's."""
        return self.reserved_tokens + (self.load.queued_tokens if self.load else 0)

    @property
    def num_sequences(self) -> int:
        """Running, waiting and promised."""
        return self.reserved_sequences + (self.load.num_running + self.load.num_waiting if self.load else 0)

    @property
    def free_blocks(self) -> int:
        """Free or evictable, less what was promised; negative where that was too much."""
        return (self.load.free_blocks if self.load else self.info.num_blocks) - self.reserved_blocks


class Candidate(NamedTuple):
    """One placement and what it costs."""

    decode: WorkerState
    prefill: WorkerState | None
    decode_match_tokens: int
    prefill_match_tokens: int
    num_computed_tokens: int
    wait_s: float
    queue_s: float
    compute_s: float
    pull_s: float  #: with the handoff
    harm_s: float

    @property
    def ttft_s(self) -> float:
        """Predicted time to first token."""
        return self.wait_s + self.queue_s + self.compute_s + self.pull_s

    @property
    def cost_s(self) -> float:
        """What is compared."""
        return self.ttft_s + self.harm_s

    @property
    def delay_s(self) -> float:
        """The part that is others' work: what admission looks at."""
        return self.wait_s + self.queue_s

    def reason(self) -> str:
        """In a few words."""
        match = f"decode holds {self.decode_match_tokens} tokens"
        if self.prefill is not None:
            match += f", prefill {self.prefill_match_tokens}"
        where = "on decode" if self.prefill is None else "on prefill"
        return (
            f"{match}; {self.num_computed_tokens} computed {where} in {self.compute_s:.3f} s, "
            f"behind {self.delay_s:.3f} s, pull {self.pull_s:.3f} s"
        )


class _PrefillPart(NamedTuple):
    """What a prefill worker costs, whoever decodes."""

    worker: WorkerState
    match_tokens: int
    num_computed_tokens: int
    wait_s: float
    queue_s: float
    compute_s: float

    @property
    def cost_s(self) -> float:
        return self.wait_s + self.queue_s + self.compute_s


class Pricing:
    """Costs of one request at each worker. `matches`: leading blocks held, by worker id.

    `best_rates`: the fastest prefill measured among workers of one fingerprint, tokens a second.
    """

    def __init__(
        self,
        request: RouteRequest,
        matches: Mapping[str, int],
        rates: Rates,
        best_rates: Mapping[bytes, float] = MappingProxyType({}),
    ) -> None:
        self._request = request
        self._best_rates = best_rates
        self._matches = matches
        self._rates = rates
        self._key = affinity_key(request)

    def best(self, decodes: Sequence[WorkerState], prefills: Iterable[WorkerState]) -> Candidate:
        """The cheapest placement; equals are told apart by least load, then by rendezvous hashing of the prompt.

        `decodes` must not be empty.
        """
        # A pair's cost is a sum of what p costs and what d costs: the best p is the same for all d it can reach.
        parts = [self._prefill_part(worker) for worker in prefills]
        best_parts: dict[tuple[object, ...], _PrefillPart | None] = {}
        candidates: list[Candidate] = []
        for decode in decodes:
            info = decode.info
            group = (info.fingerprint, info.block_size, info.block_bytes, info.node_id, info.roads)
            if group not in best_parts:
                reachable = [part for part in parts if can_hand_over(part.worker.info, info)]
                best_parts[group] = self._cheapest(reachable, lambda part: part.worker) if reachable else None
            part = best_parts[group]
            candidates.append(self._alone(decode))
            if part is not None:
                candidates.append(self._pair(part, decode))
        return self._cheapest(candidates, lambda candidate: candidate.decode)

    def all(self, decodes: Iterable[WorkerState], prefills: Iterable[WorkerState]) -> Iterator[Candidate]:
        """Every placement there is, in no order: to explain a choice."""
        parts = [self._prefill_part(worker) for worker in prefills]
        for decode in decodes:
            yield self._alone(decode)
            for part in parts:
                if can_hand_over(part.worker.info, decode.info):
                    yield self._pair(part, decode)

    def _alone(self, decode: WorkerState) -> Candidate:
        match_tokens = self._match_tokens(decode)
        num_computed = self._num_computed(match_tokens)
        compute_s = num_computed / self._prefill_rate(decode)
        # While d prefills, its running sequences wait, and so does one that may come meanwhile.
        stall_s = compute_s * (decode.num_sequences + 1)
        return Candidate(
            decode=decode,
            prefill=None,
            decode_match_tokens=match_tokens,
            prefill_match_tokens=0,
            num_computed_tokens=num_computed,
            wait_s=self._wait_s(decode),
            queue_s=decode.queued_tokens / self._prefill_rate(decode),
            compute_s=compute_s,
            pull_s=0.0,
            harm_s=self._crowding_s(decode) + self._rates.harm_weight * stall_s,
        )

    def _pair(self, part: _PrefillPart, decode: WorkerState) -> Candidate:
        info = decode.info
        held = self._matches.get(info.worker_id, 0)
        lacking = _ceil_div(self._request.num_prompt_tokens, info.block_size) - held
        pull_rate = decode.load.pull_bytes_per_s if decode.load else 0.0
        return Candidate(
            decode=decode,
            prefill=part.worker,
            decode_match_tokens=held * info.block_size,
            prefill_match_tokens=part.match_tokens,
            num_computed_tokens=part.num_computed_tokens,
            wait_s=part.wait_s + self._wait_s(decode),
            queue_s=part.queue_s,
            compute_s=part.compute_s,
            pull_s=self._rates.handoff_s + lacking * info.block_bytes / (pull_rate or self._rates.pull_bytes_per_s),
            harm_s=self._crowding_s(decode),
        )

    def _prefill_part(self, prefill: WorkerState) -> _PrefillPart:
        match_tokens = self._match_tokens(prefill)
        num_computed = self._num_computed(match_tokens)
        rate = self._prefill_rate(prefill)
        return _PrefillPart(
            worker=prefill,
            match_tokens=match_tokens,
            num_computed_tokens=num_computed,
            wait_s=self._wait_s(prefill),
            queue_s=prefill.queued_tokens / rate,
            compute_s=num_computed / rate,
        )

    def _match_tokens(self, worker: WorkerState) -> int:
        return self._matches.get(worker.info.worker_id, 0) * worker.info.block_size

    def _num_computed(self, match_tokens: int) -> int:
        """At least the last token: somebody has to sample what follows it."""
        return max(self._request.num_prompt_tokens - match_tokens, 1)

    def _prefill_rate(self, worker: WorkerState) -> float:
        """Its own, where it was measured; else the fleet's best.

        Never less than a share of the fleet's best: who once measured badly, under another load or with a few tokens,
        would else get no prompt any more and so never measure better.
        """
        measured = worker.load.prefill_tokens_per_s if worker.load else 0.0
        best = self._best_rates.get(worker.info.fingerprint, 0.0)
        if measured:
            return max(measured, self._rates.doubt * best)
        return best or self._rates.prefill_tokens_per_s

    def _crowding_s(self, decode: WorkerState) -> float:
        """Each sequence there makes each step of this one longer, and the other way round."""
        measured = decode.load.decode_step_s if decode.load else 0.0
        return self._rates.harm_weight * (measured or self._rates.decode_step_s) * decode.num_sequences

    def _wait_s(self, worker: WorkerState) -> float:
        """Until slots and blocks come free, if all of them turn over once in `sequence_s`."""
        info = worker.info
        held = self._matches.get(info.worker_id, 0)
        wanted_blocks = blocks_wanted(self._request, info.block_size) - held
        missing_blocks = wanted_blocks - worker.free_blocks
        missing_slots = worker.num_sequences + self._request.num_sequences - info.max_num_seqs
        missing_share = max(missing_blocks / info.num_blocks, missing_slots / info.max_num_seqs, 0.0)
        return missing_share * self._rates.sequence_s

    def _cheapest(self, items: Sequence[T], worker: Callable[[T], WorkerState]) -> T:
        costs = [(round(item.cost_s, _COST_DIGITS), worker(item).num_sequences) for item in items]
        least = min(costs)
        equals = [item for item, cost in zip(items, costs, strict=True) if cost == least]
        if len(equals) == 1:
            return equals[0]
        return max(equals, key=lambda item: rendezvous(self._key, worker(item).info.worker_id))


def can_hand_over(prefill: WorkerInfo, decode: WorkerInfo) -> bool:
    """Whether `decode` can use and reach what `prefill` publishes."""
    if (prefill.fingerprint, prefill.block_size, prefill.block_bytes) != (
        decode.fingerprint,
        decode.block_size,
        decode.block_bytes,
    ):
        return False
    roads = set(prefill.roads) & set(decode.roads)
    if prefill.node_id != decode.node_id:
        roads -= _NODE_ROADS
    return bool(roads)


def can_ever_hold(worker: WorkerInfo, request: RouteRequest) -> bool:
    """Whether the prompt and one token more fit, on an idle worker."""
    return request.num_prompt_tokens < worker.max_model_len and (
        _ceil_div(request.num_prompt_tokens + 1, worker.block_size) <= worker.num_blocks
    )


def blocks_wanted(request: RouteRequest, block_size: int) -> int:
    """Blocks for the prompt and the first tokens of each choice."""
    return _ceil_div(request.num_prompt_tokens, block_size) + request.num_sequences


def affinity_key(request: RouteRequest) -> bytes:
    """What rendezvous hashing goes by: the prompt's first four blocks, so that those who share them meet."""
    end = min(len(request.names), 4 * 16)
    return request.names[end - 16 : end] or request.request_id.encode()


def rendezvous(key: bytes, worker_id: str) -> bytes:
    """The worker's rank for this key: whoever ranks highest gets it (Thaler and Ravishankar 1998).

    Workers that come or go move only the keys they get or had.
    """
    return hashlib.blake2b(worker_id.encode(), key=key[:64], digest_size=8).digest()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
