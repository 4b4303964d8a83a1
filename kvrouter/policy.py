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

All workers are priced at once, in arrays; of the pairs, those that bounds do not rule out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.price import ASSUMED_COMPUTE, ASSUMED_MOVE, HARM_WEIGHT, SHORT_SHARE, SHORT_TOKENS, STEP_TOKENS
from kvrouter.candidate import Candidate
from kvrouter.fleet_table import Constants, FleetTable, Loads
from kvrouter.index import Holder, Matches
from kvrouter.links import Floats, Ints
from kvrouter.rendezvous import affinity, ranks
from kvrouter.worker_state import WorkerState
from messages.errors import CapacityError
from messages.price import ComputePrice, MovePrice
from messages.request import Copy, HeldRun
from messages.route import RouteRequest
from transport.checksum import Words

#: Costs that agree to a millisecond are equal: predictions are no better.
_COST_STEPS_PER_S = 1e3
#: What two sums of the same seconds may differ by, added up in another order.
_ROUNDING_S = 1e-9
#: As many copies of a run are priced, and named to workers: of what everybody holds, any will do.
_MAX_COPIES = 4
#: Decode workers whose pairs are priced at once, at first: the best one mostly rules out all others.
_FIRST_ROWS = 1
_MORE_ROWS = 4  #: times as many with each round
#: Where matched tokens may lie, the nearest first.
_PLACES = ("device", "peer", "host", "disk", "remote")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What is assumed until it is measured, and what nobody measures."""

    compute: ComputePrice = ASSUMED_COMPUTE
    move: MovePrice = ASSUMED_MOVE
    decode_step_s: float = 0.05
    sequence_s: float = 10.0  #: how long a sequence holds its slot and blocks
    doubt: float = 0.5  #: a worker is taken to compute at least at this share of the fastest one's rate


class _Parts(NamedTuple):
    """What each of some workers adds to a placement's cost, whoever else takes part; arrays `[workers]`."""

    rows: Ints
    num_leading: Ints  #: blocks at the prompt's head that it holds
    num_bytes: Ints  #: of the prompt's blocks that it lacks
    num_computed: Ints  #: tokens, if it computes what it neither holds nor loads
    num_sequences: Floats
    wait_s: Floats
    load_s: Floats
    queue_s: Floats
    compute_s: Floats
    crowding_s: Floats  #: the harm of one sequence more
    displaced_s: Floats
    rank: Words  #: in rendezvous hashing, turned round: the least is first

    def of(self, some: Ints | slice) -> _Parts:
        """Return the parts of some of these workers."""
        return _Parts._make(column[some] for column in self)


