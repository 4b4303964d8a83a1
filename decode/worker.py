"""The decode worker: takes requests, gets the prompt's KV from a prefill worker or computes it, streams tokens.

Steps 3, 4, 7 and 8 of the read path (docs/ARCHITECTURE.md): `decode.streams` decides, this carries it out. No Ray
here; engine.actor is the shell.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, assert_never

from decode.streams import (
    Accepted,
    AskPrefill,
    BeginSequence,
    Cancelled,
    CancelSequence,
    IngressLost,
    Reply,
    Requested,
    StreamBook,
    StreamEvent,
)
from engine.loans import PromptWanted
from engine.scheduling.plan import AskRemote, EmitTokens, SequenceAdded, SequenceCancelled, SequenceSpec
from engine.worker import EngineWorker, FindCache, RoleInstruction, WorkerOptions
from messages.errors import InvariantError, RequestError
from messages.fleet import Role, WorkerInfo
from messages.handoff import ReleaseLease, RenewLease
from messages.request import CancelRequest, GenerateRequest
from messages.scaling import WorkerScaling
from messages.stream import TokenBatch, TokenChunk
from messages.wire import Message
from transport.plasma.road import Vaults
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.05
_TURN_S = 0.005  #: for which sequences begin or end in one turn of the loop: long ones take some milliseconds each


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
        find_cache: FindCache | None = None,
    ) -> None:
        """Load the model; this blocks for as long as that takes. Arguments as `EngineWorker`'s.

        Raises:
            ConfigError: the model or the memory will not do.
        """
        self._worker = EngineWorker(self.role, worker_id, host, options, secret, on_crash, vaults, find_cache)
        self._book = StreamBook()
        self._todo: deque[BeginSequence | CancelSequence] = deque()
        self._is_doing = False  #: somebody goes through `_todo`: in this turn of the loop, or a task

    async def start(self) -> WorkerInfo:
        """Listen and step, on the running loop; the answer is what the rest of the fleet needs to know."""
        return await self._worker.start(self)

    async def drain(self) -> None:
        """Wait until nothing is under way, and the node cache has what it wants; nobody sends requests by then."""
        while self._book.num_open:  # noqa: ASYNC110 - once in a life; an event would have to be kept true by every path
            await asyncio.sleep(_DRAIN_POLL_S)
        await self._worker.borrower.offloader.finish()

    def scaling(self) -> WorkerScaling:
        """Return what whoever scales the fleet wants to know."""
        return self._worker.scaling()

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
                self._decide(
                    Requested(sender, message, address is not None and self._worker.borrower.can_pull(address))
                )
            case CancelRequest(request_id=request_id):
                self._decide(Cancelled(request_id))
            case RenewLease() | ReleaseLease():
                pass  # of a lease that ended meanwhile
            case _:
                logger.warning("decode %s: unexpected %s", self._worker.worker_id, type(message).__name__)

    def on_sender_lost(self, sender: bytes) -> None:
        """Cancel the requests of an ingress that is gone: nobody reads the answers."""
        self._decide(IngressLost(sender))

    def on_instructions(self, instructions: Sequence[RoleInstruction]) -> None:
        """Take what the scheduler wants done to the book, and carry out what follows."""
        wanted: list[StreamEvent] = []
        for instruction in instructions:
            if not isinstance(instruction, EmitTokens | AskRemote):
                raise InvariantError(f"not a decode worker's instruction: {instruction}")
            wanted.append(instruction)
        self._decide(*wanted)

    def stats(self) -> dict[str, float]:
        """Return decode's own numbers, by metric name."""
        return {"kvray_streams": float(self._book.num_open)}

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
                    case BeginSequence() | CancelSequence():
                        self._todo.append(instruction)
                    case AskPrefill(source, message):
                        self._worker.borrower.decide(PromptWanted(source, message))
                    case _ as unreachable:
                        assert_never(unreachable)
        for ingress, chunks in replies.items():
            self._worker.send(ingress, TokenBatch(chunks=chunks))
        if self._todo and not self._is_doing:  # what beginning one of them leads to comes here again
            self._is_doing = True
            self._do_some()
            self._is_doing = bool(self._todo)
            if self._todo:
                self._worker.spawn(self._do_the_rest())

    def _do_some(self) -> None:
        """Begin and cancel sequences for a while, in order: many choices may come, or many requests end, at once."""
        end_s = time.monotonic() + _TURN_S
        while self._todo:
            match self._todo.popleft():
                case BeginSequence(spec):
                    if self._book.has(spec.seq_id):
                        self._begin(spec)
                case CancelSequence(request_id):
                    self._worker.post(SequenceCancelled(request_id))
            if time.monotonic() >= end_s:
                return

    async def _do_the_rest(self) -> None:
        while self._todo:
            await asyncio.sleep(0)
            self._do_some()
        self._is_doing = False

    def _begin(self, spec: SequenceSpec) -> None:
        try:
            self._worker.post(SequenceAdded(spec))  # what follows comes to `on_instructions` before this returns
        except RequestError as error:
            self._decide(EmitTokens(spec.seq_id, finish_reason="error", error=error))
        else:
            self._decide(Accepted(spec.seq_id))  # unless it has ended
