"""Which decode steps are captured, and in which of those a step runs. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from engine.scheduling.plan import SequenceStep

#: Up to it buckets double; from it on they go by so many rows, or by an eighth of the power of two below them.
_STRIDE = 8


def buckets(max_rows: int) -> tuple[int, ...]:
    """Return the numbers of rows that decode steps are captured with, upwards, the last of them `max_rows`.

    1, 2, 4, 8, then by 8 up to 128, by 16 up to 256 and so on: 27 of them for 256 rows, 8 more for each doubling, and
    past 8 rows less than an eighth of a step is padding, or less than 8 rows.
    """
    found = []
    rows = 1
    while rows < max_rows:
        found.append(rows)
        power = 1 << (rows.bit_length() - 1)
        rows += rows if rows < _STRIDE else max(_STRIDE, power // 8)
    return (*found, max_rows)


def bucket_of(parts: Sequence[SequenceStep], sizes: Sequence[int]) -> int | None:
    """Return which of `sizes`, which go upwards, a step of these parts runs in; None: it is computed eagerly.

    A chunk of a prompt has lengths of its own; more rows than the largest bucket come of long replays alone.
    """
    if any(part.kind == "prefill" for part in parts):
        return None
    at = bisect_left(sizes, sum(part.num_tokens for part in parts))
    return sizes[at] if at < len(sizes) else None
