"""What hints do to blocks of the arena: who manages it decrees, requests advise. Pure.

Either way blocks are kept until some time, at most half of the arena's at once, and valued by a priority. A decree
replaces what was said before; advice never takes back what somebody else wanted kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from messages.handoff import BlockHint
from nodecache.arena import BlockIds
from nodecache.pool import HostPool
from nodecache.worth import MAX_PRIORITY

_MAX_KEPT_SHARE: Final = 0.5  #: of the arena's blocks that hints may keep: the rest must do for everybody
_COUNT_S: Final = 1.0  #: between looks at all blocks, for advice: pins end by time


class Keeping:
    """All hints about the blocks of one pool. `now_s` as for the pool."""

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._num_kept = 0  #: as it was counted last, and what was kept since
        self._counted_s = -np.inf

    def decree(self, block_ids: BlockIds, priority: int, pinned_until_s: float, now_s: float) -> None:
        """Keep committed blocks until then (inf: for good, 0: not); of more than may be kept, heads are kept."""
        pool, block_ids = self._pool, self._heads_first(block_ids)
        num_kept = 0
        self._counted_s = -np.inf
        if pinned_until_s > now_s:
            pool.hint(block_ids, priority, 0.0)  # those that were kept before do not count twice
            num_kept = self._room(now_s)
            self._num_kept += len(block_ids[:num_kept])
        pool.hint(block_ids[:num_kept], priority, pinned_until_s)
        pool.hint(block_ids[num_kept:], priority, 0.0)

    def advise(self, block_ids: BlockIds, hints: Sequence[BlockHint], now_s: float) -> None:
        """Take a request's hints about committed blocks of one prefix."""
        pool = self._pool
        for hint in hints:
            chosen = self._heads_first(block_ids)
            chosen = chosen[_is_in(pool.records(chosen)["index"], hint)]
            rows = pool.records(chosen)
            until_s = rows["pinned_until_s"]
            if hint.ttl_s > 0:
                is_new = until_s <= now_s
                may_be_kept = ~is_new | (np.cumsum(is_new) <= self._room(now_s))
                self._num_kept += int((is_new & may_be_kept).sum())
                until_s = np.where(may_be_kept, np.maximum(until_s, now_s + hint.ttl_s), until_s)
            pool.hint(chosen, rows["priority"] if hint.priority is None else hint.priority, until_s)

    def _room(self, now_s: float) -> int:
        """Return how many more blocks may be kept."""
        if now_s >= self._counted_s + _COUNT_S:
            self._num_kept, self._counted_s = self._pool.num_hinted(now_s), now_s
        return max(0, int(self._pool.num_blocks * _MAX_KEPT_SHARE) - self._num_kept)

    def _heads_first(self, block_ids: BlockIds) -> BlockIds:
        ordered: BlockIds = block_ids[np.argsort(self._pool.records(block_ids)["index"], kind="stable")]
        return ordered


def priorities(indexes: npt.NDArray[np.int64], hints: Sequence[BlockHint]) -> npt.NDArray[np.int64]:
    """Return by what priority blocks at these positions are valued before they are there, `[n]`."""
    found = np.zeros_like(indexes)
    for hint in hints:
        value = MAX_PRIORITY if hint.ttl_s > 0 else hint.priority or 0
        found[_is_in(indexes, hint)] = max(-MAX_PRIORITY, min(MAX_PRIORITY, value))
    return found


def _is_in(indexes: npt.NDArray[np.integer], hint: BlockHint) -> npt.NDArray[np.bool_]:
    is_in: npt.NDArray[np.bool_] = indexes >= hint.begin
    return is_in if hint.end is None else is_in & (indexes < hint.end)