class Pricing:
    """Prices one request at workers of `fleet`, known by their rows there. `matches`: who holds its blocks."""

    def __init__(self, request: RouteRequest, matches: Matches, fleet: FleetTable, assumed: Assumptions) -> None:
        self._num_prompt_tokens, self._num_new = request.num_prompt_tokens, request.num_sequences
        self._other_prompts = request.other_prompts
        self._affinity = affinity(request)
        self._matches = matches
        self._fleet = fleet
        self._assumed = assumed
        self._lengths = np.diff(matches.ends, prepend=0)
        self._is_held = fleet.by_row(matches.is_held, matches.holders)  # [runs, rows]
        self._sources: dict[int, list[Holder]] = {}
        self._states = fleet.states
        self._priced: tuple[_Parts, int] | None = None  # what `best` chose from, and how many of them decode

    def best(self, decodes: Ints, prefills: Ints) -> Candidate:
        """Return the cheapest placement.

        Equals are told apart by least load, then by rendezvous hashing of the prompt: first who decodes, then who
        prefills; a decode worker alone comes before its pairs. `decodes` must not be empty.
        """
        parts = self._parts(np.concatenate([decodes, prefills]))
        self._priced = parts, len(decodes)
        decode = parts.of(slice(len(decodes)))
        alone_ms = _rounded(_alone_s(decode))
        first = _first(alone_ms, decode.num_sequences, decode.rank)
        best = _Choice(alone_ms[first], decode.num_sequences[first], decode.rank[first], first)
        if len(prefills):
            prefill = parts.of(slice(len(decodes), None))
            best = self._best_pair(decode, prefill, best)
            if best.prefill is not None:
                return self._pair(decode, best.decode, prefill, best.prefill)
        return self._alone(decode, best.decode)

    def all(self, decodes: Ints, prefills: Ints) -> Iterator[Candidate]:
        """Yield every placement there is, in no order: to explain a choice."""
        decode, prefill = self._parts(decodes), self._parts(prefills)
        for d in range(len(decodes)):
            yield self._alone(decode, d)
            for p in np.flatnonzero(np.isfinite(self._handoff_s(decode, np.array([d]), prefill)[0])):
                yield self._pair(decode, d, prefill, int(p))

    def few(self, num: int) -> list[Candidate]:
        """Return the cheapest placements that `best` chose from, `num` at most, cheapest first: to explain its choice.

        Each worker's part is as it was then. Pairs are made of workers whose parts are small and who are still there,
        at what their links cost now.
        """
        assert self._priced is not None, "best comes first"
        parts, num_decodes = self._priced
        decode, prefill = parts.of(slice(num_decodes)), parts.of(slice(num_decodes, None))
        found = [self._alone(decode, int(d)) for d in np.argsort(_alone_s(decode), kind="stable")[:num]]
        d, p = self._still_there(decode), self._still_there(prefill)
        decode_s, prefill_s = decode.wait_s + decode.crowding_s + decode.displaced_s, _prefill_s(prefill)
        d = d[np.argsort(decode_s[d], kind="stable")[: 2 * num]]
        p = p[np.argsort(prefill_s[p], kind="stable")[: 2 * num]]
        if len(d) and len(p):
            costs = decode_s[d][:, None] + prefill_s[p] + self._handoff_s(decode, d, prefill.of(p))
            for place in np.argsort(costs, axis=None, kind="stable")[:num].tolist():
                row, column = divmod(place, len(p))
                if np.isfinite(costs[row, column]):
                    found.append(self._pair(decode, int(d[row]), prefill, int(p[column])))
        return sorted(found, key=lambda candidate: candidate.cost_s)[:num]

    @property
    def num_priced(self) -> int:
        """How many workers `best` chose from."""
        return 0 if self._priced is None else len(self._priced[0].rows)

    @property
    def num_possible(self) -> int:
        """How many placements `best` chose from: each decode worker alone, and with each prefill worker."""
        num_decodes = 0 if self._priced is None else self._priced[1]
        return num_decodes * (1 + self.num_priced - num_decodes)

    def matched_tokens(self, placed: Candidate) -> dict[str, int]:
        """Return the prompt's tokens that are held, by the place nearest to a placement's decode worker that has them.

        `device` is its own pool; `peer` another worker's, that of the prefill worker of the placement included.
        """
        tokens: Counter[str] = Counter()
        size, begin = placed.decode.info.block_size, 0
        own = placed.decode.info.worker_id
        for number, end in enumerate(self._matches.ends.tolist()):
            holders = [
                self._matches.holders[column] for column in np.flatnonzero(self._matches.is_held[number]).tolist()
            ]
            places = {("peer" if one.tier == "device" else one.tier) for one in holders if one and one.worker_id != own}
            places |= {one.tier for one in holders if one and one.worker_id == own}
            nearest = next((place for place in _PLACES if place in places), None)
            if nearest is not None:
                tokens[nearest] += (end - begin) * size
            begin = end
        return dict(tokens)

    def held(self, placed: Candidate) -> tuple[HeldRun, ...]:
        """Tell the workers of a placement where blocks of the prompt lie: a few copies of each, their own first."""
        chosen = [placed.decode.info.worker_id] + ([placed.prefill.info.worker_id] if placed.prefill else [])
        rows = self._fleet.rows_of(chosen)
        runs: list[HeldRun] = []
        begin = 0
        for number, end in enumerate(self._matches.ends.tolist()):
            own = [Holder(worker) for worker, row in zip(chosen, rows, strict=True) if self._is_held[number, row]]
            holders = dict.fromkeys([*own, *self._sources_of(number)])
            copies = [Copy(self._fleet.workers[holder.worker_id].info.address, holder.tier) for holder in holders]
            runs.append(HeldRun(begin, end, tuple(copies[:_MAX_COPIES])))
            begin = end
        return tuple(runs)

    # --------------------------------------------------------------------------------------------- what workers add

    def _parts(self, rows: Ints) -> _Parts:
        constants, loads = self._fleet.constants(rows), self._fleet.loads(rows)
        num_prompt, num_new = self._num_prompt_tokens, self._num_new
        is_held = self._is_held[:, rows]
        num_held = self._lengths @ is_held
        num_leading = self._num_leading(is_held)
        num_covered = int(self._matches.ends[-1]) if len(self._matches.ends) else 0
        num_lacking = -(-num_prompt // constants.block_size) - num_held
        for num_tokens_of in self._other_prompts:
            num_lacking = num_lacking - (-num_tokens_of // constants.block_size)

        # What is computed: without loading, with it, and again of what is evicted, as of a prompt as long as this one.
        num_displaced = np.minimum(num_lacking, num_lacking - loads.idle_blocks)
        num_tokens = np.empty((3, len(rows)))
        num_tokens[0] = np.maximum(num_prompt - num_leading * constants.block_size, 1)
        num_tokens[1] = np.maximum(num_prompt - num_covered * constants.block_size, 1)
        num_tokens[2] = np.minimum(np.maximum(num_displaced, 0) * constants.block_size, num_prompt)
        held_s, covered_s, again_s = self._compute_s(num_tokens, max(num_prompt, 1), constants, loads)
        others = self._other_prompts
        if others:  # they are computed beside it, whatever is held of them
            ends = np.array(others, np.int64)[:, None]
            others_s = self._compute_s(np.repeat(ends, len(rows), axis=1), ends, constants, loads).sum(axis=0)
            held_s, covered_s = held_s + others_s, covered_s + others_s

        load_s = np.zeros(len(rows))
        lacking = np.flatnonzero(num_leading < num_covered)
        if len(lacking):
            num_bytes = (num_covered - num_held) * constants.block_bytes
            load_s[lacking] = self._load_s(rows[lacking], is_held[:, lacking], num_bytes[lacking])
        loads_it = load_s < held_s - covered_s
        load_s[~loads_it] = 0.0
        num_computed = np.where(loads_it, num_tokens[1], num_tokens[0]) + sum(others)

        is_short = num_computed <= SHORT_TOKENS
        takes_share = (
            is_short
            & (loads.num_short + num_new <= np.floor(SHORT_SHARE * constants.max_num_seqs))
            & (num_lacking + num_new <= np.floor(SHORT_SHARE * constants.num_blocks))
        )
        # Each choice writes a block of its own. All slots and blocks turn over once in `sequence_s`.
        blocks_share = (num_lacking + num_new - loads.free_blocks) / constants.num_blocks
        slots_share = (loads.num_sequences + num_new - constants.max_num_seqs) / constants.max_num_seqs
        wait_s = np.maximum(np.maximum(blocks_share, slots_share), 0.0) * self._assumed.sequence_s
        wait_s[takes_share] = 0.0
        # Each sequence there makes each step of this one longer, and the other way round.
        step_s = np.where(loads.decode_step_s > 0, loads.decode_step_s, self._assumed.decode_step_s)
        return _Parts(
            rows,
            num_leading,
            num_lacking * constants.block_bytes,
            num_computed.astype(np.int64),
            loads.num_sequences,
            wait_s,
            load_s,
            np.where(is_short, loads.short_queue_s, loads.queue_s),
            np.where(loads_it, covered_s, held_s),
            HARM_WEIGHT * step_s * loads.num_sequences,
            loads.reused_share * again_s,
            ~ranks(self._affinity, self._fleet.hashes(rows)),
        )

    def _num_leading(self, is_held: npt.NDArray[np.bool_]) -> Ints:
        """Return how many blocks at the prompt's head each worker holds. `is_held`: `[runs, workers]`."""
        if not len(is_held):
            return np.zeros(is_held.shape[1], np.int64)
        begins = self._matches.ends - self._lengths
        leading: Ints = np.where(is_held.all(axis=0), self._matches.ends[-1], begins[is_held.argmin(axis=0)])
        return leading

    def _compute_s(self, num_tokens: Floats | Ints, end: int | Ints, constants: Constants, loads: Loads) -> Floats:
        """Return the seconds for the last tokens before `end` by workers' own price, where measured, else by the best.

        Never longer than the fleet's best with a share of its rate: who once measured badly, under another load or with
        a few tokens, would else get no prompt any more and so never measure better. `num_tokens`: `[any, workers]`.
        """
        num_steps = np.ceil(num_tokens / STEP_TOKENS)
        num_pairs = num_tokens * (2 * end - num_tokens + 1) / 2
        assumed = self._assumed.compute
        seconds = num_steps * assumed.step_s + num_tokens * assumed.token_s + num_pairs * assumed.pair_s
        limit_s = np.full_like(seconds, np.inf)
        for fingerprint, best in self._fleet.best_compute.items():
            best_s = num_steps * best.step_s + num_tokens * best.token_s + num_pairs * best.pair_s
            is_its = constants.fingerprint == hash(fingerprint)
            np.copyto(seconds, best_s, where=is_its)
            np.copyto(limit_s, best_s / self._assumed.doubt, where=is_its)
        own_s = num_steps * loads.step_s + num_tokens * loads.token_s + num_pairs * loads.pair_s
        np.copyto(seconds, np.minimum(own_s, limit_s), where=loads.is_measured > 0)
        return seconds

    def _load_s(self, rows: Ints, is_held: npt.NDArray[np.bool_], num_bytes: Ints) -> Floats:
        """Return the seconds that bringing `num_bytes` takes from the cheapest copy of the longest run each lacks."""
        longest = np.where(is_held, -1, self._lengths[:, None]).argmax(axis=0)
        load_s = np.full(len(rows), np.inf)
        for number in np.unique(longest).tolist():
            its = np.flatnonzero(longest == number)
            targets = self._fleet.constants(rows[its]).place
            for holder in self._sources_of(number):
                source = self._fleet.place_of(holder.worker_id)
                assert source is not None
                fixed_s, byte_s, handoff_s = self._fleet.links.loading(source, holder.tier, targets, rows[its])
                load_s[its] = np.minimum(load_s[its], handoff_s + (fixed_s + num_bytes[its] * byte_s))
        return load_s

    def _sources_of(self, number: int) -> list[Holder]:
        """Return some holders of a run that are there."""
        if number not in self._sources:
            holders = (
                self._matches.holders[column] for column in np.flatnonzero(self._matches.is_held[number])[:_MAX_COPIES]
            )
            self._sources[number] = [holder for holder in holders if holder and holder.worker_id in self._fleet.workers]
        return self._sources[number]

    # -------------------------------------------------------------------------------------------------------- choosing

    def _best_pair(self, decode: _Parts, prefill: _Parts, best: _Choice) -> _Choice:
        """Return the best pair, or `best`, where none is better: pairs that cannot be are not priced.

        None is cheaper than both its workers' own parts and the least that a link takes. Decode workers come in the
        order of that bound, and of what tells equals apart, until the next one's is beyond the best that was found.
        """
        decode_s = decode.wait_s + decode.crowding_s + decode.displaced_s
        prefill_s = _prefill_s(prefill)
        least = _handoff_s(self._fleet.links.least(decode.rows), decode.num_bytes, prefill.compute_s.max())
        bounds = _rounded(decode_s + (prefill_s.min() + least) - _ROUNDING_S)
        order = np.flatnonzero(bounds <= best.cost_ms)
        order = order[np.lexsort((decode.rank[order], decode.num_sequences[order], bounds[order]))]
        begin, num_rows = 0, _FIRST_ROWS
        while begin < len(order):
            if (bounds[order[begin]], decode.num_sequences[order[begin]], decode.rank[order[begin]]) > best[:3]:
                break
            d = order[begin : begin + num_rows]
            d = d[bounds[d] <= best.cost_ms]
            limit_s = (best.cost_ms + 1) / _COST_STEPS_PER_S - (decode_s[d] + least[d]).min()
            p = np.flatnonzero(prefill_s <= limit_s)
            if len(p):
                some = prefill.of(p)
                costs = _rounded((prefill_s[p] + self._handoff_s(decode, d, some)) + decode_s[d][:, None])
                best = min(best, _cheapest(costs, decode, d, prefill, p), key=_Choice.order)
            begin, num_rows = begin + num_rows, _MORE_ROWS * num_rows
        return best

    def _handoff_s(self, decode: _Parts, of: Ints, prefill: _Parts) -> Floats:
        """Return what handing over adds to the computation at `prefill`, `[of, prefill]`; infinite where nobody can."""
        rows = decode.rows[of]
        sources, targets = self._fleet.constants(prefill.rows).place, self._fleet.constants(rows).place
        prices = self._fleet.links.between(sources, prefill.rows, targets, rows)
        return _handoff_s(prices, decode.num_bytes[of][:, None], prefill.compute_s)

    def _state(self, parts: _Parts, number: int) -> WorkerState:
        state = self._states[int(parts.rows[number])]
        assert state is not None, "who is priced was there"
        return state

    def _still_there(self, parts: _Parts) -> Ints:
        """Return the numbers of those of these workers that have their rows still."""
        now = self._fleet.states
        rows = parts.rows.tolist()
        there: Ints = np.flatnonzero([now[row] is self._states[row] for row in rows]).astype(np.int64)
        return there

    def _alone(self, decode: _Parts, d: int) -> Candidate:
        state = self._state(decode, d)
        return Candidate(
            decode=state,
            prefill=None,
            decode_match_tokens=int(decode.num_leading[d]) * state.info.block_size,
            prefill_match_tokens=0,
            num_computed_tokens=int(decode.num_computed[d]),
            wait_s=float(decode.wait_s[d]),
            load_s=float(decode.load_s[d]),
            queue_s=float(decode.queue_s[d]),
            compute_s=float(decode.compute_s[d]),
            pull_s=0.0,
            harm_s=float(_harm_alone_s(decode)[d]),
            displaced_s=float(decode.displaced_s[d]),
            prefill_s=0.0,
        )

    def _pair(self, decode: _Parts, d: int, prefill: _Parts, p: int) -> Candidate:
        one = prefill.of(slice(p, p + 1))
        added_s = float(self._handoff_s(decode, np.array([d]), one)[0, 0])
        decode_state, prefill_state = self._state(decode, d), self._state(prefill, p)
        seconds = float(prefill.wait_s[p] + prefill.load_s[p] + prefill.queue_s[p] + prefill.compute_s[p])
        return Candidate(
            decode=decode_state,
            prefill=prefill_state,
            decode_match_tokens=int(decode.num_leading[d]) * decode_state.info.block_size,
            prefill_match_tokens=int(prefill.num_leading[p]) * prefill_state.info.block_size,
            num_computed_tokens=int(prefill.num_computed[p]),
            wait_s=float(prefill.wait_s[p] + decode.wait_s[d]),
            load_s=float(prefill.load_s[p]),
            queue_s=float(prefill.queue_s[p]),
            compute_s=float(prefill.compute_s[p]),
            pull_s=added_s,
            harm_s=float(decode.crowding_s[d]),
            displaced_s=float(decode.displaced_s[d] + prefill.displaced_s[p]),
            prefill_s=seconds + added_s,
        )


class _Choice(NamedTuple):
    """A placement, by number of its workers, and what placements are compared by, in order."""

    cost_ms: float
    num_sequences: float
    rank: int
    decode: int
    prefill: int | None = None
    prefill_num_sequences: float = 0.0
    prefill_rank: int = 0

    def order(self) -> tuple[float, float, int, bool, float, int]:
        """Return the key whose least is the best placement."""
        is_pair = self.prefill is not None
        return (*self[:3], is_pair, self.prefill_num_sequences, self.prefill_rank)


def _cheapest(costs_ms: Floats, decode: _Parts, d: Ints, prefill: _Parts, p: Ints) -> _Choice:
    """Return the best of the pairs of decode workers `d` and prefill workers `p`, which cost `[d, p]`."""
    cost_ms = costs_ms.min()
    rows, columns = np.nonzero(costs_ms == cost_ms)
    d, p = d[rows], p[columns]
    at = _first(decode.num_sequences[d], decode.rank[d], prefill.num_sequences[p], prefill.rank[p])
    return _Choice(
        cost_ms,
        decode.num_sequences[d[at]],
        decode.rank[d[at]],
        int(d[at]),
        int(p[at]),
        prefill.num_sequences[p[at]],
        prefill.rank[p[at]],
    )


def _first(*keys: npt.NDArray[np.generic]) -> int:
    """Return where the least of `keys` is, the first of which counts most."""
    left = np.arange(len(keys[0]))
    for key in keys:
        if len(left) == 1:
            break
        values = key[left]
        left = left[values == values.min()]
    return int(left[0])


def _rounded(cost_s: Floats) -> Floats:
    return np.rint(cost_s * _COST_STEPS_PER_S)


def _harm_alone_s(parts: _Parts) -> Floats:
    """Return the harm that each does to who runs there if it computes the prompt itself (kvcache.price.harm_s)."""
    return parts.crowding_s + HARM_WEIGHT * parts.compute_s * (parts.num_sequences + 1)


def _alone_s(parts: _Parts) -> Floats:
    ttft_s = parts.wait_s + parts.load_s + parts.queue_s + parts.compute_s
    return ttft_s + _harm_alone_s(parts) + parts.displaced_s


def _prefill_s(parts: _Parts) -> Floats:
    return parts.wait_s + parts.load_s + parts.queue_s + parts.compute_s + parts.displaced_s


def _handoff_s(prices: Floats, num_bytes: Ints, compute_s: Floats | float) -> Floats:
    """Return the seconds that handoffs add to `compute_s` at their sources (kvcache.price.handoff_s)."""
    fixed_s, byte_s, handoff_s = prices
    added_s: Floats = handoff_s + np.maximum(fixed_s + num_bytes * byte_s - compute_s, 0.0)
    return added_s


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
