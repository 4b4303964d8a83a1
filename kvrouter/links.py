"""What bringing blocks costs, from every source to every worker that pulls: as it was measured, else as its road costs.

Prices are arrays `[3, ...]`: seconds of a pull, of a byte, of a handoff (messages.price.MovePrice); a handoff over a
link that there is not takes forever. Workers with a pool are known by their row (kvrouter.fleet_table).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache.price import ASSUMED_MOVES
from kvrouter.fit import NODE_ROADS
from kvrouter.measured_pairs import MeasuredPairs
from messages.fleet import WorkerInfo
from messages.price import MovePrice
from messages.tier import Tier

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

_UNKNOWN_ROAD, _NO_ROAD = 0, 1  #: the first two of the roads, which have no name
#: Sources that left whose prices are kept: as many as may come back at once.
_MAX_LEFT = 1024
_IN_MEMORY: frozenset[Tier] = frozenset({"device", "host"})


class Place(NamedTuple):
    """What decides who reaches a worker, and how; the first three may be arrays, of many."""

    model: int | Ints  #: hash of what its blocks must have in common with another's
    node: int | Ints  #: hash of its node's id
    kind: int | Ints  #: number of the roads that it offers, in their order
    address: str = ""
    row: int | None = None  #: None: it has no pool


class Links:
    """Prices of links. `assumed`: of a road that nobody measured. One thread."""

    def __init__(self, assumed: MovePrice) -> None:
        self._roads: dict[str, int] = {}  # name -> number
        self._road_prices = np.array([_parts(assumed), (0.0, 0.0, np.inf)]).T
        self._kinds: dict[tuple[str, ...], int] = {}
        self._road_of = np.zeros((2, 0, 0), np.int64)  # [is near, kind of source, kind of target] -> number of the road
        self._rows: dict[str, int] = {}  # by address
        self._measured = MeasuredPairs()
        self._addresses: dict[int, str] = {}  # by row
        # by the address of a source that left: the prices to it, with each target's row and address
        self._left: OrderedDict[str, list[tuple[int, str, Floats]]] = OrderedDict()
        self._least = np.full((3, 0), np.inf)  # [, target]
        # of slower tiers, and of sources that have not joined: by address and tier, then by the target's row
        self._others: dict[tuple[str, Tier], dict[int, MovePrice]] = {}

    def place(self, info: WorkerInfo, row: int | None) -> Place:
        """Say where a worker is."""
        if info.roads not in self._kinds:
            self._kinds[info.roads] = len(self._kinds)
            self._compare_kinds()
        model = hash((info.fingerprint, info.block_size, info.block_bytes))
        return Place(model, hash(info.node_id), self._kinds[info.roads], info.address, row)

    def grow(self, capacity: int) -> None:
        """Make room for so many rows."""
        least = np.full((3, capacity), np.inf)
        least[:, : self._least.shape[1]] = self._least
        self._least = least
        self._measured.grow(capacity)

    def join(self, place: Place) -> None:
        """Take in that a worker with a pool is there: prices of it may have come before, or be known from before."""
        assert place.row is not None
        self._rows[place.address], self._addresses[place.row] = place.row, place.address
        for target, address, parts in self._left.pop(place.address, ()):
            if self._rows.get(address) == target:  # who measured it is still there
                self._measured.put(target, place.row, parts)
                self._note_least(target)
        for target, price in self._others.pop((place.address, "device"), {}).items():
            self._measured.put(target, place.row, np.array(_parts(price)))
            self._note_least(target)

    def leave(self, place: Place) -> None:
        """Forget a worker: as a source, and as a target.

        What others measured of it as a source is kept for a while: they tell it once, and at its address nobody but
        itself comes back. What it measured it tells anew.
        """
        for key, by_target in list(self._others.items()):
            if place.row is not None:
                by_target.pop(place.row, None)
            if key[0] == place.address or not by_target:
                del self._others[key]
        if place.row is not None:
            if self._rows.get(place.address) == place.row:  # else another worker has the address by now
                del self._rows[place.address]
            targets, parts = self._measured.of_source(place.row)
            if len(targets):
                told = zip(targets.tolist(), parts.T, strict=True)
                self._left[place.address] = [(row, self._addresses[row], each) for row, each in told]
                if len(self._left) > _MAX_LEFT:
                    self._left.popitem(last=False)
            self._measured.remove(place.row)
            self._addresses.pop(place.row, None)
            self._least[:, place.row] = np.inf

    def report(self, row: int, moves: Iterable[MovePrice]) -> None:
        """Take in what a worker measured of its sources; of a road the last price that anybody measured counts."""
        for price in moves:
            if price.road not in self._roads:
                self._roads[price.road] = self._road_prices.shape[1]
                self._road_prices = np.column_stack([self._road_prices, _parts(price)])
                self._compare_kinds()
            self._road_prices[:, self._roads[price.road]] = _parts(price)
            source = self._rows.get(price.source) if price.tier == "device" else None
            if source is None:
                self._others.setdefault((price.source, price.tier), {})[row] = price
            else:
                self._measured.put(row, source, np.array(_parts(price)))
        self._note_least(row)

    def least(self, targets: Ints) -> Floats:
        """Return prices that no link from a pool to `targets` is below, in any part, `[3, targets]`."""
        unmeasured: Floats = np.delete(self._road_prices, _NO_ROAD, axis=1).min(axis=1)
        least: Floats = np.minimum(self._least[:, targets], unmeasured[:, None])
        return least

    def between(self, sources: Place, source_rows: Ints, targets: Place, target_rows: Ints) -> Floats:
        """Return the price from each of these sources to each of these targets, `[3, targets, sources]`."""
        kinds = self._road_of.shape[1]
        is_near = np.equal(np.asarray(targets.node)[:, None], sources.node)
        roads = self._road_of.ravel()[(is_near * kinds + sources.kind) * kinds + np.asarray(targets.kind)[:, None]]
        np.copyto(roads, _NO_ROAD, where=np.not_equal(np.asarray(targets.model)[:, None], sources.model))
        prices = self._road_prices[:, roads]
        numbers = self._measured.numbers[target_rows[:, None], source_rows]
        if numbers.any():
            target, source = np.nonzero(np.where(roads != _NO_ROAD, numbers, 0))
            prices[:, target, source] = self._measured.prices[:, numbers[target, source]]
        return prices

    def loading(self, source: Place, tier: Tier, targets: Place, target_rows: Ints) -> Floats:
        """Return the price from a source, in one of its tiers, to each of these targets, `[3, targets]`."""
        roads = self._road_of[(np.equal(targets.node, source.node)).astype(np.int64), source.kind, targets.kind]
        is_there = (roads != _NO_ROAD) & np.equal(targets.model, source.model)
        if tier in _IN_MEMORY:
            prices = self._road_prices[:, roads]
        else:
            prices = np.repeat(np.array(_parts(ASSUMED_MOVES[tier]))[:, None], len(target_rows), axis=1)
        if tier == "device" and source.row is not None:
            numbers = self._measured.numbers[target_rows, source.row]
            prices[:, numbers > 0] = self._measured.prices[:, numbers[numbers > 0]]
        for row, price in self._others.get((source.address, tier), {}).items():
            prices[:, target_rows == row] = np.array(_parts(price))[:, None]
        prices[2, ~is_there] = np.inf
        return prices

    def _note_least(self, target: int) -> None:
        numbers = self._measured.numbers[target]
        self._least[:, target] = self._measured.prices[:, numbers[numbers > 0]].min(axis=1, initial=np.inf)

    def _compare_kinds(self) -> None:
        """Find the road between each two kinds: on a node, and between nodes."""
        roads_of = np.full((2, len(self._kinds), len(self._kinds)), _NO_ROAD)
        for source_roads, source in self._kinds.items():
            for target_roads, target in self._kinds.items():
                common = [road for road in target_roads if road in source_roads]
                for is_near in (False, True):
                    if any(is_near or road not in NODE_ROADS for road in common):
                        best = next((road for road in common if (road in NODE_ROADS) is is_near), "")
                        roads_of[int(is_near), source, target] = self._roads.get(best, _UNKNOWN_ROAD)
        self._road_of = roads_of


def _parts(price: MovePrice) -> tuple[float, float, float]:
    return price.fixed_s, price.byte_s, price.handoff_s
