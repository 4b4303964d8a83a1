"""Of a block that several pools hold, which one keeps it: the others' copies are spare, and the first to go.

So that the pools of a cluster hold one cache, and not each the same: without it a prefill worker and the decode
workers that pull from it would fill up with the same blocks. One holder keeps, or two would give up their copies at
once, each in the belief that the other has it. Blocks come in runs, so keepers are appointed by runs, too: whoever
keeps least for its size. A node cache always keeps: its memory is the larger, and every pool of its node reaches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvrouter.index import Holder

#: Tiers from which a block is at hand.
_AT_HAND = frozenset({"device", "host"})


class Appointed(NamedTuple):
    """What one worker is told: concatenated names of blocks whose copy there is spare from now on, or not any more."""

    worker_id: str
    spare: bytes
    kept: bytes


class Keepers:
    """Appoints keepers. `num_blocks(worker_id)` is the size of a worker's pool. One thread."""

    def __init__(self, num_blocks: Callable[[str], int]) -> None:
        self._num_blocks = num_blocks
        self._keepers: dict[bytes, str] = {}  # of blocks that several hold
        self._num_kept: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._keepers)

    def on_change(self, names: Iterable[bytes], holders: Callable[[bytes], tuple[Holder, ...]]) -> list[Appointed]:
        """Take in that the holders of these blocks changed; return what workers are to be told, each once."""
        told: dict[str, tuple[list[bytes], list[bytes]]] = {}
        chosen: dict[tuple[Holder, ...], str] = {}  # so that a run has one keeper
        for name in names:
            now = tuple(holder for holder in holders(name) if holder.tier in _AT_HAND)
            before = self._keepers.get(name)
            if len(now) < 2:
                if before is not None:
                    self._drop(name, before)
                    for holder in now:
                        told.setdefault(holder.worker_id, ([], []))[1].append(name)
                continue
            keeper = before
            if not any(holder.worker_id == before for holder in now):
                keeper = chosen.get(now) or self._choose(now)
                chosen[now] = keeper
                if before is not None:
                    self._drop(name, before)
                self._keepers[name] = keeper
                self._num_kept[keeper] += 1
                told.setdefault(keeper, ([], []))[1].append(name)
            for holder in now:
                if holder.worker_id != keeper and holder.tier == "device":
                    told.setdefault(holder.worker_id, ([], []))[0].append(name)
        return [Appointed(worker_id, b"".join(spare), b"".join(kept)) for worker_id, (spare, kept) in told.items()]

    def _choose(self, holders: tuple[Holder, ...]) -> str:
        hosts = [holder.worker_id for holder in holders if holder.tier == "host"]
        candidates = hosts or [holder.worker_id for holder in holders]
        return min(candidates, key=lambda worker_id: self._num_kept[worker_id] / max(1, self._num_blocks(worker_id)))

    def _drop(self, name: bytes, keeper: str) -> None:
        del self._keepers[name]
        self._num_kept[keeper] -= 1
