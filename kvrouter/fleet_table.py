"""All workers with a pool as arrays, a row for each: what a decision is computed from, over the whole fleet at once.

Each worker's own view stays what is true of it (kvrouter.worker_state); its row follows with every change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.price import SHORT_TOKENS, Computation, compute_s
from kvrouter.index import Holder
from kvrouter.links import Floats, Ints, Links, Place
from kvrouter.rendezvous import worker_hash
from kvrouter.worker_state import Changed, Reserved, WorkerState
from messages.errors import InvariantError
from messages.fleet import LoadReport, Role
from messages.price import ComputePrice, MovePrice
from transport.checksum import Words

_ROLES: tuple[Role, ...] = ("decode", "prefill")
_USUAL = Computation.of(0, 1024)  #: by what workers' speeds are compared
_FIRST_CAPACITY = 64


class Constants(NamedTuple):
    """What does not change of workers, `[workers]` int64 each."""

    role: Ints  #: number in `_ROLES`; -1: nobody has this row
    model: Ints  #: the three of a Place
    node: Ints
    kind: Ints
    fingerprint: Ints  #: hash of it
    block_size: Ints
    num_blocks: Ints
    block_bytes: Ints
    max_model_len: Ints
    max_num_seqs: Ints

    @property
    def place(self) -> Place:
        """Where they are."""
        return Place(self.model, self.node, self.kind)


class Loads(NamedTuple):
    """What workers are busy with, reported and promised, `[workers]` float64 each."""

    queue_s: Floats
    short_queue_s: Floats  #: of a short prompt
    num_short: Floats
    num_sequences: Floats
    free_blocks: Floats
    idle_blocks: Floats
    reused_share: Floats
    decode_step_s: Floats  #: 0: was not measured
    is_measured: Floats  #: whether the three prices of computing are
    step_s: Floats
    token_s: Floats
    pair_s: Floats


class FleetTable:
    """The workers that are there, and node caches, which have no row. `assumed`: what moving costs, if unmeasured."""

    def __init__(self, assumed: MovePrice) -> None:
        self.links = Links(assumed)
        self._workers: dict[str, WorkerState] = {}
        self._places: dict[str, Place] = {}
        self._by_row: list[WorkerState | None] = []
        self._states: tuple[WorkerState | None, ...] | None = None  # the same, made when it is asked for
        self._constants: Ints = np.zeros((len(Constants._fields), 0), np.int64)
        self._loads: Floats = np.zeros((len(Loads._fields), 0))
        self._hashes: Words = np.zeros(0, np.uint64)
        self._best_compute: dict[bytes, ComputePrice] = {}
        self._holders: tuple[Sequence[Holder | None], Ints] | None = None  # whose rows were asked for last

    @property
    def workers(self) -> Mapping[str, WorkerState]:
        """Who is there, by worker id."""
        return MappingProxyType(self._workers)

    @property
    def best_compute(self) -> Mapping[bytes, ComputePrice]:
        """The fastest worker's price of computing, by fingerprint."""
        return self._best_compute

    def join(self, state: WorkerState) -> None:
        """Take in a worker, which must not be there."""
        info = state.info
        self._workers[info.worker_id] = state
        row = None if info.role == "cache" else self._free_row()
        place = self._places[info.worker_id] = self.links.place(info, row)
        self._holders = self._states = None
        if row is not None:
            self._by_row[row] = state
            self._hashes[row] = worker_hash(info.worker_id)
            self._constants[:, row] = (
                _ROLES.index(info.role),
                place.model,
                place.node,
                place.kind,
                hash(info.fingerprint),
                info.block_size,
                info.num_blocks,
                info.block_bytes,
                info.max_model_len,
                info.max_num_seqs,
            )
            self.links.join(place)
            self._follow(state)
        self._note_compute(state)

    def leave(self, worker_id: str) -> None:
        """Forget a worker; unknown ids are ignored."""
        if self._workers.pop(worker_id, None) is None:
            return
        place = self._places.pop(worker_id)
        self.links.leave(place)
        self._holders = self._states = None
        if place.row is not None:
            self._by_row[place.row] = None
            self._constants[0, place.row] = -1

    def report(self, load: LoadReport) -> Changed | None:
        """Take in what a worker that is there says; return as WorkerState does."""
        state = self._workers[load.worker_id]
        changed = state.report(load)
        row = self._places[load.worker_id].row
        if load.moves and row is not None:
            self.links.report(row, load.moves)
        self._follow(state)
        self._note_compute(state)
        return changed

    def reserve(self, worker_id: str, request_id: str, reserved: Reserved) -> None:
        """Count a placement at a worker that is there."""
        self._workers[worker_id].reserve(request_id, reserved)
        self._follow(self._workers[worker_id])

    def release(self, worker_id: str, request_id: str) -> None:
        """Count a placement no longer; unknown ids are ignored."""
        state = self._workers.get(worker_id)
        if state is not None:
            state.release(request_id)
            self._follow(state)

    def find_best_compute(self) -> None:
        """Look anew for the fastest workers: one may have left, or got worse."""
        self._best_compute = {}
        for state in self._workers.values():
            self._note_compute(state)

    def rows(self, role: Role) -> Ints:
        """Return the rows of all workers in this role."""
        return np.flatnonzero(self._constants[0] == _ROLES.index(role))

    def rows_of(self, worker_ids: Sequence[str]) -> list[int]:
        """Return the rows of those of these workers that have one."""
        places = (self._places.get(worker_id) for worker_id in worker_ids)
        return [place.row for place in places if place is not None and place.row is not None]

    @property
    def states(self) -> tuple[WorkerState | None, ...]:
        """Whose each row is; another tuple whenever somebody came or went."""
        if self._states is None:
            self._states = tuple(self._by_row)
        return self._states

    def constants(self, rows: Ints) -> Constants:
        """Return what does not change of these workers."""
        return Constants(*self._constants[:, rows])

    def loads(self, rows: Ints) -> Loads:
        """Return what these workers are busy with."""
        return Loads(*self._loads[:, rows])

    def hashes(self, rows: Ints) -> Words:
        """Return what these workers are known by in rendezvous hashing."""
        return self._hashes[rows]

    def place_of(self, worker_id: str) -> Place | None:
        """Return where a worker is; None: it is not there."""
        return self._places.get(worker_id)

    def by_row(self, is_held: npt.NDArray[np.bool_], holders: Sequence[Holder | None]) -> npt.NDArray[np.bool_]:
        """Return which pools hold runs, `[runs, rows]`, of `[runs, holders]`; `holders` must not change in place."""
        if self._holders is None or self._holders[0] is not holders:
            nobody = len(self._by_row)
            rows = np.full(len(holders), nobody)
            for number, holder in enumerate(holders):
                place = self._places.get(holder.worker_id) if holder and holder.tier == "device" else None
                if place is not None and place.row is not None:
                    rows[number] = place.row
            self._holders = (holders, rows)
        by_row = np.zeros((len(is_held), len(self._by_row) + 1), np.bool_)
        by_row[:, self._holders[1]] = is_held
        return by_row

    def check_invariants(self) -> None:
        """Raise InvariantError where a worker's row says anything else than its own view."""
        for row, state in enumerate(self._by_row):
            seen = tuple(self._loads[:, row])
            if (state is None) != (self._constants[0, row] == -1) or (state and seen != _load(state)):
                raise InvariantError(f"fleet: row {row} says {seen} of {state}")

    def _free_row(self) -> int:
        row = next(row for row in count() if row == len(self._by_row) or self._by_row[row] is None)
        if row == len(self._by_row):
            capacity = max(_FIRST_CAPACITY, 2 * row)
            added = capacity - row
            self._by_row += [None] * added
            unused = np.full((len(Constants._fields), added), -1)
            self._constants = np.concatenate([self._constants, unused], axis=1)
            self._loads = np.concatenate([self._loads, np.zeros((len(Loads._fields), added))], axis=1)
            self._hashes = np.concatenate([self._hashes, np.zeros(added, np.uint64)])
            self.links.grow(capacity)
        return row

    def _follow(self, state: WorkerState) -> None:
        """Have a worker's row say what its own view does."""
        row = self._places[state.info.worker_id].row
        if row is not None:
            self._loads[:, row] = _load(state)

    def _note_compute(self, state: WorkerState) -> None:
        price, fingerprint = state.compute_price, state.info.fingerprint
        if price is None:
            return
        best = self._best_compute.get(fingerprint)
        if best is None or compute_s(price, _USUAL) < compute_s(best, _USUAL):
            self._best_compute[fingerprint] = price


def _load(state: WorkerState) -> tuple[float, ...]:
    """Return a column of Loads."""
    load, price = state.load, state.compute_price
    return (
        state.queue_s(SHORT_TOKENS + 1),
        state.queue_s(SHORT_TOKENS),
        state.num_short,
        state.num_sequences,
        state.free_blocks,
        state.idle_blocks,
        load.reused_share if load else 0.0,
        load.decode_step_s if load else 0.0,
        price is not None,
        price.step_s if price else 0.0,
        price.token_s if price else 0.0,
        price.pair_s if price else 0.0,
    )
