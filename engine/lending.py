"""Blocks of this worker's pool for whoever asks for them by name: offered at once, pinned under a lease.

The scheduler pins (`BlocksWanted`, `LendBlocks`, `BlocksReleased`), `kvcache.leases` decides for how long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.scheduling.plan import BlocksReleased, BlocksWanted, Event, LendBlocks
from kvcache.leases import Asked, AskerLost, Failed, LeaseBook, LeaseEvent, Published, Released, Renewed, TimePassed
from kvcache.locations import MAX_INDEX, num_locations, with_checksums
from kvcache.names import split_names
from messages.handoff import BlocksRequest, KvHandoff, ReleaseLease, RenewLease
from messages.wire import Message


class Lender:
    """Answers BlocksRequests. All methods belong to the scheduler's event loop."""

    def __init__(
        self,
        lease_s: float,
        post: Callable[[Event], None],
        send: Callable[[bytes, Message], object],
        checksums: Callable[[npt.NDArray[np.uint32]], npt.NDArray[np.uint64]],
    ) -> None:
        """Lend for `lease_s` seconds. `post` is the scheduler's, `checksums` gives those of blocks by their ids."""
        self.leases = LeaseBook(lease_s)
        self._post = post
        self._send = send
        self._checksums = checksums
        self._questions: dict[str, tuple[bytes, BlocksRequest]] = {}  # asker and question, by lease
        self.num_lent_blocks = 0

    def take(self, sender: bytes, message: BlocksRequest | RenewLease | ReleaseLease) -> bool:
        """Take in a question, or a word about a lease; False where it is none of ours."""
        lease_id = f"{sender.hex()}/{message.request_id}"
        if isinstance(message, BlocksRequest):
            self._decide(Asked(lease_id, sender))
            self._questions[lease_id] = (sender, message)
            names = tuple(split_names(message.names))
            first_index = min(max(message.first_index, 0), MAX_INDEX - len(names))  # as rows have room for
            self._post(BlocksWanted(lease_id, first_index, names))
            return True
        is_ours = lease_id in self._questions
        if is_ours:
            is_renewed = isinstance(message, RenewLease)
            self._decide(Renewed(lease_id, sender) if is_renewed else Released(lease_id, sender))
        return is_ours

    def lend(self, lent: LendBlocks) -> None:
        """Offer what the scheduler pinned; the lease begins."""
        asker, question = self._questions[lent.lease_id]
        if lent.blocks:
            self._decide(Published(lent.lease_id))
        else:
            self._decide(Failed(lent.lease_id))
            del self._questions[lent.lease_id]
        self.num_lent_blocks += num_locations(lent.blocks)
        blocks = with_checksums(lent.blocks, self._checksums)
        lease_s = self.leases.lease_s
        self._send(asker, KvHandoff(request_id=question.request_id, lease_s=lease_s, blocks=blocks))

    def lose(self, sender: bytes) -> None:
        """Free what was lent to an asker that is gone."""
        self._decide(AskerLost(sender))

    def pass_time(self) -> None:
        """Free what was lent under leases that ended by now."""
        self._decide(TimePassed())

    def _decide(self, event: LeaseEvent) -> None:
        for freed in self.leases.on_event(event, time.monotonic()):
            self._questions.pop(freed.request_id, None)
            self._post(BlocksReleased(freed.request_id))
