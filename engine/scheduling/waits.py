"""How long sequences waited to be admitted."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Final

_BOUNDS_S: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)


class QueueWaits:
    """A histogram of the seconds from a sequence's arrival until it was admitted for the first time."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sum_s = 0.0

    def observe(self, waited_s: float) -> None:
        """Count a sequence that was admitted."""
        self._counts[bisect_left(_BOUNDS_S, waited_s)] += 1
        self._sum_s += waited_s

    def stats(self) -> dict[str, float]:
        """Return the histogram's parts by metric name."""
        bounds = [*(f"{bound:g}" for bound in _BOUNDS_S), "+Inf"]
        counts = list(accumulate(self._counts))
        buckets = {
            f'kvray_queue_seconds_bucket{{le="{bound}"}}': float(count)
            for bound, count in zip(bounds, counts, strict=True)
        }
        return {**buckets, "kvray_queue_seconds_count": float(counts[-1]), "kvray_queue_seconds_sum": self._sum_s}
