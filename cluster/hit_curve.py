"""How much of a trace's prompts a shared cache has, by how much it holds. Pure.

A cache that drops what was used longest ago, of one prompt its tail before its head. Of sessions whose blocks are
their own, a session's prompt is one piece that is cut from behind; of prompts that share blocks, every block counts.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cluster.traces import Runs, Trace, TraceRequest


class Turn(NamedTuple):
    """A request of a trace, in the order in which they come."""

    session: int
    place: int
    request: TraceRequest


class Hits(NamedTuple):
    """What a cache of `capacity_tokens` had of a trace; None: one that never drops anything."""

    capacity_tokens: int | None
    by_request: dict[tuple[int, int], int]  #: tokens, by session and place in it
    share: float  #: of all prompt tokens


def in_order(trace: Trace, num_at_once: int) -> Iterator[Turn]:
    """Yield the requests as they come: at their times, or `num_at_once` sessions, each followed by another."""
    begins = [session.begin_s for session in trace.sessions]
    waiting: list[tuple[float, int, int]] = []
    later = iter(range(len(begins)))
    if trace.is_timed:
        waiting = [(begin_s or 0.0, number, 0) for number, begin_s in enumerate(begins)]
    else:
        waiting = [(0.0, number, 0) for _, number in zip(range(num_at_once), later, strict=False)]
    started = {number: at_s for at_s, number, _ in waiting}
    heapq.heapify(waiting)
    while waiting:
        at_s, number, place = heapq.heappop(waiting)
        requests = trace.sessions[number].requests
        yield Turn(number, place, requests[place])
        if place + 1 < len(requests):
            heapq.heappush(waiting, (started[number] + requests[place + 1].at_s, number, place + 1))
        elif not trace.is_timed and (successor := next(later, None)) is not None:
            started[successor] = at_s
            heapq.heappush(waiting, (at_s, successor, 0))


def hits(trace: Trace, turns: Sequence[Turn], capacity_tokens: int | None) -> Hits:
    """Return what a cache of so many tokens has of each prompt; one token of each is computed in any case."""
    find = _of_sessions if trace.kind == "agents" else _of_blocks
    found = find(turns, trace.block_tokens, capacity_tokens)
    by_request = {}
    for turn, num_tokens in zip(turns, found, strict=True):
        by_request[turn.session, turn.place] = min(num_tokens, turn.request.num_prompt_tokens - 1)
    total = sum(turn.request.num_prompt_tokens for turn in turns)
    return Hits(capacity_tokens, by_request, sum(by_request.values()) / total)


def _of_blocks(turns: Sequence[Turn], block_tokens: int, capacity_tokens: int | None) -> Iterator[int]:
    room = None if capacity_tokens is None else capacity_tokens // block_tokens
    held: OrderedDict[int, None] = OrderedDict()
    for turn in turns:
        ids = list(turn.request.block_ids())
        num_held = next((place for place, block_id in enumerate(ids) if block_id not in held), len(ids))
        yield num_held * block_tokens
        for block_id in reversed(ids):  # the head was used last
            held[block_id] = None
            held.move_to_end(block_id)
        while room is not None and len(held) > room:
            held.popitem(last=False)


def _of_sessions(turns: Sequence[Turn], block_tokens: int, capacity_tokens: int | None) -> Iterator[int]:
    held: OrderedDict[int, int] = OrderedDict()  # session -> blocks of its last prompt that are held
    last: dict[int, Runs] = {}
    room = None if capacity_tokens is None else capacity_tokens // block_tokens
    num_held = 0
    for turn in turns:
        runs = turn.request.runs
        present = held.pop(turn.session, 0)
        num_held -= present
        yield min(present, num_common(last.get(turn.session, ()), runs)) * block_tokens
        num_blocks = sum(count for _, count in runs)
        held[turn.session] = num_blocks if room is None else min(room, num_blocks)
        num_held += held[turn.session]
        last[turn.session] = runs
        while room is not None and num_held > room:
            oldest = next(iter(held))
            cut = min(held[oldest], num_held - room)
            held[oldest] -= cut
            num_held -= cut
            if not held[oldest]:
                del held[oldest]


def num_common(one: Runs, other: Runs) -> int:
    """Return how many blocks two prompts have in common at their heads."""
    num = 0
    for (first, count), (other_first, other_count) in zip(one, other, strict=False):
        if first != other_first:
            return num
        num += min(count, other_count)
        if count != other_count:
            return num
    return num
