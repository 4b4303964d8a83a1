"""Sessions of a coding agent, drawn: as long, and as much alike from turn to turn, as recorded ones.

The quantiles are of the first 40 turns of 474 recorded sessions, sub-agents left out (kv-cache-tester, Apache-2.0).
What of a turn depends on the turns before it, beside its prompt, is not told by them.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from typing import Final

from cluster.traces import Runs, Trace, TraceRequest, TraceSession

BLOCK_TOKENS: Final = 64
_RANKS: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
#: by rank, in blocks: of a first prompt; that a turn adds to the prompt before it
_FIRST: Final = (99, 155, 203, 240, 287, 358, 1687, 4052, 5627, 11257, 13216)
_ADDED: Final = (0.5, 2, 2, 3, 5, 11, 27, 69, 120, 285, 2297)
_OUTPUT: Final = (16, 62, 89, 106, 140, 225, 446, 940, 1656, 4110, 18195)  #: tokens
_PAUSE_S: Final = (0.1, 2.3, 3.4, 4.0, 5.7, 9.7, 21.7, 91.0, 228, 1936, 77590)
#: of turns that drop the end of the prompt before: which share of it
_DROP_SHARE: Final = 0.0159
_DROPPED: Final = (0.005, 0.01, 0.02, 0.03, 0.5, 0.8, 0.9, 0.98, 0.99, 1.0, 1.0)
#: ids of a session, apart from others'
_IDS_OF_A_SESSION: Final = 2**40


def agent_trace(num_sessions: int, num_turns: int, seed: int) -> Trace:
    """Draw sessions of `num_turns` each, which do not say when they begin. Each is the same whatever their number."""
    return Trace("agents", BLOCK_TOKENS, tuple(_session(number, num_turns, seed) for number in range(num_sessions)))


def _session(number: int, num_turns: int, seed: int) -> TraceSession:
    draw = random.Random(f"agents {seed} {number}")
    first_id, next_id = number * _IDS_OF_A_SESSION, 0
    runs: Runs = ()
    at_s = 0.0
    requests = []
    for turn in range(num_turns):
        added = round(_drawn(draw, _ADDED if turn else _FIRST))
        if turn and draw.random() < _DROP_SHARE:
            num_blocks = sum(count for _, count in runs)
            runs = _head(runs, round(num_blocks * (1 - _drawn(draw, _DROPPED))))
            added = max(added, num_blocks // 4)  # what is left is summed up, or read again
        if added:
            runs = (*runs, (first_id + next_id, added))
            next_id += added
        pause_s = _drawn(draw, _PAUSE_S) if turn else 0.0
        at_s += pause_s
        num_blocks = sum(count for _, count in runs)
        output = max(1, round(_drawn(draw, _OUTPUT)))
        requests.append(TraceRequest(at_s, pause_s, max(1, num_blocks) * BLOCK_TOKENS, output, runs))
    return TraceSession(f"drawn {number}", None, tuple(requests))


def _head(runs: Runs, num_blocks: int) -> Runs:
    kept = []
    for first, count in runs:
        if num_blocks <= 0:
            break
        kept.append((first, min(count, num_blocks)))
        num_blocks -= count
    return tuple(kept)


def _drawn(draw: random.Random, quantiles: Sequence[float]) -> float:
    """Draw from a distribution with these quantiles; between two of them logarithms are evenly spread."""
    rank = draw.random()
    above = min(bisect.bisect_right(_RANKS, rank), len(_RANKS) - 1)
    low, high = _RANKS[above - 1], _RANKS[above]
    share = (rank - low) / (high - low)
    return math.exp(math.log(quantiles[above - 1]) * (1 - share) + math.log(quantiles[above]) * share)
