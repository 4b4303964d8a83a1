"""Load or compute: for what a worker lacks of a prompt, and others hold. Pure.

    blocks   0 ... held here ... | lacking, held by others | lacking, held by others | nobody's
    load                           from the cheapest copy of each run
    compute                        whatever loading does not bring, head first
    both                           loads come from the tail, computing goes on from the head, until they meet

Computing the head while the tail is loaded takes half of the time of either where both are equally quick, and a little
more than that: it is computed in smaller steps, and at last one of the two is waited for. It takes less than half where
prompts are long, for the head is cheaper to compute. Where one is far quicker the other does not help.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from kvcache.price import Computation, compute_s, harm_s, move_s
from messages.handoff import FoundRun
from messages.price import ComputePrice, MovePrice
from messages.request import Copy, HeldRun

#: Both together where they take less than this share of the quicker one alone: no prediction is better.
_CLEARLY = 0.9
#: Steps of a head's computing beyond those of computing all of it in one go: each takes most of what is left.
_MORE_STEPS = 2
#: Where both meet half a batch is waited for, in the mean: owners read slow tiers for about 0.02 s at a time.
_HALF_BATCH_S = 0.01


class Load(NamedTuple):
    """Blocks [begin, end) of a prompt, to be had from `copy`."""

    begin: int
    end: int
    copy: Copy


class LoadPlan(NamedTuple):
    """What is to be loaded, head first, and whether the head is computed meanwhile. Without loads all is computed."""

    loads: tuple[Load, ...] = ()
    load_s: float = 0.0  #: of loading all that others hold
    compute_s: float = 0.0  #: of computing it instead, behind what goes before
    mixed_s: float = math.inf  #: of both at once
    is_mixed: bool = False
    meet_tokens: int = 0  #: where computing and loading are predicted to meet, if both go on at once

    @property
    def seconds(self) -> float:
        """Predicted seconds until what others hold lies here."""
        if not self.loads:
            return self.compute_s
        return self.mixed_s if self.is_mixed else self.load_s


def with_found(
    held: Sequence[HeldRun], address: str, begin: int, end: int, found: Sequence[FoundRun]
) -> tuple[HeldRun, ...]:
    """Replace, within blocks [begin, end) of `held`, what it says of the owner at `address` by what that found."""
    cuts = {begin, end, *(run.begin for run in held), *(run.begin for run in found)}
    cuts |= {*(run.end for run in held), *(run.end for run in found)}
    runs: list[HeldRun] = []
    for left, right in pairwise(sorted(cuts)):
        copies = next((run.copies for run in held if run.begin <= left < run.end), ())
        if begin <= left < end:
            now = (Copy(address, run.tier) for run in found if run.begin <= left < run.end)
            copies = (*(copy for copy in copies if copy.address != address), *now)
        if copies:
            runs.append(HeldRun(left, right, copies))
    return tuple(runs)


def lacking_runs(held: Sequence[HeldRun], begin: int, end: int, is_here: Callable[[int], bool]) -> list[HeldRun]:
    """Cut out of `held` the runs within blocks [begin, end) that are not here, up to the first that nobody holds.

    `is_here(index)` tells whether this worker has that block itself.
    """
    runs: list[HeldRun] = []
    position = begin
    for run in held:
        if run.end <= position:
            continue
        if run.begin > position or position >= end or not run.copies:
            break
        stop = min(run.end, end)
        first: int | None = None
        for index in range(position, stop):
            if is_here(index):
                if first is not None:
                    runs.append(HeldRun(first, index, run.copies))
                first = None
            elif first is None:
                first = index
        if first is not None:
            runs.append(HeldRun(first, stop, run.copies))
        position = stop
    return runs


def plan_loads(
    lacking: Iterable[HeldRun],
    price_of: Callable[[Copy], MovePrice | None],
    *,
    block_size: int,
    block_bytes: int,
    chunk_tokens: int,
    compute: ComputePrice,
    queue_s: float,
    num_beside: int,
) -> LoadPlan:
    """Decide for the runs that a worker lacks.

    Args:
        lacking: as `lacking_runs` gives them.
        price_of: what bringing blocks from a copy costs this worker; None where they cannot come from there.
        block_size: in tokens.
        block_bytes: of one block.
        chunk_tokens: of the smallest step in which a head is computed.
        compute: what computing costs this worker.
        queue_s: of computing that goes before.
        num_beside: sequences that run here, and wait for each step of it.
    """
    loads: list[Load] = []
    load_s = computing_s = 0.0
    asked: set[Copy] = set()
    for run in lacking:
        num_bytes = (run.end - run.begin) * block_bytes
        prices = [(copy, price) for copy in run.copies if (price := price_of(copy)) is not None]
        if not prices:
            break
        copy, price = min(
            prices, key=lambda known: known[1].handoff_s * (known[0] not in asked) + move_s(known[1], num_bytes)
        )
        load_s += move_s(price, num_bytes) + (0.0 if copy in asked else price.handoff_s)
        computing_s += compute_s(compute, Computation.of(run.begin * block_size, run.end * block_size))
        asked.add(copy)
        loads.append(Load(run.begin, run.end, copy))
    if not loads:
        return LoadPlan()
    meeting = _meeting(loads, load_s, computing_s, compute, queue_s, block_size)
    last_step_s = compute_s(compute, Computation.of(max(0, meeting.num_tokens - chunk_tokens), meeting.num_tokens))
    mixed_s = meeting.seconds + last_step_s + _MORE_STEPS * compute.step_s + _HALF_BATCH_S
    # The harm to those who run here, without the one who may come, whom a placement counts: this sequence is there.
    compute_cost_s = queue_s + computing_s + harm_s(computing_s, num_beside - 1)
    mixed_cost_s = mixed_s + harm_s(meeting.seconds - queue_s, num_beside - 1)
    is_mixed = mixed_cost_s < _CLEARLY * min(load_s, compute_cost_s)
    chosen = tuple(loads) if is_mixed or load_s <= compute_cost_s else ()
    return LoadPlan(chosen, load_s, queue_s + computing_s, mixed_s, is_mixed, meeting.num_tokens)


class _Meeting(NamedTuple):
    """Where the head's computing and the tail's loading meet, if both begin now."""

    num_tokens: int  #: of the prompt, computed until then
    seconds: float


def _meeting(
    loads: Sequence[Load], load_s: float, computing_s: float, compute: ComputePrice, queue_s: float, block_size: int
) -> _Meeting:
    """Find it block by block: the head's tokens are cheaper to compute than the tail's, which attend to more."""
    begin, end = loads[0].begin, loads[-1].end
    whole_s = compute_s(compute, Computation.of(begin * block_size, end * block_size))
    lacking = computing_s / whole_s if whole_s > 0 else 1.0  # what lies here already is neither computed nor loaded

    def computed_s(index: int) -> float:
        return queue_s + lacking * compute_s(compute, Computation.of(begin * block_size, index * block_size))

    def is_beyond(index: int) -> bool:
        return computed_s(index) >= load_s * (end - index) / (end - begin)

    index = bisect_left(range(begin, end), True, key=is_beyond) + begin
    return _Meeting(index * block_size, computed_s(index))
