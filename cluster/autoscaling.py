"""How many workers the load wants. Pure: what is seen and the time in, numbers and reasons out.

    computing   seconds of it asked for in a second, hits of any tier taken off, and the queue that is to be caught up
                with; prefill workers, and decode workers where they compute prompts
    decoding    slots, blocks that sequences pin, and how a step grows with its rows; decode workers

Each is a number of workers, and the largest counts. More of them are taken once they were wanted for a while; fewer,
once that was so for much longer, without the work of those that leave coming near the mark at which more are taken. A
target that no number of workers meets, as one prompt alone takes longer, adds nobody.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

#: Of workers' time, what computing may take before more are taken: a queue in random arrivals is 1.5 prompts long then.
_BUSY: Final = 0.75
#: The same that may be left after some have gone: far enough below that what comes in bursts finds room.
_IDLE: Final = 0.5
#: Of decode workers' time, what computing prompts may take where there are prefill workers.
_ON_DECODE: Final = 0.25
#: Of slots and of blocks.
_FULL, _ROOMY = 0.85, 0.6
#: Of the gap that is aimed at, so much of it may be left after some have gone.
_ITL_ROOM: Final = 0.65
#: Of the TTFT that is aimed at, what a queue may take; the rest is the prompt's own.
_QUEUE_SHARE: Final = 0.5
#: In which a longer queue is to be caught up with.
_CATCH_UP_S: Final = 10.0
#: Within a step, nothing but the row itself: less of a target cannot be met by fewer rows.
_LEAST_ROOM: Final = 0.1
#: What hits save, in times of what is computed, counts no further.
_MOST_SAVED: Final = 9.0
#: Patience before fewer are taken doubles up to so many times, each time that it was too short.
_MOST_PATIENCE: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What is aimed at, and how soon numbers follow."""

    ttft_s: float  #: queue included
    itl_s: float
    grow_after_s: float  #: for which more workers must have been wanted
    shrink_after_s: float  #: for which fewer must have been
    keeps_kv: bool  #: a node cache has the KV of workers that go


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSeen:
    """What a worker told last."""

    queued_s: float
    busy_share: float  #: of its time, lately
    num_waiting: float
    num_running: float
    max_num_seqs: float
    used_share: float  #: of its blocks, those that sequences pin
    step_s: float  #: with decode rows; 0: none yet
    step_fixed_s: float  #: of that, what a single row takes; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSeen:
    """All workers of one role."""

    num_wanted: int  #: as was decided last
    num_there: int  #: of those, the ones that run
    least: int
    most: int
    workers: tuple[WorkerSeen, ...]  #: those that run and told something


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked of the router lately, refused requests included."""

    prefill_s_per_s: float  #: of computing, on prefill workers
    decode_s_per_s: float  #: of prompts, on decode workers
    ttft_s: float  #: mean of what was predicted; 0: nobody asked
    hit_share: float  #: of prompt tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSeen:
    """All that numbers follow from; None: there is no such role, or nobody told it."""

    prefill: RoleSeen | None
    decode: RoleSeen | None
    asked: Asked | None


class Wanted(NamedTuple):
    """How many workers a role is to have, and what for, as a few words for people."""

    number: int
    why: str


class _Need(NamedTuple):
    """A number of workers that something wants, as a fraction."""

    what: str
    grow: float  #: so many at least
    shrink: float  #: no fewer than so many, where some are to go


class Autoscaler:
    """Decides for one fleet, about once a second. One thread."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self._roles = {"prefill": _Course(targets), "decode": _Course(targets)}

    def decide(self, seen: FleetSeen, now_s: float) -> dict[str, Wanted]:
        """Return the number of workers by role; `now_s` never goes back."""
        wanted: dict[str, Wanted] = {}
        num_all = sum(role.num_there for role in (seen.prefill, seen.decode) if role is not None)
        for name, role in (("prefill", seen.prefill), ("decode", seen.decode)):
            if role is None:
                continue
            needs = self._needs(name, seen, num_all) if role.workers else []
            wanted[name] = self._roles[name].decide(role, needs, now_s)
        return wanted

    def _needs(self, name: str, seen: FleetSeen, num_all: int) -> list[_Need]:
        prefill, decode, asked = seen.prefill, seen.decode, seen.asked
        on_decode = asked.decode_s_per_s if asked is not None else 0.0
        if name == "prefill" and prefill is not None:
            busy = sum(worker.busy_share for worker in prefill.workers)
            load = max(busy, asked.prefill_s_per_s if asked is not None else 0.0)
            if decode is not None:  # what they compute beside their sequences is for prefill workers to take over
                load += max(0.0, on_decode - _ON_DECODE * decode.num_there)
            return [self._computing(prefill, load, asked, num_all)]
        assert decode is not None
        if prefill is not None and prefill.num_wanted < prefill.most:
            return self._decoding(decode)
        return [self._computing(decode, on_decode, asked, num_all), *self._decoding(decode)]

    def _computing(self, role: RoleSeen, load: float, asked: Asked | None, num_all: int) -> _Need:
        """Return how many workers `load` seconds of computing a second want, and the queue that is there."""
        target_s = self.targets.ttft_s
        queued_s = sum(_behind_others_s(worker) for worker in role.workers)
        grow = load / _BUSY
        what = f"{load:.2f} s/s of prompts"
        late_s = queued_s - role.num_there * _QUEUE_SHARE * target_s
        if role.num_there >= role.num_wanted:  # else those that are starting will help
            if late_s > 0:
                grow += late_s / _CATCH_UP_S
                what += f", {queued_s:.1f} s queued"
            is_late = asked is not None and asked.ttft_s > target_s
            if is_late and late_s > -role.num_there * _QUEUE_SHARE * target_s / 2:
                grow = max(grow, role.num_there + 1)
                what += f", first tokens predicted after {asked.ttft_s if asked else 0:.1f} s"
        saved = 0.0
        if asked is not None and not self.targets.keeps_kv and num_all:
            # What goes takes its share of the KV that hits are found in along.
            saved = min(_MOST_SAVED, asked.hit_share / max(1e-9, 1.0 - asked.hit_share)) / num_all
        shrink = (load * (1.0 + saved) + max(0.0, late_s) / _CATCH_UP_S) / _IDLE
        return _Need(what, grow, shrink)

    def _decoding(self, role: RoleSeen) -> list[_Need]:
        """Return how many workers the sequences want that are there: for slots, for blocks, for the gap."""
        slots = sum((worker.num_running + worker.num_waiting) / worker.max_num_seqs for worker in role.workers)
        blocks = sum(worker.used_share for worker in role.workers)
        needs = [
            _Need(f"slots of {slots:.2f} workers", slots / _FULL, slots / _ROOMY),
            _Need(f"blocks of {blocks:.2f} workers", blocks / _FULL, blocks / _ROOMY),
        ]
        itl_s = self.targets.itl_s
        running = [worker for worker in role.workers if worker.num_running and worker.step_fixed_s > 0]
        rows_s = sum(max(0.0, worker.step_s - worker.step_fixed_s) for worker in running)
        room_s = itl_s - max((worker.step_fixed_s for worker in running), default=0.0)
        if running and room_s > _LEAST_ROOM * itl_s:
            longest_s = max(worker.step_s for worker in running)
            what = f"steps of {1e3 * longest_s:.0f} ms"
            needs.append(_Need(what, rows_s / room_s, rows_s / (_ITL_ROOM * room_s)))
        return needs


