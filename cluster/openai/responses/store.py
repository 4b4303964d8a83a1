"""Responses that are kept for a while, so that a later request may go on from one: in memory, within limits.

What a response was given and what it answered is kept once. One that goes on from another refers to it, and what is
referred to stays in memory, though it may not be found any more. Each belongs to one owner, and no other ever finds it.
When room is wanted, whoever has most loses what it has kept longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cluster.openai.responses.protocol import InputItem

_items = msgspec.json.Decoder(list[InputItem])


class _Output(msgspec.Struct):
    output: list[InputItem]


_output = msgspec.json.Decoder(_Output)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """What one ingress keeps at most, of all owners together."""

    max_bytes: int = 64 * 2**20
    max_responses: int = 10_000
    max_age_s: float = 86_400.0


@dataclass(slots=True, eq=False)
class StoredResponse:
    """A response that was given, with what it was given for. Its fields never change but for the store's count."""

    reply: bytes  #: JSON, as it was sent
    items: bytes  #: its own input, a JSON array of items that have ids
    previous: StoredResponse | None  #: the one that it went on from
    num_holders: int = 0  #: entries of the store, and responses held there, that refer to it

    @property
    def num_bytes(self) -> int:
        """What it takes by itself."""
        return len(self.reply) + len(self.items)

    def given(self) -> list[InputItem]:
        """Return all items that the model was given, but for instructions: those of the responses before, its own."""
        turns: list[list[InputItem]] = [_items.decode(self.items)]
        previous = self.previous
        while previous is not None:
            turns += [previous.output(), _items.decode(previous.items)]
            previous = previous.previous
        return [item for turn in reversed(turns) for item in turn]

    def output(self) -> list[InputItem]:
        """Return the items that the model answered."""
        return _output.decode(self.reply).output

    def conversation(self) -> list[InputItem]:
        """Return all items that one who goes on from this response has before its own."""
        return [*self.given(), *self.output()]


@dataclass(frozen=True, slots=True)
class _Entry:
    stored: StoredResponse
    kept_s: float


class _Shelf:
    """What one owner has."""

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}  #: by id, in the order in which they came
        self.num_bytes = 0


class ResponseStore:
    """Keeps responses by owner and id. What is too old is dropped with the next call, whosever it is."""

    def __init__(self, limits: StoreLimits) -> None:
        self._limits = limits
        self._shelves: dict[str, _Shelf] = {}

    @property
    def num_bytes(self) -> int:
        """What all of them take, each of those that others refer to once."""
        return sum(shelf.num_bytes for shelf in self._shelves.values())

    def __len__(self) -> int:
        """Return how many can be found."""
        return sum(len(shelf.entries) for shelf in self._shelves.values())

    def put(self, owner: str, response_id: str, stored: StoredResponse, now_s: float) -> None:
        """Keep a response, unless it alone is more than there is room for."""
        self._drop_old(now_s)
        shelf = self._shelves.setdefault(owner, _Shelf())
        shelf.entries[response_id] = _Entry(stored, now_s)
        _hold(shelf, stored)
        while self.num_bytes > self._limits.max_bytes:
            self._drop_first(max(self._shelves, key=lambda name: self._shelves[name].num_bytes))
        while len(self) > self._limits.max_responses:
            self._drop_first(max(self._shelves, key=lambda name: len(self._shelves[name].entries)))

    def find(self, owner: str, response_id: str, now_s: float) -> StoredResponse | None:
        """Return one of the owner's responses, None where there is none of that id, or no more."""
        self._drop_old(now_s)
        shelf = self._shelves.get(owner)
        entry = None if shelf is None else shelf.entries.get(response_id)
        return None if entry is None else entry.stored

    def drop(self, owner: str, response_id: str, now_s: float) -> bool:
        """Forget one of the owner's responses; those that went on from it keep what they need. False: there is none."""
        if self.find(owner, response_id, now_s) is None:
            return False
        self._drop(owner, response_id)
        return True

    def check_invariants(self) -> None:
        """Check that bytes and references are counted right."""
        for owner, shelf in self._shelves.items():
            assert shelf.entries, f"{owner} has nothing"
            holders: dict[int, int] = {}
            reached: dict[int, StoredResponse] = {}
            for entry in shelf.entries.values():
                stored: StoredResponse | None = entry.stored
                while stored is not None:
                    holders[id(stored)] = holders.get(id(stored), 0) + 1
                    if id(stored) in reached:
                        break
                    reached[id(stored)] = stored
                    stored = stored.previous
            assert shelf.num_bytes == sum(stored.num_bytes for stored in reached.values())
            assert all(stored.num_holders == holders[key] for key, stored in reached.items())
        assert self.num_bytes <= self._limits.max_bytes
        assert len(self) <= self._limits.max_responses

    def _drop_old(self, now_s: float) -> None:
        for owner in list(self._shelves):
            while owner in self._shelves:
                first = next(iter(self._shelves[owner].entries.values()))
                if now_s - first.kept_s < self._limits.max_age_s:
                    break
                self._drop_first(owner)

    def _drop_first(self, owner: str) -> None:
        self._drop(owner, next(iter(self._shelves[owner].entries)))

    def _drop(self, owner: str, response_id: str) -> None:
        shelf = self._shelves[owner]
        _release(shelf, shelf.entries.pop(response_id).stored)
        if not shelf.entries:
            del self._shelves[owner]


def _hold(shelf: _Shelf, stored: StoredResponse | None) -> None:
    while stored is not None:
        stored.num_holders += 1
        if stored.num_holders > 1:
            return
        shelf.num_bytes += stored.num_bytes
        stored = stored.previous


def _release(shelf: _Shelf, stored: StoredResponse | None) -> None:
    while stored is not None:
        stored.num_holders -= 1
        if stored.num_holders > 0:
            return
        shelf.num_bytes -= stored.num_bytes
        stored = stored.previous
