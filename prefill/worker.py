"""The prefill worker: computes a prompt's KV, samples the first token, publishes the blocks under a lease.

Steps 4 and 5 of the read path (docs/ARCHITECTURE.md): `prefill.publications` decides, this carries it out. No Ray here;
engine.actor is the shell.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, assert_never

import msgspec

from engine.scheduling.plan import BlocksReleased, EmitTokens, OfferBlocks, SequenceAdded, SequenceCancelled
from engine.worker import EngineWorker, FindCache, RoleInstruction, WorkerOptions
from kvcache.leases import AskerLost, FreeBlocks, Released, Renewed, TimePassed
from kvcache.locations import with_checksums
from messages.errors import InvariantError
from messages.fleet import Role, WorkerInfo
from messages.handoff import KvHandoff, PrefillRequest, ReleaseLease, RenewLease
from messages.scaling import WorkerScaling
from messages.wire import Message
from prefill.publications import (
    BeginPrompt,
    BlocksFreed,
    PromptAsked,
    PublicationBook,
    PublicationEvent,
    Publish,
    TellFailed,
)
from transport.plasma.road import Vaults
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.05


class PrefillWorker:
    """Runs prompts for decode workers. All methods belong to one event loop."""

    role: ClassVar[Role] = "prefill"

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
        self._book = PublicationBook(options.lease_s, self._worker.engine.options.block_size)

    async def start(self) -> WorkerInfo:
        """Listen and step, on the running loop; the answer is what the rest of the fleet needs to know."""
        info = await self._worker.start(self)
        self._worker.spawn(self._expire_forever())
        return info

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
        """Take in a decode worker's question, or its word about a lease; other messages are logged and dropped."""
        match message:
            case PrefillRequest():
                self._decide(PromptAsked(sender, message))
            case RenewLease(request_id=request_id):
                self._decide(Renewed(request_id, sender))
            case ReleaseLease(request_id=request_id):
                self._decide(Released(request_id, sender))
            case _:
                logger.warning("prefill %s: unexpected %s", self._worker.worker_id, type(message).__name__)

    def on_sender_lost(self, sender: bytes) -> None:
        """Free what is made or held for an asker that is gone: nobody will pull it."""
        self._decide(AskerLost(sender))

    def on_instructions(self, instructions: Sequence[RoleInstruction]) -> None:
        """Take in which blocks became readable and which prompts ended or failed, and tell their askers."""
        for instruction in instructions:
            if not isinstance(instruction, OfferBlocks | EmitTokens):
                raise InvariantError(f"not a prefill worker's instruction: {instruction}")
            self._decide(instruction)

    def stats(self) -> dict[str, float]:
        """Return prefill's own numbers, by metric name."""
        return {
            "kvray_prefill_prompts_total": float(self._book.num_asked),
            "kvray_leases": float(self._book.leases.num_leased),
            "kvray_leases_expired_total": float(self._book.leases.num_expired),
            "kvray_blocks_published_total": float(self._book.num_published_blocks),
        }

    # ---------------------------------------------------------------------------------------------------------- doing

    def _decide(self, event: PublicationEvent) -> None:
        """Tell the book, and do what it says."""
        for instruction in self._book.on_event(event, time.monotonic()):
            match instruction:
                case BeginPrompt(spec):
                    self._worker.post(SequenceAdded(spec))
                case FreeBlocks(request_id, is_expired):
                    if is_expired:
                        logger.warning("the lease of %s ended by itself: nobody renewed or released it", request_id)
                    self._worker.post(SequenceCancelled(request_id))
                    self._worker.post(BlocksReleased(request_id))
                    self._decide(BlocksFreed(request_id))
                case Publish(asker, handoff):
                    self._publish(asker, handoff)
                case TellFailed(asker, message):
                    self._worker.send(asker, message)
                case _ as unreachable:
                    assert_never(unreachable)

    def _publish(self, asker: bytes, handoff: KvHandoff) -> None:
        blocks = with_checksums(handoff.blocks, self._worker.engine.checksums.published)
        self._worker.send(asker, msgspec.structs.replace(handoff, blocks=blocks))

    async def _expire_forever(self) -> None:
        """Look for ended leases time and again: one that ends frees its blocks even when nobody says anything."""
        while True:
            await asyncio.sleep(min(0.2, self._book.leases.lease_s / 4))
            self._decide(TimePassed())
