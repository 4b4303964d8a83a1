"""A prefill and a decode worker for a test: real scheduler, pool and leases; messages are lists.

The glue between scheduler and messages is that of prefill/worker.py and decode/worker.py, in short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from engine.scheduling.plan import (
    AskRemote,
    BlocksReleased,
    EmitTokens,
    Event,
    Instruction,
    KvOffered,
    KvRefused,
    OfferBlocks,
    PullBlocks,
    PullEnded,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
)
from engine.scheduling.scheduler import SchedulerConfig
from kvcache.leases import Asked, Failed, LeaseBook, LeaseEvent, PeerLost, Published, Released, Renewed
from kvcache.names import unpack_tokens
from kvcache.pool import BlockState
from messages.errors import WorkerError
from messages.handoff import BlockLocation, KvHandoff, PrefillFailed, PrefillRequest, ReleaseLease, RenewLease
from messages.wire import Message
from tests.prefill.fake_engine import (
    LEASE_S,
    QUARANTINE_S,
    SIZE,
    UNARRIVED,
    Connection,
    Ending,
    FakeEngine,
    Job,
    LateWrite,
    Pull,
    Request,
    Stream,
    checksum,
)

if TYPE_CHECKING:
    from tests.prefill.world import World


class PrefillSide:
    """prefill/worker.py without its loop, its channel and its clock."""

    def __init__(self, world: World, config: SchedulerConfig, num_blocks: int) -> None:
        self.world = world
        self.engine = FakeEngine(world, config, num_blocks)
        self.book = LeaseBook(LEASE_S)
        self.jobs: dict[str, Job] = {}

    def post(self, event: Event) -> None:
        self.on_instructions(self.engine.carry_out(event))

    def on_message(self, peer: bytes, message: Message) -> None:
        match message:
            case PrefillRequest():
                self._accept(peer, message)
            case RenewLease(request_id=request_id):
                self.decide(Renewed(request_id, peer))
            case ReleaseLease(request_id=request_id):
                self.decide(Released(request_id, peer))
            case _:
                raise AssertionError(message)

    def on_peer_lost(self, peer: bytes) -> None:
        others = {seq_id for seq_id in self.jobs if self.book.peer_of(seq_id) != peer}
        self.decide(PeerLost(peer))
        assert self.jobs.keys() == others, "all of that peer is freed, and nothing of others"

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case OfferBlocks():
                    self._offer(instruction)
                case EmitTokens():
                    self._finish(instruction)
                case _:
                    raise AssertionError(instruction)

    def decide(self, event: LeaseEvent) -> None:
        for freed in self.book.on_event(event, self.world.now_s):
            job = self.jobs.pop(freed.request_id, None)  # None: its deadline passed, as the one before it was freed
            self.world.seen["expired"] += freed.is_expired
            if freed.is_expired and job is not None:
                assert job.is_published_whole, "what is still computed has no lease to expire"
            self.post(SequenceCancelled(freed.request_id))
            self.post(BlocksReleased(freed.request_id))

    def _accept(self, peer: bytes, message: PrefillRequest) -> None:
        request = message.request
        self.world.seen["asked again"] += self.book.peer_of(request.request_id) is not None
        self.decide(Asked(request.request_id, peer))
        self.jobs[request.request_id] = Job(message.num_held_tokens)
        spec = SequenceSpec(
            seq_id=request.request_id,
            token_ids=unpack_tokens(request.token_ids)[: request.num_prompt_tokens],
            num_prompt_tokens=request.num_prompt_tokens,
            params=request.params,
            salt=request.salt,
            priority=request.priority,
            deadline_s=None if request.deadline_s is None else self.world.now_s + request.deadline_s,
            is_kept=True,
        )
        self.post(SequenceAdded(spec))

    def _offer(self, offer: OfferBlocks) -> None:
        job = self.jobs.get(offer.seq_id)
        if job is None:
            return
        if offer.is_last:
            job.offer = offer
        else:
            self._publish(job, offer, None)

    def _finish(self, emitted: EmitTokens) -> None:
        job = self.jobs.get(emitted.seq_id)
        if job is None:
            return
        if emitted.error is not None or not emitted.token_ids or job.offer is None:
            del self.jobs[emitted.seq_id]
            peer = self.book.peer_of(emitted.seq_id)
            self.decide(Failed(emitted.seq_id))
            if peer is not None:
                error = emitted.error or WorkerError("no token")
                self.world.send_to_decode(peer, PrefillFailed(request_id=emitted.seq_id, error=error.info()))
            return
        self._publish(job, job.offer, emitted)
        job.offer = None

    def _publish(self, job: Job, offer: OfferBlocks, emitted: EmitTokens | None) -> None:
        peer, pool = self.book.peer_of(offer.seq_id), self.engine.pool
        if peer is None:
            return
        blocks = [block for block in offer.blocks if block.index >= job.num_held_tokens // SIZE]
        checksums = self.engine.published([block.block_id for block in blocks])
        numbers = self.world.requests[offer.seq_id].numbers
        for block, value in zip(blocks, checksums, strict=True):
            content = self.engine.kv[block.block_id]
            assert block.generation == pool.generation(block.block_id)
            assert pool.num_pins(block.block_id) > 0
            assert value == checksum(content), "what is remembered is what lies there"
            assert content[: block.num_tokens] == numbers[block.index * SIZE :][: block.num_tokens], "it is written"
        if emitted is not None:
            self.decide(Published(offer.seq_id))
        job.published += blocks
        job.is_published_whole = emitted is not None
        self.world.seen["published early"] += emitted is None and bool(blocks)
        self.world.send_to_decode(
            peer,
            KvHandoff(
                request_id=offer.seq_id,
                lease_s=LEASE_S,
                blocks=[
                    msgspec.structs.replace(block, checksum=value)
                    for block, value in zip(blocks, checksums, strict=True)
                ],
                is_last=emitted is not None,
                first_token=None if emitted is None else emitted.token_ids[0],
                num_cached_tokens=offer.num_cached_tokens,
            ),
        )

    def check(self) -> None:
        self.engine.check()
        self.book.check_invariants(self.engine.scheduler.seq_ids())
        assert self.jobs.keys() == set(self.engine.scheduler.seq_ids())
        pool = self.engine.pool
        for job in self.jobs.values():
            for location in job.published if job.is_published_whole else []:
                assert pool.num_pins(location.block_id) > 0, "what is leased is pinned"
                assert pool.generation(location.block_id) == location.generation


class DecodeSide:
    """decode/worker.py without its loop, its channels and its clock."""

    def __init__(self, world: World, config: SchedulerConfig, num_blocks: int) -> None:
        self.world = world
        self.engine = FakeEngine(world, config, num_blocks)
        self.streams: dict[str, Stream] = {}
        self.pulls: list[Pull] = []
        self.connection: Connection | None = None

    def post(self, event: Event) -> None:
        self.on_instructions(self.engine.carry_out(event))

    def accept(self, request: Request, *, is_remote: bool) -> None:
        message = request.message
        self.streams[message.request_id] = Stream(request)
        spec = SequenceSpec(
            seq_id=message.request_id,
            token_ids=unpack_tokens(message.token_ids),
            num_prompt_tokens=message.num_prompt_tokens,
            params=message.params,
            salt=message.salt,
            priority=message.priority,
            deadline_s=request.deadline_s,
            is_remote=is_remote,
        )
        self.post(SequenceAdded(spec))

    def cancel(self, request_id: str) -> None:
        stream = self.streams.pop(request_id)
        stream.is_done = True
        self.post(SequenceCancelled(request_id))
        self._release_if_idle(stream)

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case EmitTokens():
                    self._emit(instruction)
                case AskRemote():
                    self._ask(instruction)
                case PullBlocks(seq_id, pairs):
                    self._take_pull(seq_id, pairs)
                case _:
                    raise AssertionError(instruction)

    def _emit(self, emitted: EmitTokens) -> None:
        self.world.take_tokens(emitted)
        if emitted.finish_reason is not None:
            stream = self.streams.pop(emitted.seq_id)
            stream.is_done = True
            self._release_if_idle(stream)

    # ------------------------------------------------------------------------------------------------ remote prefill

    def _ask(self, instruction: AskRemote) -> None:
        stream = self.streams[instruction.seq_id]
        if self.connection is None:
            self.connection = self.world.connect()
        self.connection.asked.add(instruction.seq_id)
        stream.is_leased = True
        self._send(PrefillRequest(request=stream.request.message, num_held_tokens=instruction.num_held_tokens))

    def _send(self, message: Message) -> None:
        if self.connection is not None and not self.connection.is_prefill_dead:
            self.connection.to_prefill.append(message)

    def on_message(self, message: Message) -> None:
        match message:
            case KvHandoff():
                self._on_handoff(message)
            case PrefillFailed(request_id=request_id):
                stream = self.streams.get(request_id)
                self._forget_asked(request_id)
                if stream is not None:
                    stream.is_leased = False
                    self.world.seen["prefill failed"] += 1
                    self.post(KvRefused(request_id))
            case _:
                raise AssertionError(message)

    def on_prefill_lost(self) -> None:
        connection, self.connection = self.connection, None
        assert connection is not None
        for request_id in sorted(connection.asked):
            stream = self.streams.get(request_id)
            if stream is None:
                continue
            stream.is_leased = False
            if not stream.is_offered_whole:
                self.world.seen["refused"] += 1
                self.post(KvRefused(request_id))

    def _on_handoff(self, handoff: KvHandoff) -> None:
        stream = self.streams.get(handoff.request_id)
        if stream is None:
            request = self.world.requests[handoff.request_id]
            if request.manners != "mute":
                self._send(ReleaseLease(request_id=handoff.request_id))
            return
        stream.is_offered_whole |= handoff.is_last
        self.post(
            KvOffered(
                seq_id=handoff.request_id,
                blocks=handoff.blocks,
                is_last=handoff.is_last,
                first_token=handoff.first_token,
                first_logprob=None,
                num_peer_cached_tokens=handoff.num_cached_tokens,
            )
        )
        self._release_if_idle(stream)

    def _release_if_idle(self, stream: Stream) -> None:
        if not stream.is_leased or stream.num_pulls > 0 or stream.request.manners == "mute":
            return
        if stream.is_done or stream.is_offered_whole:
            stream.is_leased = False
            request_id = stream.request.message.request_id
            self._forget_asked(request_id)
            self._send(ReleaseLease(request_id=request_id))

    def _forget_asked(self, request_id: str) -> None:
        if self.connection is not None:
            self.connection.asked.discard(request_id)

    # --------------------------------------------------------------------------------------------------------- pulls

    def _take_pull(self, seq_id: str, pairs: list[tuple[BlockLocation, int]]) -> None:
        pool = self.engine.pool
        assert pairs
        assert all(pull.seq_id != seq_id for pull in self.pulls), "one pull at a time"
        for _, target in pairs:
            assert pool.state(target) is BlockState.WRITING
            assert pool.num_pins(target) == 1
        pull = Pull(seq_id, pairs, [pool.generation(target) for _, target in pairs])
        self.pulls.append(pull)
        stream = self.streams.get(seq_id)
        if stream is not None and stream.request.manners == "polite":
            pull.stream = stream
            stream.num_pulls += 1

    def begin_pull(self, pull: Pull) -> None:
        """It needs the stream and the prefill worker; without them all of it is bad."""
        if self.streams.get(pull.seq_id) is None or self.connection is None:
            self._pull_ended(pull, frozenset(location.index for location, _ in pull.pairs), None)
            return
        pull.source = self.connection.source
        if pull.stream is None:
            pull.stream = self.streams[pull.seq_id]
            pull.stream.num_pulls += 1
        self.renew(pull)

    def renew(self, pull: Pull) -> None:
        if pull.stream is not None and pull.stream.is_leased:
            self._send(RenewLease(request_id=pull.seq_id))

    def copy(self, pull: Pull, position: int) -> None:
        """One block as it is at this moment, and verified where it lies now."""
        assert pull.source is not None
        location, _ = pull.pairs[position]
        content = self._write(pull, position, pull.source[location.block_id])
        pull.copied[position] = checksum(content) == location.checksum or not self.world.verifies
        self.world.seen["copied"] += 1

    def end_pull(self, pull: Pull, ending: Ending, lost: set[int] = frozenset()) -> None:
        """As decode/puller.py: what was damaged is asked for once more; what is quarantined is all bad.

        Of the blocks that have not come yet "well" brings all, "some" those not in `lost`, "none" and "late" none.
        """
        for position in range(len(pull.pairs)):
            if position in pull.copied:
                continue
            if ending == "well" or (ending == "some" and position not in lost):
                self.copy(pull, position)
            else:
                self._write(pull, position, [UNARRIVED] * SIZE)
        until_s = None
        if ending == "late":
            pull.copied.clear()
            until_s = self.world.now_s + QUARANTINE_S
            self.world.late += [LateWrite(self.engine.kv, target, until_s) for _, target in pull.pairs]
        for position, is_good in list(pull.copied.items()):
            if not is_good:
                self.copy(pull, position)
        good = {position for position, is_good in pull.copied.items() if is_good}
        self.world.seen["damaged"] += len(pull.copied) - len(good)
        bad = frozenset(pair[0].index for position, pair in enumerate(pull.pairs) if position not in good)
        self._pull_ended(pull, bad, until_s)

    def _pull_ended(self, pull: Pull, bad: frozenset[int], until_s: float | None) -> None:
        self.pulls.remove(pull)
        stream = pull.stream
        if stream is not None:
            stream.num_pulls -= 1
        self.post(PullEnded(pull.seq_id, bad, until_s))
        if stream is not None:
            self._release_if_idle(stream)

    def _write(self, pull: Pull, position: int, content: list[int]) -> list[int]:
        _, target = pull.pairs[position]
        assert self.engine.pool.generation(target) == pull.generations[position], "no target is reused under its pull"
        self.engine.kv[target] = list(content)
        return self.engine.kv[target]

    def check(self) -> None:
        self.engine.check()
        assert set(self.engine.scheduler.seq_ids()) == self.streams.keys()
