"""Who is told what an owner of blocks holds: a snapshot first, then what changed, numbered for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from messages.fleet import KvEvents
from messages.tier import Tier


class Subscribers:
    """The subscribers of one owner, each known by its channel's id. `send(subscriber, message)` queues a message."""

    def __init__(self, worker_id: str, send: Callable[[bytes, KvEvents], object]) -> None:
        self._worker_id = worker_id
        self._send = send
        self._next_seq: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(tuple(self._next_seq))

    def add(self, subscriber: bytes, snapshot: Sequence[tuple[Tier, bytes]]) -> None:
        """Tell all names held, concatenated by tier, to one who subscribes, anew perhaps."""
        for seq, (tier, names) in enumerate(snapshot):
            self._tell(subscriber, seq, tier, names, b"", is_first=seq == 0)
        self._next_seq[subscriber] = len(snapshot)

    def remove(self, subscriber: bytes) -> None:
        """Forget one who is gone."""
        self._next_seq.pop(subscriber, None)

    def tell(self, tier: Tier, stored: bytes, removed: bytes) -> None:
        """Tell all of them what changed in a tier: names, concatenated. Write path step b."""
        for subscriber, seq in self._next_seq.items():
            self._next_seq[subscriber] = seq + 1
            self._tell(subscriber, seq, tier, stored, removed)

    def _tell(
        self, subscriber: bytes, seq: int, tier: Tier, stored: bytes, removed: bytes, *, is_first: bool = False
    ) -> None:
        events = KvEvents(
            worker_id=self._worker_id, seq=seq, tier=tier, cleared=is_first, stored=stored, removed=removed
        )
        self._send(subscriber, events)
