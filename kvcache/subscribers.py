"""Who is told what an owner of blocks holds: a snapshot first, then what changed, numbered for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvcache.names import NAME_BYTES
from messages.fleet import KvEvents
from messages.tier import Tier

#: Of names, at once: 1,024 of them, which a receiver takes in within half a millisecond or so.
_PIECE_BYTES = 1024 * NAME_BYTES
#: Pieces of one answer at most, larger ones if need be: they are queued at once, and a channel that has 10,000 messages
#: waiting for one peer gives it up.
_MAX_PIECES = 4096


class Subscribers:
    """The subscribers of one owner, each known by its channel's id. `send(subscriber, message)` queues a message."""

    def __init__(self, worker_id: str, send: Callable[[bytes, KvEvents], object]) -> None:
        self._worker_id = worker_id
        self._send = send
        self._next_seq: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(tuple(self._next_seq))

    def add(self, subscriber: bytes, snapshot: Sequence[tuple[Tier, bytes]]) -> None:
        """Tell all names held, concatenated by tier, to one who subscribes, anew perhaps: in pieces."""
        piece_bytes = _piece_bytes(sum(len(names) for _, names in snapshot))
        pieces = [
            (tier, names[begin : begin + piece_bytes])
            for tier, names in snapshot
            for begin in range(0, max(1, len(names)), piece_bytes)
        ]
        for seq, (tier, names) in enumerate(pieces):
            self._send(
                subscriber,
                KvEvents(
                    worker_id=self._worker_id,
                    seq=seq,
                    tier=tier,
                    cleared=seq == 0,
                    num_pieces_left=len(pieces) - 1 - seq,
                    stored=names,
                ),
            )
        self._next_seq[subscriber] = len(pieces)

    def remove(self, subscriber: bytes) -> None:
        """Forget one who is gone."""
        self._next_seq.pop(subscriber, None)

    def tell(self, tier: Tier, stored: bytes, removed: bytes) -> None:
        """Tell all of them what changed in a tier: names, concatenated, none of them in both. Write path step b."""
        num_bytes = max(len(stored), len(removed))
        piece_bytes = _piece_bytes(num_bytes)
        for begin in range(0, num_bytes, piece_bytes):
            piece = slice(begin, begin + piece_bytes)
            for subscriber, seq in self._next_seq.items():
                self._next_seq[subscriber] = seq + 1
                events = KvEvents(
                    worker_id=self._worker_id, seq=seq, tier=tier, stored=stored[piece], removed=removed[piece]
                )
                self._send(subscriber, events)


def _piece_bytes(num_bytes: int) -> int:
    return max(_PIECE_BYTES, -(-num_bytes // (_MAX_PIECES * NAME_BYTES)) * NAME_BYTES)
