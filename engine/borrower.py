"""Borrows blocks from other owners: asks them, pulls what they offer, renews and releases. `engine.loans` decides.

Steps 4 and 6 of the read path (docs/ARCHITECTURE.md), from the asker's side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, assert_never

from engine.crashing import Crash
from engine.loans import (
    AskOwner,
    BeginPull,
    Found,
    HandedOff,
    LearnHandoff,
    LoanBook,
    LoanEvent,
    OwnerLost,
    PullProgressed,
    PullStopped,
    Refused,
    SchedulerTold,
    TellOwner,
    TellScheduler,
)
from engine.offload import Offloader
from engine.peers import Peers
from engine.puller import BlockPuller, PullOutcome
from engine.scheduling.plan import Event, PullBlocks
from messages.handoff import BlocksFound, KvHandoff, PrefillFailed, RoomGranted
from messages.price import MovePrice
from messages.request import Copy
from messages.wire import Message
from transport.channel import ChannelConfig
from transport.roads import Roads
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)


class Borrower:
    """The loans of one worker, and the peers that they come from. All methods belong to one event loop.

    `post` is the scheduler's; what follows from an event comes back before it returns. `spawn` runs a coroutine for as
    long as the worker lives.
    """

    def __init__(
        self,
        puller: BlockPuller,
        roads: Roads,
        secret: ClusterSecret,
        channel: ChannelConfig,
        lease_s: float,
        post: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        crash: Crash,
    ) -> None:
        self.peers = Peers(
            puller, roads, secret, channel, self._on_message, self._on_lost, crash, lambda _: self.offloader.go_on()
        )
        self.offloader = Offloader(self.peers, puller.memory, puller.checksums, post, spawn)
        self.on_lost: Callable[[str], None] = lambda _: None  #: told of each owner that is gone
        self._book = LoanBook()
        self._progress_s = lease_s / 4  #: between two looks at a pull
        self._post = post
        self._spawn = spawn

    def can_pull(self, address: str) -> bool:
        """Tell whether blocks can come from the owner at `address`, as far as is known."""
        return self.peers.can_pull(address) and not self._book.is_avoided(address, time.monotonic())

    def price_of(self, copy: Copy) -> MovePrice | None:
        """Return what bringing blocks from a copy costs, as far as is known; None where they cannot come from there."""
        return self.peers.price_of(copy) if self.can_pull(copy.address) else None

    def stats(self) -> dict[str, float]:
        """Return what became of loans and pulls, by metric name."""
        return {
            "kvray_pulls_running": float(self._book.num_pulls),
            "kvray_prefill_refused_total": float(self._book.num_refused),
            **self.peers.stats(),
        }

    def decide(self, event: LoanEvent) -> None:
        """Tell the book of loans, and do what it says."""
        for instruction in self._book.on_event(event, time.monotonic()):
            match instruction:
                case TellScheduler(seq_id, told):
                    self._post(told)
                    self.decide(SchedulerTold(seq_id))
                case AskOwner(source, message):
                    self.peers.connect(source)
                    self.peers.send(source, message)
                case TellOwner(source, message):
                    self.peers.send(source, message)
                case BeginPull(pull):
                    self._spawn(self._pull(pull))
                case LearnHandoff():
                    self.peers.observe_handoff(instruction)
                case _ as unreachable:
                    assert_never(unreachable)

    def _on_message(self, address: str, message: Message) -> None:
        match message:
            case KvHandoff():
                self.decide(HandedOff(address, message))
            case BlocksFound():
                self.decide(Found(address, message))
            case RoomGranted():
                self.offloader.on_granted(message)
            case PrefillFailed(request_id=request_id, error=error):
                logger.warning("the owner at %s refused %s: %s", address, request_id, error.message)
                self.decide(Refused(address, request_id))
            case _:
                logger.warning("unexpected %s from the owner at %s", type(message).__name__, address)

    def _on_lost(self, address: str) -> None:
        self.decide(OwnerLost(address))
        self.on_lost(address)

    async def _pull(self, pull: PullBlocks) -> None:
        """Carry out a pull, report its progress, and tell the book how it ended: read path step 6."""
        num_arrived = 0

        def progress() -> None:
            nonlocal num_arrived
            num_arrived += 1

        async def watch() -> None:
            while True:
                await asyncio.sleep(self._progress_s)
                self.decide(PullProgressed(pull.seq_id, num_arrived))

        outcome: PullOutcome | None = None
        watching = self._spawn(watch())
        try:
            outcome = await self.peers.pull(pull.source, pull.blocks, pull.targets, progress)
        finally:
            watching.cancel()
            outcome = outcome or PullOutcome.nothing(pull.blocks)
            self.decide(PullStopped(pull.seq_id, outcome.bad, outcome.quarantine_s, outcome.damaged))
