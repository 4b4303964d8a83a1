"""Where each worker's stream of KvEvents stands, and whom to ask for a snapshot. Pure.

to ask --few at a time--> asked --first piece--> arriving --last piece--> in step --gap--> to ask
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from messages.fleet import KvEvents

#: Snapshots that may be under way at once: each may hold the loop for one turn of its channel in a row.
_MAX_UNDER_WAY = 2
#: Who has sent nothing for so long does not count as under way: others are asked meanwhile.
_QUIET_S = 1.0


@dataclass(slots=True)
class _Feed:
    next_seq: int | None = None  #: of the next event; None: nothing but the first piece of a snapshot is taken
    heard_s: float | None = None  #: when a snapshot was asked for, or its last piece came; None: none is under way
    is_put_off: bool = False  #: nothing is taken before the next snapshot is asked for


class Feeds:
    """The feeds of the workers that are there. `timeout_s`: silence after which a snapshot is asked for again."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._feeds: dict[str, _Feed] = {}
        self._to_ask: dict[str, None] = {}
        self._under_way: dict[str, None] = {}

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._feeds

    def __iter__(self) -> Iterator[str]:
        return iter(self._feeds)

    @property
    def num_out_of_step(self) -> int:
        """How many workers are to be asked for a snapshot, or have not sent all of it."""
        return len(self._to_ask) + len(self._under_way)

    def is_in_step(self, worker_id: str) -> bool:
        """Tell whether what a worker says is taken as it comes."""
        return worker_id in self._feeds and worker_id not in self._to_ask and worker_id not in self._under_way

    def begin(self, worker_id: str) -> None:
        """Take in that a worker joined, or that its events cannot be used: a snapshot is wanted. See `to_ask`."""
        self.forget(worker_id)
        self._feeds[worker_id] = _Feed()
        self._to_ask[worker_id] = None

    def put_off(self, worker_id: str, now_s: float) -> None:
        """Take in that there is no room for what a worker has: a snapshot is wanted, after a while."""
        self.forget(worker_id)
        self._feeds[worker_id] = _Feed(heard_s=now_s, is_put_off=True)
        self._under_way[worker_id] = None

    def forget(self, worker_id: str) -> None:
        """Take in that a worker left; unknown ids are ignored."""
        self._feeds.pop(worker_id, None)
        self._to_ask.pop(worker_id, None)
        self._under_way.pop(worker_id, None)

    def take(self, event: KvEvents, now_s: float) -> Literal["fold", "ignore", "gap"]:
        """Tell what to do with an event; after a gap a snapshot is wanted."""
        feed = self._feeds.get(event.worker_id)
        is_first = event.seq == 0 and event.cleared
        is_awaited = is_first and event.worker_id in self._under_way and feed is not None and not feed.is_put_off
        if feed is None or (feed.next_seq is None and not is_awaited):
            return "ignore"  # nobody's, or of the numbering before
        if not is_first and event.seq != feed.next_seq:
            self.begin(event.worker_id)
            return "gap"
        feed.next_seq = event.seq + 1
        if event.num_pieces_left:
            feed.heard_s = now_s
            self._under_way[event.worker_id] = None
        else:
            feed.heard_s = None
            self._under_way.pop(event.worker_id, None)
        return "fold"

    def to_ask(self, now_s: float) -> list[str]:
        """Return whom to ask for a snapshot now: those that should be for the first time, and whose never came."""
        asked: list[str] = []
        num_under_way = 0
        for worker_id in self._under_way:
            feed = self._feeds[worker_id]
            quiet_s = now_s - (feed.heard_s or 0.0)
            num_under_way += quiet_s <= _QUIET_S
            if quiet_s > self._timeout_s:
                asked.append(worker_id)
        while self._to_ask and num_under_way < _MAX_UNDER_WAY:
            asked.append(next(iter(self._to_ask)))
            del self._to_ask[asked[-1]]
            num_under_way += 1
        for worker_id in asked:
            self._feeds[worker_id] = _Feed(heard_s=now_s)
            self._under_way[worker_id] = None
        return asked