@dataclass(slots=True)
class _Course:
    """One role's number over time: it grows to what was wanted all the while, and shrinks to the most wanted."""

    targets: Targets
    _seen: deque[tuple[float, int, int]] = field(default_factory=deque)  #: when, and what growing and shrinking wanted
    _since_s: float | None = None  #: all that came since then is in `_seen`; None: nothing did
    _shrunk_s: float | None = None  #: the last time
    _patience: int = 1

    def decide(self, role: RoleSeen, needs: list[_Need], now_s: float) -> Wanted:
        """Return the number that the role is to have from now on."""
        number = min(max(role.num_wanted, role.least), role.most)
        if number != role.num_wanted:
            return self._changed(number, "within its limits")
        if not needs:  # nobody says anything: so it stays
            return self._changed(number, "")
        largest = max(needs, key=lambda need: need.grow)
        grow = _up(largest.grow)
        shrink = _up(max(need.shrink for need in needs))
        if len(role.workers) < role.num_wanted:  # some start, or tell nothing: they are not taken for idle
            shrink = max(shrink, number)
        self._note(grow, shrink, now_s)
        grown = self._grown(number, role, now_s)
        if grown > number:
            if self._shrunk_s is not None:
                too_soon = now_s - self._shrunk_s < self._patience * self.targets.shrink_after_s
                self._patience = min(2 * self._patience, _MOST_PATIENCE) if too_soon else 1
                self._shrunk_s = None
            return self._changed(grown, largest.what)
        fewer = self._shrunk(number, role, now_s)
        if fewer < number:
            self._shrunk_s = now_s
            return self._changed(fewer, f"at most {largest.what} for {self.patience_s:g} s")
        return Wanted(number, "")

    @property
    def patience_s(self) -> float:
        """For how long fewer must have been wanted."""
        return self._patience * self.targets.shrink_after_s

    def _note(self, grow: int, shrink: int, now_s: float) -> None:
        if self._since_s is None:
            self._since_s = now_s
        self._seen.append((now_s, grow, shrink))
        while self._seen[0][0] < now_s - max(self.targets.grow_after_s, self.patience_s):
            self._seen.popleft()

    def _grown(self, number: int, role: RoleSeen, now_s: float) -> int:
        """Return what was wanted all the while, at most twice what there is: what more does is seen first."""
        if self._since_s is None or now_s - self._since_s < self.targets.grow_after_s:
            return number
        grow = min(grow for seen_s, grow, _ in self._seen if seen_s >= now_s - self.targets.grow_after_s)
        return min(grow, 2 * number, role.most)

    def _shrunk(self, number: int, role: RoleSeen, now_s: float) -> int:
        """Return the most that was wanted in all that time, at least three quarters of what there is."""
        if self._since_s is None or now_s - self._since_s < self.patience_s:
            return number
        most = max(shrink for seen_s, _, shrink in self._seen if seen_s >= now_s - self.patience_s)
        return max(most, role.least, number * 3 // 4)

    def _changed(self, number: int, why: str) -> Wanted:
        self._seen.clear()
        self._since_s = None
        return Wanted(number, why)


def _behind_others_s(worker: WorkerSeen) -> float:
    """Return what of a worker's queue other prompts wait for: one that is alone waits for itself, whoever takes it."""
    num = worker.num_waiting + worker.num_running
    return worker.queued_s * (num - 1) / num if num > 1 else 0.0


def _up(number: float) -> int:
    """Round up, but for what is above a whole number by a rounding error."""
    return math.ceil(number - 1e-9)
