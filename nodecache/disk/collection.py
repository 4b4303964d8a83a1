"""Which segment is given up when room is wanted, and which of its blocks are worth copying. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nodecache.disk.segment import Segment

Values: TypeAlias = npt.NDArray[np.float64]


MAX_CANDIDATES = 16


class Candidate(NamedTuple):
    """A segment that could be given up, and what its live blocks are worth, in any unit."""

    segment_id: int
    num_rows: int
    values: Values  #: [num_live]


class Victim(NamedTuple):
    """The segment to give up, and which of its live blocks to copy before."""

    segment_id: int
    is_kept: npt.NDArray[np.bool_]  #: [num_live]


def likely_victims(sealed: Sequence[Segment]) -> list[Segment]:
    """Return the segments that may be chosen, longest unused first: those longest unused, and those that hold least.

    All of them would cost a look at every block of the store.
    """
    by_use = sorted(sealed, key=lambda each: float(each.last_use[each.is_live].mean()) if each.num_live else -1.0)
    by_live = sorted(sealed, key=lambda each: each.num_live)
    half = MAX_CANDIDATES // 2
    chosen = {each.segment_id for each in by_use[:half] + by_live[:half]}
    return [each for each in by_use if each.segment_id in chosen]


def choose_victim(candidates: Sequence[Candidate], num_excess_blocks: int, num_free_rows: int) -> Victim | None:
    """Choose the segment whose loss costs least for the room that it gives.

    What must go is what is worth least: a block is cold if it is among the `num_excess_blocks` least valuable ones of
    all candidates. Of a segment, cold blocks are dropped, others copied: at most as many as fill half of it, so that
    each block written causes at most one to be copied, and as fit into `num_free_rows`; the least valuable are left
    behind. The loss is what the dropped ones are worth above the least of all, by the rows gained. Of equal losses the
    one with fewest copies, then the first candidate. None where there is no candidate.
    """
    if not candidates:
        return None
    every = np.concatenate([candidate.values for candidate in candidates])
    lowest = every.min() if len(every) else 0.0
    num_cold = min(num_excess_blocks, len(every))
    coldest = np.partition(every, num_cold - 1)[num_cold - 1] if num_cold > 0 else -np.inf
    best: Victim | None = None
    least = (np.inf, 0)
    for segment_id, num_rows, values in candidates:
        order = np.argsort(-values, kind="stable")[: max(0, min(num_rows // 2, num_free_rows))]
        is_kept = np.zeros(len(values), np.bool_)
        is_kept[order] = values[order] > coldest
        num_kept = int(is_kept.sum())
        loss = (float((values[~is_kept] - lowest).sum()) / (num_rows - num_kept), num_kept)
        if best is None or loss < least:
            best, least = Victim(segment_id, is_kept), loss
    return best
