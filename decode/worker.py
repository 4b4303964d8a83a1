"""The decode worker: takes requests, gets the prompt's KV from a prefill worker or computes it, streams tokens.

Steps 3, 4, 6, 7 and 8 of the read path (docs/ARCHITECTURE.md): `decode.streams` decides, this carries it out. No Ray
here; engine.actor is the shell.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, assert_never

from decode.streams import (
    AskOwner,
    BeginPull,
    Cancelled,
    HandedOff,
    IngressLost,
    LearnHandoff,
    OwnerLost,
    PullProgressed,
    PullStopped,
    Refused,
    Reply,
    Requested,
    SchedulerTold,
    StreamBook,
    StreamEvent,
    TellOwner,
    TellScheduler,
)
from engine.puller import PullOutcome
from engine.scheduling.plan import (
    AskRemote,
    CompileGrammar,
    EmitTokens,
    Event,
    Instruction,
    OfferBlocks,
    PullBlocks,
    RunStep,
    StopRemote,
)
from engine.worker import EngineWorker, WorkerOptions
from messages.errors import InvariantError, RequestError
from messages.fleet import Role, WorkerInfo
from messages.handoff import KvHandoff, PrefillFailed
from messages.request import CancelRequest, GenerateRequest
from messages.stream import TokenBatch, TokenChunk
from messages.wire import Message
from transport.plasma.road import Vaults
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.05


class DecodeWorker:
    """Answers requests. All methods belong to one event loop."""

    role: ClassVar[Role] = "decode"

    def __init__(
        self,
        worker_id: str,
        host: str,
        options: WorkerOptions,
        secret: ClusterSecret,
        on_crash: Callable[[BaseException], None],
        vaults: Vaults | None = None,
    ) -> None:
        """Load the model; this blocks for as long as that takes. Arguments as `EngineWorker`'s.

        Raises:
            ConfigError: the model or the memory will not do.
        """
        self._worker = EngineWorker(self.role, worker_id, host, options, secret, on_crash, vaults)
        self._peers = self._worker.open_peers(self._on_peer_message, self._on_peer_lost)
        self._book = StreamBook()
        self._progress_s = options.lease_s / 4  #: between two looks at a pull

    async def start(self) -> WorkerInfo:
        """Listen and step, on the running loop; the answer is what the rest of the fleet needs to know."""
        return await self._worker.start(self)

    async def drain(self) -> None:
        """Wait until nothing is under way any more; whoever places requests has stopped sending by then."""
        while self._book.num_open:  # noqa: ASYNC110 - once in a life; an event would have to be kept true by every path
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """Stop, hang up, and give memory back."""
        await self._worker.close()

    # ---------------------------------------------------------------------------------------------------- WorkerRole

    def on_message(self, sender: bytes, message: Message) -> None:
        """Take in a request of an ingress, or its cancellation; other messages are logged and dropped."""
        match message:
            case GenerateRequest(request_id=request_id, prefill_address=address):
                if self._book.has(request_id):
                    logger.warning("request %s came twice", request_id)
                self._decide(Requested(sender, message, address is not None and self._peers.can_pull(address)))
            case CancelRequest(request_id=request_id):
                self._decide(Cancelled(request_id))
            case _:
                logger.warning("decode %s: unexpected %s", self._worker.worker_id, type(message).__name__)

    def on_sender_lost(self, sender: bytes) -> None:
        """Cancel the requests of an ingress that is gone: nobody reads the answers."""
        self._decide(IngressLost(sender))

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        """Take what the scheduler wants done to the book, and carry out what follows."""
        wanted: list[StreamEvent] = []
        for instruction in instructions:
            match instruction:
                case EmitTokens() | AskRemote() | StopRemote() | PullBlocks():
                    wanted.append(instruction)
                case OfferBlocks() | RunStep() | CompileGrammar():
                    raise InvariantError(f"not a decode worker's instruction: {instruction}")
                case _ as unreachable:
                    assert_never(unreachable)
        self._decide(*wanted)

    def stats(self) -> dict[str, float]:
        """Return decode's own numbers, by metric name."""
        return {
            "kvray_streams": float(self._book.num_open),
            "kvray_pulls_running": float(self._book.num_pulls),
            "kvray_prefill_refused_total": float(self._book.num_refused),
        }

    # ---------------------------------------------------------------------------------------------------------- peers

    def _on_peer_message(self, address: str, message: Message) -> None:
        match message:
            case KvHandoff():
                self._decide(HandedOff(address, message))
            case PrefillFailed(request_id=request_id, error=error):
                logger.warning("prefill at %s refused %s: %s", address, request_id, error.message)
                self._decide(Refused(address, request_id))
            case _:
                logger.warning("unexpected %s from prefill at %s", type(message).__name__, address)

    def _on_peer_lost(self, address: str) -> None:
        self._decide(OwnerLost(address))

    async def _pull(self, pull: PullBlocks) -> None:
        """Carry out a pull, report its progress, and tell the book how it ended: read path step 6."""
        num_arrived = 0

        def progress() -> None:
            nonlocal num_arrived
            num_arrived += 1

        async def watch() -> None:
            while True:
                await asyncio.sleep(self._progress_s)
                self._decide(PullProgressed(pull.seq_id, num_arrived))

        outcome = PullOutcome(frozenset(location.index for location, _ in pull.pairs))
        watching = self._worker.spawn(watch())
        try:
            outcome = await self._peers.pull(pull.source, pull.pairs, progress)
        finally:
            watching.cancel()
            self._decide(PullStopped(pull.seq_id, outcome.bad, outcome.quarantine_s))

    # ---------------------------------------------------------------------------------------------------------- doing

    def _decide(self, *events: StreamEvent) -> None:
        """Tell the book, and do what it says; all replies to an ingress go in one message."""
        now_s = time.monotonic()
        replies: dict[bytes, list[TokenChunk]] = {}
        for event in events:
            for instruction in self._book.on_event(event, now_s):
                match instruction:
                    case Reply(ingress, chunk):
                        replies.setdefault(ingress, []).append(chunk)
                    case TellScheduler(request_id, told):
                        self._tell_scheduler(request_id, told)
                    case AskOwner(source, message):
                        self._peers.connect(source)
                        self._peers.send(source, message)
                    case TellOwner(source, message):
                        self._peers.send(source, message)
                    case BeginPull(pull):
                        self._worker.spawn(self._pull(pull))
                    case LearnHandoff(source, elapsed_s, source_s, num_blocks):
                        self._peers.observe_handoff(source, elapsed_s, source_s, num_blocks)
                    case _ as unreachable:
                        assert_never(unreachable)
        for ingress, chunks in replies.items():
            self._worker.send(ingress, TokenBatch(chunks=chunks))

    def _tell_scheduler(self, request_id: str, event: Event) -> None:
        try:
            self._worker.post(event)  # what follows comes to `on_instructions` before this returns
        except RequestError as error:
            self._decide(EmitTokens(request_id, finish_reason="error", error=error))
        self._decide(SchedulerTold(request_id))
