"""The prefill worker: computes a prompt's KV, samples the first token, publishes the blocks under a lease.

Steps 4 and 5 of the read path (docs/ARCHITECTURE.md). No Ray here; engine.actor is the shell.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from engine.scheduling.plan import (
    AskRemote,
    BlocksReleased,
    EmitTokens,
    Instruction,
    OfferBlocks,
    PullBlocks,
    RunStep,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
)
from engine.worker import EngineWorker, WorkerOptions
from kvcache.leases import Asked, Failed, LeaseBook, LeaseEvent, PeerLost, Published, Released, Renewed, TimePassed
from kvcache.names import unpack_tokens
from messages.errors import InvariantError, KvrayError
from messages.fleet import RoadStatus, Role, WorkerInfo
from messages.handoff import KvHandoff, PrefillFailed, PrefillRequest, ReleaseLease, RenewLease
from messages.wire import Message
from transport.plasma.road import Vaults

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.05


@dataclass(slots=True)
class _Job:
    """A prompt that a decode worker asked for; how long it is held `kvcache.leases` decides."""

    num_held_tokens: int
    offer: OfferBlocks | None = None  #: the last one, until its first token comes


class PrefillWorker:
    """Runs prompts for decode workers. All methods belong to one event loop."""

    role: ClassVar[Role] = "prefill"

    def __init__(
        self,
        worker_id: str,
        host: str,
        options: WorkerOptions,
        on_crash: Callable[[BaseException], None],
        vaults: Vaults | None = None,
    ) -> None:
        """Loads the model; blocks. Arguments as EngineWorker's.

        Raises:
            ConfigError: as EngineWorker.
        """
        self._worker = EngineWorker(self.role, worker_id, host, options, on_crash, vaults)
        self._leases = LeaseBook(options.lease_s)
        self._jobs: dict[str, _Job] = {}
        self._num_prompts = 0
        self._num_published_blocks = 0

    async def start(self) -> WorkerInfo:
        """Listen; the answer goes to the fleet."""
        info = await self._worker.start(self)
        self._worker.spawn(self._expire_forever())
        return info

    async def drain(self) -> None:
        """Return when nothing is under way any more; whoever places has stopped sending by then."""
        while self._jobs:  # noqa: ASYNC110 - once in a life; an event would have to be kept true by every path
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """Stop and let go of everything."""
        await self._worker.close()

    # ---------------------------------------------------------------------------------------------------- WorkerRole

    def on_message(self, peer: bytes, message: Message) -> None:
        """Requests and leases of decode workers."""
        match message:
            case PrefillRequest():
                self._accept(peer, message)
            case RenewLease(request_id=request_id):
                self._decide(Renewed(request_id, peer))
            case ReleaseLease(request_id=request_id):
                self._decide(Released(request_id, peer))
            case _:
                logger.warning("prefill %s: unexpected %s", self._worker.worker_id, type(message).__name__)

    def on_peer_lost(self, peer: bytes) -> None:
        """The asker is gone: nobody will pull."""
        self._decide(PeerLost(peer))

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        """Publish what became readable."""
        for instruction in instructions:
            match instruction:
                case OfferBlocks():
                    self._offer(instruction)
                case EmitTokens():
                    self._finish(instruction)
                case AskRemote() | PullBlocks() | RunStep():
                    raise InvariantError(f"a prefill worker's sequences are local, saw {instruction}")

    def stats(self) -> dict[str, float]:
        """Prefill's own numbers."""
        return {
            "kvray_prefill_prompts_total": float(self._num_prompts),
            "kvray_leases": float(self._leases.num_leased),
            "kvray_leases_expired_total": float(self._leases.num_expired),
            "kvray_blocks_published_total": float(self._num_published_blocks),
        }

    def roads(self) -> tuple[RoadStatus, ...]:
        """It pulls nothing."""
        return ()

    # ------------------------------------------------------------------------------------------------------- the jobs

    def _accept(self, peer: bytes, message: PrefillRequest) -> None:
        request = message.request
        self._decide(Asked(request.request_id, peer))
        self._num_prompts += 1
        self._jobs[request.request_id] = _Job(num_held_tokens=message.num_held_tokens)
        now_s = time.monotonic()
        spec = SequenceSpec(
            seq_id=request.request_id,
            token_ids=unpack_tokens(request.token_ids)[: request.num_prompt_tokens],
            num_prompt_tokens=request.num_prompt_tokens,
            params=request.params,
            salt=request.salt,
            priority=request.priority,
            deadline_s=None if request.deadline_s is None else now_s + request.deadline_s,
            is_kept=True,
        )
        self._worker.post(SequenceAdded(spec))

    def _offer(self, offer: OfferBlocks) -> None:
        """Read path step 5. The last offer waits for the first token, which follows at once."""
        job = self._jobs.get(offer.seq_id)
        if job is None:
            return
        if offer.is_last:
            job.offer = offer
        else:
            self._publish(job, offer, None)

    def _finish(self, emitted: EmitTokens) -> None:
        job = self._jobs.get(emitted.seq_id)
        if job is None:
            return
        if emitted.error is not None or not emitted.token_ids or job.offer is None:
            error = emitted.error or KvrayError(f"prefill ended with {emitted.finish_reason} and no token")
            del self._jobs[emitted.seq_id]
            peer = self._leases.peer_of(emitted.seq_id)
            self._decide(Failed(emitted.seq_id))
            if peer is not None:
                self._worker.send(peer, PrefillFailed(request_id=emitted.seq_id, error=error.info()))
            return
        self._publish(job, job.offer, emitted)
        job.offer = None

    def _publish(self, job: _Job, offer: OfferBlocks, emitted: EmitTokens | None) -> None:
        peer = self._leases.peer_of(offer.seq_id)
        if peer is None:
            return
        engine = self._worker.engine
        first_block = job.num_held_tokens // engine.options.block_size
        blocks = [block for block in offer.blocks if block.index >= first_block]
        checksums = engine.checksums.published([block.block_id for block in blocks])
        self._num_published_blocks += len(blocks)
        if emitted is not None:
            self._decide(Published(offer.seq_id))
        self._worker.send(
            peer,
            KvHandoff(
                request_id=offer.seq_id,
                lease_s=self._leases.lease_s,
                blocks=[
                    msgspec.structs.replace(block, checksum=checksum)
                    for block, checksum in zip(blocks, checksums, strict=True)
                ],
                is_last=emitted is not None,
                first_token=None if emitted is None else emitted.token_ids[0],
                first_logprob=emitted.logprobs[0] if emitted is not None and emitted.logprobs else None,
                num_cached_tokens=offer.num_cached_tokens,
            ),
        )

    def _decide(self, event: LeaseEvent) -> None:
        """Tell the book, and free what it says."""
        for freed in self._leases.on_event(event, time.monotonic()):
            if freed.is_expired:
                logger.warning("lease of %s ended after %.1f s without a word", freed.request_id, self._leases.lease_s)
            self._jobs.pop(freed.request_id, None)
            self._worker.post(SequenceCancelled(freed.request_id))
            self._worker.post(BlocksReleased(freed.request_id))

    async def _expire_forever(self) -> None:
        """A lease that ends frees the blocks even when nobody says anything."""
        while True:
            await asyncio.sleep(min(0.2, self._leases.lease_s / 4))
            self._decide(TimePassed())
