"""What workers will ask for, read up from the stores into the arena before they do. Pure.

    PrefetchBlocks --> told where all of it lies --its turn--> read up --> told again
                                       '--- ReleaseLease, asker lost --> what is not read yet is not read

Nothing is pinned by it. What is read up for those who still wait is never more than a share of the arena, or the later
ones would push out what was read for the earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from messages.handoff import BlocksFound, FoundRun, PrefetchBlocks
from messages.tier import Tier
from nodecache.pool import HostPool
from nodecache.reading import Outcome, Reading
from nodecache.tiers import Tiers

_MAX_SHARE: Final = 0.25  #: of the arena's blocks, read up for those who wait
_MAX_RUNS: Final = 128  #: that are told: what lies behind them, in pieces, is not worth it


@dataclass(slots=True)
class _Prefetch:
    asker: bytes
    request_id: str
    first_index: int
    names: Sequence[bytes]
    num_blocks: int = 0  #: read up for it, or to be
    waiting: set[bytes] = field(default_factory=set)  #: names that are being read, or will be
    is_begun: bool = False
    is_told: bool = False  #: that all has come


class Prefetching:
    """All that is read ahead, by the keys of the questions, the first one first."""

    def __init__(self, pool: HostPool, tiers: Tiers, reading: Reading) -> None:
        self._pool = pool
        self._tiers = tiers
        self._reading = reading
        self._prefetches: dict[str, _Prefetch] = {}
        self.num_read = 0  #: blocks that came

    def __len__(self) -> int:
        return len(self._prefetches)

    @property
    def num_waiting(self) -> int:
        """Questions of which blocks are being read, or will be."""
        return sum(bool(prefetch.waiting) for prefetch in self._prefetches.values())

    def ask(self, key: str, asker: bytes, message: PrefetchBlocks, names: Sequence[bytes], now_s: float) -> BlocksFound:
        """Tell where these blocks lie; what lies below the arena will be read. `names`: those of `message`."""
        self.end(key)
        prefetch = _Prefetch(asker, message.request_id, max(0, message.first_index), names)
        found = self._find(prefetch, now_s)
        if any(run.tier != "host" for run in found.runs):
            self._prefetches[key] = prefetch
        return found

    def end(self, key: str) -> None:
        """Forget a question: it is asked for now, or nobody wants it any more. Unknown keys are ignored."""
        prefetch = self._prefetches.pop(key, None)
        if prefetch is not None:
            self._reading.forget(key, prefetch.waiting)

    def lose(self, asker: bytes) -> None:
        """Forget all that an asker wanted who is gone."""
        for key in [key for key, prefetch in self._prefetches.items() if prefetch.asker == asker]:
            self.end(key)

    def begin(self, now_s: float) -> None:
        """Have the blocks of those read whose turn it is."""
        room = int(self._pool.num_blocks * _MAX_SHARE) - sum(other.num_blocks for other in self._prefetches.values())
        for key, prefetch in self._prefetches.items():
            if prefetch.is_begun:
                continue
            if room <= 0:
                break
            prefetch.is_begun = True
            found = self._pool.find(b"".join(prefetch.names)).tolist()
            wanted = [
                (name, index)
                for index, (name, block_id) in enumerate(zip(prefetch.names, found, strict=True), prefetch.first_index)
                if block_id < 0
            ]
            prefetch.waiting = self._reading.want(key, wanted[:room], now_s, is_ahead=True)
            prefetch.num_blocks = len(prefetch.waiting)
            room -= prefetch.num_blocks

    def take(self, outcome: Outcome) -> None:
        """Take in what became of a block that is being read for one of these."""
        prefetch = self._prefetches.get(outcome.key)
        if prefetch is not None:
            prefetch.waiting.discard(outcome.block.name)
            self.num_read += outcome.block_id is not None

    def take_found(self, now_s: float) -> Iterator[tuple[bytes, BlocksFound]]:
        """Yield, once for each, what is to be told those for whom nothing more is being read, by asker."""
        for prefetch in self._prefetches.values():
            if prefetch.is_begun and not prefetch.waiting and not prefetch.is_told:
                prefetch.is_told = True
                yield prefetch.asker, self._find(prefetch, now_s)

    def check_invariants(self) -> Iterator[str]:
        """Yield what does not hold."""
        num_blocks = sum(prefetch.num_blocks for prefetch in self._prefetches.values())
        if num_blocks > self._pool.num_blocks * _MAX_SHARE:
            yield f"{num_blocks} blocks are read ahead into an arena of {self._pool.num_blocks}"
        for key, prefetch in self._prefetches.items():
            if prefetch.is_begun and prefetch.is_told == bool(prefetch.waiting):
                yield f"{key} waits for {len(prefetch.waiting)} blocks, and was told: {prefetch.is_told}"

    def _find(self, prefetch: _Prefetch, now_s: float) -> BlocksFound:
        """Say where the blocks lie now, in runs of neighbours."""
        block_ids = self._pool.find(b"".join(prefetch.names)).tolist()
        tiers = (
            "host" if block_id >= 0 else self._tier_below(name, now_s)
            for name, block_id in zip(prefetch.names, block_ids, strict=True)
        )
        runs: list[FoundRun] = []
        begin = prefetch.first_index
        for tier, neighbours in groupby(tiers):
            end = begin + sum(1 for _ in neighbours)
            if tier is not None and len(runs) < _MAX_RUNS:
                runs.append(FoundRun(begin, end, tier))
            begin = end
        return BlocksFound(request_id=prefetch.request_id, runs=tuple(runs))

    def _tier_below(self, name: bytes, now_s: float) -> Tier | None:
        found = self._tiers.find(name, now_s)
        return None if found is None else found.tier
