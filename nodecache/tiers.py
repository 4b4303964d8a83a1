"""The tiers below the arena: which of them are in the plan, what they hold, and how the router is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from messages.tier import Tier
from nodecache.store import BlockStore, StoredBlock

#: After a failure a store is left alone for so long, twice as long after each further one.
_MIN_REST_S: Final = 1.0
_MAX_REST_S: Final = 60.0


class Found(NamedTuple):
    """A block that a store holds."""

    tier: Tier
    block: StoredBlock


@dataclass(slots=True)
class TierStore:
    """A store as the node cache sees it."""

    tier: Tier
    store: BlockStore
    is_full: bool = False  #: what was written last pushed something out
    num_failed: int = 0
    _rests_until_s: float = 0.0
    _rest_s: float = _MIN_REST_S
    _stored: dict[bytes, None] = field(default_factory=dict)
    _removed: dict[bytes, None] = field(default_factory=dict)

    def is_usable(self, now_s: float) -> bool:
        """Tell whether the store is in the plan."""
        return now_s >= self._rests_until_s

    def have_room(self, tenants: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tell of each block, by whose it is, whether it goes in without another going out, as far as is known."""
        with_room = [tenant for tenant in np.unique(tenants).tolist() if self.store.accounts.room(tenant) != 0]
        return np.isin(tenants, np.array(with_room, np.uint64)) & (not self.is_full)

    def on_written(self, tenants: Collection[int], dropped: Sequence[bytes]) -> None:
        """Note what went out for blocks of these tenants; where a quota was full nothing is known of the store."""
        if all(self.store.accounts.room(tenant) != 0 for tenant in tenants):
            self.is_full = bool(dropped)

    def on_failed(self, now_s: float) -> None:
        """Note that it did not answer, or refused: it is left alone for a while."""
        self.num_failed += 1
        self._rests_until_s = now_s + self._rest_s
        self._rest_s = min(2 * self._rest_s, _MAX_REST_S)

    def on_worked(self) -> None:
        """Note that it did what was asked."""
        self._rest_s = _MIN_REST_S

    def on_changed(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Note which names it has now that it had not, and the other way round; in this order."""
        for name in stored:
            if self._removed.pop(name, _ABSENT) is _ABSENT:
                self._stored[name] = None
        for name in removed:
            if self._stored.pop(name, _ABSENT) is _ABSENT:
                self._removed[name] = None

    def take_events(self) -> tuple[bytes, bytes]:
        """Return the names (stored, removed) since the last call, concatenated."""
        events = (b"".join(self._stored), b"".join(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events


class Tiers:
    """All stores below the arena, the nearest first."""

    def __init__(self, stores: Mapping[Tier, BlockStore]) -> None:
        self.all: Sequence[TierStore] = [TierStore(tier, store) for tier, store in stores.items()]
        self._by_tier = {entry.tier: entry for entry in self.all}

    def __getitem__(self, tier: Tier) -> TierStore:
        return self._by_tier[tier]

    def find(self, name: bytes, now_s: float, *, below: Tier | None = None) -> Found | None:
        """Find the nearest usable store that has a block; `below`: only those further away than this one."""
        is_below = below is None
        for entry in self.all:
            if is_below and entry.is_usable(now_s):
                block = entry.store.find(name)
                if block is not None:
                    return Found(entry.tier, block)
            is_below |= entry.tier == below
        return None


_ABSENT = object()
