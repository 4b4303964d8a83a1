"""The decode worker: takes requests, gets the prompt's KV from a prefill worker or computes it, streams tokens.

Steps 3, 4, 6 and 7 of the read path (docs/ARCHITECTURE.md). No Ray here; engine.actor is the shell.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from decode.puller import REJECTIONS, BlockPuller, PeerPool, PullOutcome
from engine.scheduling.plan import (
    AskRemote,
    EmitTokens,
    Instruction,
    KvOffered,
    KvRefused,
    OfferBlocks,
    PullBlocks,
    PullEnded,
    RunStep,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
)
from engine.worker import EngineWorker, WorkerOptions
from kvcache.names import unpack_tokens
from messages.errors import InvariantError, KvrayError, RequestError
from messages.fleet import RoadStatus, Role, WorkerInfo
from messages.handoff import (
    DescribeRegions,
    KvHandoff,
    PrefillFailed,
    PrefillRequest,
    RegionsDescribed,
    ReleaseLease,
    RenewLease,
    RoadMessage,
)
from messages.request import CancelRequest, GenerateRequest
from messages.stream import TokenBatch, TokenChunk
from messages.wire import Message
from transport.channel import ChannelClient
from transport.plasma.road import Vaults
from transport.protocol import Link, RegionError
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.05

_AVOID_S = 1.0  #: how long an address is left alone after it was lost


@dataclass(slots=True)
class _Stream:
    """A request that this worker answers."""

    peer: bytes  #: the ingress
    request: GenerateRequest
    is_offered_whole: bool = False  #: the last handoff came
    num_pulls: int = 0  #: in progress
    num_arrived: int = 0  #: blocks; grows while pulls make progress
    is_leased: bool = False  #: a prefill worker works on it or holds blocks for it
    is_done: bool = False


@dataclass(slots=True)
class _Prefiller:
    """A prefill worker seen from here."""

    client: ChannelClient
    link: Link  #: what roads say to it
    pool: PeerPool | None = None  #: once it described it
    is_misfit: bool = False  #: its blocks cannot be pulled into ours
    asked: set[str] = field(default_factory=set)  #: requests that still may get something from it


class DecodeWorker:
    """Answers requests. All methods belong to one event loop."""

    role: ClassVar[Role] = "decode"

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
        self._options = options
        self._secret = ClusterSecret.from_hex(options.secret)
        self._puller = BlockPuller(self._worker.engine, self._worker.roads)
        self._streams: dict[str, _Stream] = {}
        self._prefillers: dict[str, _Prefiller] = {}
        self._avoided_until_s: dict[str, float] = {}
        self._num_refused = 0

    async def start(self) -> WorkerInfo:
        """Listen; the answer goes to the fleet."""
        return await self._worker.start(self)

    async def drain(self) -> None:
        """Return when nothing is under way any more; whoever places has stopped sending by then."""
        while self._streams:  # noqa: ASYNC110 - once in a life; an event would have to be kept true by every path
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """Stop and let go of everything."""
        for prefiller in self._prefillers.values():
            prefiller.client.close()
        await self._worker.close()

    # ---------------------------------------------------------------------------------------------------- WorkerRole

    def on_message(self, peer: bytes, message: Message) -> None:
        """Requests of an ingress."""
        match message:
            case GenerateRequest():
                self._accept(peer, message)
            case CancelRequest(request_id=request_id):
                self._cancel(request_id)
            case _:
                logger.warning("decode %s: unexpected %s", self._worker.worker_id, type(message).__name__)

    def on_peer_lost(self, peer: bytes) -> None:
        """The ingress is gone: nobody reads the answers."""
        for request_id in [key for key, stream in self._streams.items() if stream.peer == peer]:
            self._cancel(request_id)

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        """Carry out what the scheduler decided; one message per ingress."""
        batches: dict[bytes, list[TokenChunk]] = {}
        for instruction in instructions:
            match instruction:
                case EmitTokens():
                    self._emit(instruction, batches)
                case AskRemote():
                    self._ask(instruction)
                case PullBlocks():
                    stream = self._streams.get(instruction.seq_id)
                    if stream is not None:
                        stream.num_pulls += 1  # now: the lease must not end before the pull begins
                    self._worker.spawn(self._pull(instruction, stream))
                case OfferBlocks() | RunStep():
                    raise InvariantError(f"not a decode worker's instruction: {instruction}")
        for peer, chunks in batches.items():
            self._worker.send(peer, TokenBatch(chunks=chunks))

    def stats(self) -> dict[str, float]:
        """Decode's own numbers."""
        puller = self._puller
        rejected = {
            f'kvray_blocks_rejected_total{{reason="{reason}"}}': float(puller.num_rejected[reason])
            for reason in REJECTIONS
        }
        return {
            "kvray_streams": float(len(self._streams)),
            "kvray_pulls_running": float(sum(stream.num_pulls for stream in self._streams.values())),
            "kvray_pulls_failed_total": float(puller.num_failed),
            "kvray_prefill_refused_total": float(self._num_refused),
            **rejected,
        }

    def roads(self) -> tuple[RoadStatus, ...]:
        """The road from each prefill worker that it knows."""
        roads = self._worker.roads
        return tuple(roads.status(known.link, address) for address, known in self._prefillers.items())

    # ------------------------------------------------------------------------------------------------------- requests

    def _accept(self, peer: bytes, request: GenerateRequest) -> None:
        """Read path step 3."""
        if request.request_id in self._streams:
            logger.warning("request %s came twice", request.request_id)
            return
        now_s = time.monotonic()
        spec = SequenceSpec(
            seq_id=request.request_id,
            token_ids=unpack_tokens(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            params=request.params,
            salt=request.salt,
            priority=request.priority,
            deadline_s=None if request.deadline_s is None else now_s + request.deadline_s,
            is_remote=self._can_prefill_remotely(request, now_s),
        )
        self._streams[request.request_id] = _Stream(peer=peer, request=request)
        try:
            self._worker.post(SequenceAdded(spec))
        except RequestError as error:
            self._emit_error(request.request_id, error)

    def _can_prefill_remotely(self, request: GenerateRequest, now_s: float) -> bool:
        address = request.prefill_address
        return (
            address is not None
            and self._is_worth_asking(address)
            and request.params.prompt_logprobs is None
            and len(request.token_ids) // 4 == request.num_prompt_tokens
            and self._avoided_until_s.get(address, 0.0) <= now_s
        )

    def _is_worth_asking(self, address: str) -> bool:
        """Whether what that prefill worker computes can come here, as far as is known."""
        roads, known = self._worker.roads, self._prefillers.get(address)
        if known is None:
            return roads.names != ()
        return not known.is_misfit and roads.can_pull(known.link)

    def _cancel(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        stream.is_done = True
        self._worker.post(SequenceCancelled(request_id))
        self._release_if_idle(stream)

    def _emit(self, emitted: EmitTokens, batches: dict[bytes, list[TokenChunk]]) -> None:
        stream = self._streams.get(emitted.seq_id)
        if stream is None:
            return
        batches.setdefault(stream.peer, []).append(
            TokenChunk(
                request_id=emitted.seq_id,
                token_ids=emitted.token_ids,
                logprobs=emitted.logprobs,
                prompt_logprobs=emitted.prompt_logprobs,
                sources=emitted.sources,
                stop_token_id=emitted.stop_token_id,
                finish_reason=emitted.finish_reason,
                error=None if emitted.error is None else emitted.error.info(),
            )
        )
        if emitted.finish_reason is not None:
            del self._streams[emitted.seq_id]
            stream.is_done = True
            self._release_if_idle(stream)

    def _emit_error(self, request_id: str, error: KvrayError) -> None:
        self.on_instructions([EmitTokens(request_id, finish_reason="error", error=error)])

    # ------------------------------------------------------------------------------------------------ remote prefill

    def _ask(self, instruction: AskRemote) -> None:
        """Read path step 4."""
        stream = self._streams.get(instruction.seq_id)
        if stream is None:
            return  # cancelled in the same breath
        address = stream.request.prefill_address
        assert address is not None, "only a request with a prefill address is remote"
        prefiller = self._prefiller(address)
        prefiller.asked.add(instruction.seq_id)
        stream.is_leased = True
        prefiller.client.send(PrefillRequest(request=stream.request, num_held_tokens=instruction.num_held_tokens))

    def _prefiller(self, address: str) -> _Prefiller:
        known = self._prefillers.get(address)
        if known is not None:
            return known
        client = ChannelClient(
            self._secret,
            address,
            on_message=lambda message: self._on_prefill_message(address, message),
            on_lost=lambda reason: self._on_prefill_lost(address, reason),
            config=self._options.channel,
        )
        link = self._worker.roads.connect(lambda road, body: client.send(RoadMessage(road=road, body=body)))
        prefiller = self._prefillers[address] = _Prefiller(client, link)
        client.send(DescribeRegions())  # roads are tried while the first prompt is computed
        return prefiller

    def _on_prefill_lost(self, address: str, reason: str) -> None:
        """The prefill worker is gone: whatever still hung on it is computed here."""
        prefiller = self._prefillers.pop(address, None)
        if prefiller is None:
            return
        logger.warning("prefill worker at %s lost: %s", address, reason)
        self._avoided_until_s[address] = time.monotonic() + _AVOID_S
        self._worker.roads.disconnect(prefiller.link)
        for request_id in prefiller.asked:
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            stream.is_leased = False
            if not stream.is_offered_whole:
                self._num_refused += 1
                self._worker.post(KvRefused(request_id))
        prefiller.client.close()

    def _on_prefill_message(self, address: str, message: Message) -> None:
        match message:
            case KvHandoff():
                self._on_handoff(address, message)
            case RegionsDescribed():
                self._on_regions(address, message)
            case RoadMessage(road=road, body=body):
                if address in self._prefillers:
                    self._worker.roads.on_message(self._prefillers[address].link, road, body)
            case PrefillFailed(request_id=request_id, error=error):
                stream = self._streams.get(request_id)
                self._forget_asked(address, request_id)
                if stream is not None:
                    stream.is_leased = False
                    self._num_refused += 1
                    logger.warning("prefill at %s refused %s: %s", address, request_id, error.message)
                    self._worker.post(KvRefused(request_id))
            case _:
                logger.warning("unexpected %s from prefill at %s", type(message).__name__, address)

    def _on_handoff(self, address: str, handoff: KvHandoff) -> None:
        stream = self._streams.get(handoff.request_id)
        if stream is None:  # ended meanwhile; the prefill worker must not wait for its lease
            self._send_release(address, handoff.request_id)
            return
        stream.is_offered_whole |= handoff.is_last
        self._worker.post(
            KvOffered(
                seq_id=handoff.request_id,
                blocks=handoff.blocks,
                is_last=handoff.is_last,
                first_token=handoff.first_token,
                first_logprob=handoff.first_logprob,
                num_peer_cached_tokens=handoff.num_cached_tokens,
            )
        )
        self._release_if_idle(stream)

    def _on_regions(self, address: str, described: RegionsDescribed) -> None:
        prefiller = self._prefillers.get(address)
        if prefiller is None:
            return
        try:
            prefiller.pool = self._puller.understand(described)
        except RegionError as error:
            prefiller.is_misfit = True
            logger.warning("prefill at %s cannot be pulled from: %s", address, error.message)
        else:
            self._worker.roads.learn(prefiller.link, described.regions)

    async def _pull(self, instruction: PullBlocks, stream: _Stream | None) -> None:
        """Read path step 6. `stream` counts the pull already; None: cancelled in the same breath."""
        outcome = PullOutcome(frozenset(location.index for location, _ in instruction.pairs))
        try:
            if stream is not None:
                outcome = await self._pull_for(stream, instruction, outcome)
        finally:
            # Late bytes may land in the targets for as long: nobody gets those blocks before.
            until_s = time.monotonic() + outcome.quarantine_s if outcome.quarantine_s > 0 and outcome.bad else None
            self._worker.post(PullEnded(instruction.seq_id, outcome.bad, until_s))
            if stream is not None:
                stream.num_pulls -= 1
                self._release_if_idle(stream)

    async def _pull_for(self, stream: _Stream, instruction: PullBlocks, failed: PullOutcome) -> PullOutcome:
        prefiller = self._prefillers.get(stream.request.prefill_address or "")
        if prefiller is None or prefiller.pool is None:
            return failed

        def progress() -> None:
            stream.num_arrived += 1

        renewing = asyncio.create_task(self._renew_while_pulling(stream))
        try:
            return await self._puller.pull(prefiller.link, prefiller.pool, instruction.pairs, progress)
        finally:
            renewing.cancel()

    async def _renew_while_pulling(self, stream: _Stream) -> None:
        """Keep the lease alive while blocks arrive: a while without any is for the lease to judge."""
        num_arrived = -1
        while True:
            if num_arrived != stream.num_arrived:
                num_arrived = stream.num_arrived
                self._renew(stream)
            await asyncio.sleep(self._options.lease_s / 4)

    def _renew(self, stream: _Stream) -> None:
        prefiller = self._prefillers.get(stream.request.prefill_address or "")
        if prefiller is not None and stream.is_leased:
            prefiller.client.send(RenewLease(request_id=stream.request.request_id))

    def _release_if_idle(self, stream: _Stream) -> None:
        """Nothing more will be read from the prefill worker's blocks: say so at once."""
        if not stream.is_leased or stream.num_pulls > 0:
            return
        if stream.is_done or stream.is_offered_whole:
            stream.is_leased = False
            address = stream.request.prefill_address or ""
            self._forget_asked(address, stream.request.request_id)
            self._send_release(address, stream.request.request_id)

    def _send_release(self, address: str, request_id: str) -> None:
        prefiller = self._prefillers.get(address)
        if prefiller is not None:
            prefiller.client.send(ReleaseLease(request_id=request_id))

    def _forget_asked(self, address: str, request_id: str) -> None:
        prefiller = self._prefillers.get(address)
        if prefiller is not None:
            prefiller.asked.discard(request_id)
