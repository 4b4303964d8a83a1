"""Prefill and decode, their schedulers, pools and leases real, with messages in between that are made of lists.

As in tests/engine/test_scheduler_model.py the fake KV of a token is a number that stands for its whole prefix, and the
next token follows from the last number in the cache. Here those numbers also travel: a pull copies whatever a block
holds at that moment, and only the published checksum tells whether it is what was promised. Workers die, leases end
early, blocks are reused under a pull, bytes land late; no wrong number may ever bear a name or be attended to, and at
the end neither side holds a block.

The glue between scheduler and messages is that of prefill/worker.py and decode/worker.py, in short.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.ledger import SequenceLedger
from engine.plan import (
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
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
    TimePassed,
)
from engine.scheduler import Scheduler, SchedulerConfig
from kvcache.names import block_names, pack_tokens, split_names, unpack_tokens
from kvcache.pool import BlockPool, BlockState
from messages.errors import InvariantError, WorkerError
from messages.handoff import BlockLocation, KvHandoff, PrefillFailed, PrefillRequest, ReleaseLease, RenewLease
from messages.request import GenerateRequest, SamplingParams
from messages.wire import Message
from prefill import leases
from prefill.leases import Asked, Failed, FreeBlocks, LeaseBook, LeaseEvent, PeerLost, Published, Released, Renewed

FINGERPRINT = b"a model"
VOCABULARY = 5
STOP = 4
SIZE = 4  #: tokens in a block
LEASE_S = 3.0
QUARANTINE_S = 3.0
REMOTE_TIMEOUT_S = 10.0
LONGER_THAN_ALL_S = 11.0
TORN, UNARRIVED, LATE = 1, 2, 3  #: bytes that are no token's

Ending = Literal["well", "some", "none", "late"]  #: how a pull ends
Manners = Literal["polite", "hasty", "mute"]  #: releases when idle; with a pull still to begin; never


def seed_number(salt: bytes) -> int:
    return int.from_bytes(salt, "little") + 100


def next_token(number: int) -> int:
    return hash((number, 77)) % VOCABULARY


def kv_numbers(salt: bytes, token_ids: Sequence[int]) -> list[int]:
    """For each token a number that stands for it and all before it."""
    number, numbers = seed_number(salt), []
    for token_id in token_ids:
        number = hash((number, token_id))
        numbers.append(number)
    return numbers


@dataclass
class Request:
    """What a client asked for, and what it must get."""

    message: GenerateRequest
    manners: Manners
    deadline_s: float | None
    token_ids: list[int]  #: prompt and all that will be generated
    numbers: list[int]
    reason: str
    num_given: int  #: tokens of `token_ids` that the client knows
    is_over: bool = False
    is_cancelled: bool = False


def expect(message: GenerateRequest, manners: Manners, deadline_s: float | None, max_len: int) -> Request:
    token_ids = unpack_tokens(message.token_ids)
    params, num_prompt = message.params, message.num_prompt_tokens
    while True:
        num_output = len(token_ids) - num_prompt
        if num_output > params.min_tokens and token_ids[-1] in params.stop_token_ids:
            reason = "stop"
            break
        if num_output and (num_output >= params.max_tokens or len(token_ids) >= max_len):
            reason = "length"
            break
        token_ids.append(next_token(kv_numbers(message.salt, token_ids)[-1]))
    return Request(
        message, manners, deadline_s, token_ids, kv_numbers(message.salt, token_ids), reason, num_given=num_prompt
    )


@dataclass(eq=False)
class Connection:
    """A channel from a decode worker to a prefill worker; in order both ways until an end dies."""

    peer: bytes
    source: list[list[int]]  #: the blocks of the prefill worker at the other end; they can be read after its death
    to_prefill: deque[Message] = field(default_factory=deque)
    to_decode: deque[Message] = field(default_factory=deque)
    asked: set[str] = field(default_factory=set)
    is_prefill_dead: bool = False
    is_decode_dead: bool = False


@dataclass(eq=False)
class Stream:
    """A request at a decode worker, as decode/worker.py has it."""

    request: Request
    is_offered_whole: bool = False
    num_pulls: int = 0
    is_leased: bool = False
    is_done: bool = False


@dataclass(eq=False)
class Pull:
    """A PullBlocks that was handed out."""

    seq_id: str
    pairs: list[tuple[BlockLocation, int]]
    generations: list[int]  #: of the targets
    stream: Stream | None = None
    source: list[list[int]] | None = None  #: None: it has not begun
    copied: dict[int, bool] = field(default_factory=dict)  #: position in `pairs` -> whether it was what was published


@dataclass(eq=False)
class LateWrite:
    """Bytes of an aborted pull that are still on their way."""

    kv: list[list[int]]
    target: int
    until_s: float


class FakeEngine:
    """A scheduler and a pool; lists for the bytes, and for the thread that computes."""

    def __init__(self, world: World, config: SchedulerConfig, num_blocks: int) -> None:
        self.world = world
        self.config = config
        self.pool = BlockPool(num_blocks, SIZE)
        self.scheduler = Scheduler(config, self.pool, FINGERPRINT)
        self.kv = [[0] * SIZE for _ in range(num_blocks)]
        self.step: StepPlan | None = None
        self.in_step: dict[int, int] = {}  # block -> generation, of all tables of the step
        self.generations = [self.pool.generation(block_id) for block_id in range(num_blocks)]
        self.known: dict[int, tuple[int, int]] = {}  # as engine.checksums.BlockChecksums

    def carry_out(self, *events: Event) -> list[Instruction]:
        """As EngineDriver: decide on all, begin the step that follows; what is left is to be handed out."""
        others: list[Instruction] = []
        for event in events:
            for instruction in self.scheduler.on_event(event, self.world.now_s):
                if isinstance(instruction, RunStep):
                    self._begin(instruction.plan)
                else:
                    others.append(instruction)
        return others

    def next_step(self, failed: set[str] = frozenset()) -> list[Instruction]:
        """End the step that runs, begin the next."""
        ended = [] if self.step is None else [StepEnded(self._compute(self.step, failed))]
        self.step = None
        return self.carry_out(*ended, StepWanted())

    def _begin(self, plan: StepPlan) -> None:
        assert self.step is None
        self.step = plan
        self.in_step = {b: self.pool.generation(b) for part in plan.parts for b in part.block_table}
        for part in plan.parts:
            for position in range(part.start, part.end):  # whoever reads it meanwhile reads something unfinished
                block_id = part.block_table[position // SIZE]
                assert self.pool.state(block_id) is BlockState.WRITING
                self.kv[block_id][position % SIZE] = TORN

    def _compute(self, plan: StepPlan, failed: set[str]) -> StepResult:
        for block_id, generation in self.in_step.items():
            assert self.pool.generation(block_id) == generation, "nothing is reused under a running step"
        sampled: dict[str, Sampled] = {}
        for part in plan.parts:
            request, table = self.world.requests[part.seq_id], part.block_table
            for position in range(part.start, part.end):
                before = seed_number(request.message.salt) if position == 0 else self._at(table, position - 1)
                self.kv[table[position // SIZE]][position % SIZE] = hash((before, part.token_ids[position]))
            read = [self._at(table, position) for position in range(part.end)]
            assert read == request.numbers[: part.end], "a token attends to its own past"
            if part.is_sampled and part.seq_id not in failed:
                sampled[part.seq_id] = Sampled(next_token(read[-1]))
            if part.is_kept:
                end = -(-part.end // SIZE) if part.is_sampled else part.end // SIZE
                self.published(table[part.start // SIZE : end])
        return StepResult(sampled=sampled, errors={seq_id: WorkerError("no") for seq_id in failed}, elapsed_s=0.01)

    def _at(self, table: list[int], position: int) -> int:
        return self.kv[table[position // SIZE]][position % SIZE]

    def published(self, block_ids: list[int]) -> list[int]:
        for block_id in block_ids:
            generation = self.pool.generation(block_id)
            if self.known.get(block_id, (None, 0))[0] != generation:
                self.known[block_id] = (generation, checksum(self.kv[block_id]))
        return [self.known[block_id][1] for block_id in block_ids]

    def check(self) -> None:
        self.scheduler.check_invariants()
        pool = self.pool
        for block_id in range(pool.num_blocks):
            name = pool.name(block_id)
            if name is not None:
                assert self.kv[block_id] == self.world.content_of[name], "a name never lies"
        generations = [pool.generation(block_id) for block_id in range(pool.num_blocks)]
        assert all(new >= old for new, old in zip(generations, self.generations, strict=True)), "they only grow"
        self.generations = generations


def checksum(content: list[int]) -> int:
    return hash(tuple(content))


@dataclass
class Job:
    """As in prefill/worker.py, and what was published."""

    num_held_tokens: int
    offer: OfferBlocks | None = None
    published: list[BlockLocation] = field(default_factory=list)
    is_published_whole: bool = False


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


class World:
    """Both sides, what travels between them, the clients, and the clock."""

    def __init__(
        self,
        prefill_config: SchedulerConfig,
        decode_config: SchedulerConfig,
        num_prefill_blocks: int,
        num_decode_blocks: int,
        *,
        verifies: bool = True,
    ) -> None:
        self.now_s = 100.0
        self.verifies = verifies
        self.requests: dict[str, Request] = {}
        self.content_of: dict[bytes, list[int]] = {}  # by block name
        self.connections: list[Connection] = []
        self.late: list[LateWrite] = []
        self.seen: Counter[str] = Counter()
        self._peers = count()
        self._new_prefill = lambda: PrefillSide(self, prefill_config, num_prefill_blocks)
        self._new_decode = lambda: DecodeSide(self, decode_config, num_decode_blocks)
        self.prefill = self._new_prefill()
        self.decode = self._new_decode()
        self.max_len = min(decode_config.max_model_len, num_decode_blocks * SIZE)

    # -------------------------------------------------------------------------------------------------------- clients

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        priority: int = 0,
        is_remote: bool = True,
        manners: Manners = "polite",
        patience_s: float | None = None,
    ) -> str:
        request_id = f"r{len(self.requests)}"
        message = GenerateRequest(
            request_id=request_id,
            token_ids=pack_tokens(prompt),
            num_prompt_tokens=len(prompt),
            params=params,
            salt=salt,
            priority=priority,
            deadline_s=patience_s,
        )
        deadline_s = None if patience_s is None else self.now_s + patience_s
        request = self.requests[request_id] = expect(message, manners, deadline_s, self.max_len)
        names = split_names(block_names(FINGERPRINT, salt, pack_tokens(request.token_ids), SIZE))
        for index, name in enumerate(names):
            numbers = request.numbers[index * SIZE : (index + 1) * SIZE]
            assert self.content_of.setdefault(name, numbers) == numbers
        self.decode.accept(request, is_remote=is_remote)
        return request_id

    def alive(self) -> list[str]:
        return [request_id for request_id, request in self.requests.items() if not request.is_over]

    def cancel(self, request_id: str) -> None:
        self.requests[request_id].is_over = self.requests[request_id].is_cancelled = True
        self.decode.cancel(request_id)

    def take_tokens(self, emitted: EmitTokens) -> None:
        request = self.requests[emitted.seq_id]
        assert not request.is_over, "nothing follows the end or a cancel"
        begin = request.num_given
        request.num_given += len(emitted.token_ids)
        assert emitted.token_ids == request.token_ids[begin : request.num_given]
        if emitted.finish_reason is None:
            assert emitted.token_ids
            return
        request.is_over = True
        if emitted.finish_reason == "error":
            assert request.deadline_s is not None, emitted.error
            assert self.now_s >= request.deadline_s
            self.seen["too late"] += 1
        else:
            assert emitted.finish_reason == request.reason
            assert request.num_given == len(request.token_ids)
            self.seen["finished"] += 1

    # ------------------------------------------------------------------------------------------------------- messages

    def connect(self) -> Connection:
        connection = Connection(b"decode %d" % next(self._peers), self.prefill.engine.kv)
        self.connections.append(connection)
        return connection

    def send_to_decode(self, peer: bytes, message: Message) -> None:
        for connection in self.connections:
            if connection.peer == peer and not connection.is_decode_dead and not connection.is_prefill_dead:
                connection.to_decode.append(message)

    def deliverable(self) -> list[tuple[Connection, bool]]:
        """Where something is to be delivered, and whether to prefill; last of all that the other end is dead."""
        found = []
        for connection in self.connections:
            if not connection.is_prefill_dead and (connection.to_prefill or connection.is_decode_dead):
                found.append((connection, True))
            if not connection.is_decode_dead and (connection.to_decode or connection.is_prefill_dead):
                found.append((connection, False))
        return found

    def deliver(self, connection: Connection, to_prefill: bool) -> None:
        if to_prefill and connection.to_prefill:
            self.prefill.on_message(connection.peer, connection.to_prefill.popleft())
        elif to_prefill:
            self.connections.remove(connection)
            self.seen["peer lost"] += 1
            self.prefill.on_peer_lost(connection.peer)
        elif connection.to_decode:
            self.decode.on_message(connection.to_decode.popleft())
        else:
            assert connection is self.decode.connection
            self.connections.remove(connection)
            self.decode.on_prefill_lost()

    # --------------------------------------------------------------------------------------------------- time and death

    def pass_time(self, seconds: float) -> None:
        """What is late lands in the last instant before its quarantine ends, if it did not before."""
        now_s = self.now_s + seconds
        for write in [write for write in self.late if write.until_s <= now_s]:
            self.land(write)
        self.now_s = now_s
        self.prefill.decide(leases.TimePassed())
        self.prefill.post(TimePassed())
        self.decode.post(TimePassed())

    def land(self, write: LateWrite) -> None:
        """Into the block, whoever has it now."""
        self.late.remove(write)
        write.kv[write.target] = [LATE] * SIZE
        self.seen["late writes"] += write.kv is self.decode.engine.kv

    def kill_decode(self, *, loses_messages: bool, is_retried: Callable[[], bool]) -> None:
        """Its requests are lost or begin again at its successor, under their ids, with the tokens they have."""
        old, self.decode = self.decode, self._new_decode()
        if old.connection is not None:
            old.connection.is_decode_dead = True
            old.connection.to_decode.clear()
            if loses_messages:
                old.connection.to_prefill.clear()
            if old.connection.is_prefill_dead:
                self.connections.remove(old.connection)
        for request_id in old.streams:
            request = self.requests[request_id]
            if not is_retried():
                request.is_over = request.is_cancelled = True
                continue
            num_prompt = request.message.num_prompt_tokens
            request.message = msgspec.structs.replace(
                request.message, token_ids=pack_tokens(request.token_ids[: request.num_given])
            )
            self.seen["retried"] += 1
            self.decode.accept(request, is_remote=request.num_given == num_prompt)

    def kill_prefill(self, *, loses_messages: bool) -> None:
        for connection in list(self.connections):
            connection.is_prefill_dead = True
            connection.to_prefill.clear()
            if loses_messages:
                connection.to_decode.clear()
            if connection.is_decode_dead:
                self.connections.remove(connection)
        self.prefill = self._new_prefill()

    # ---------------------------------------------------------------------------------------------------------- steps

    def step_prefill(self, failed: set[str] = frozenset()) -> None:
        self.prefill.on_instructions(self.prefill.engine.next_step(failed))

    def step_decode(self) -> None:
        self.decode.on_instructions(self.decode.engine.next_step())

    # --------------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        self.prefill.check()
        self.decode.check()
        assert set(self.alive()) == self.decode.streams.keys()

    def settle(self) -> None:
        """Everything goes on and well until nothing more can without time."""
        for _ in range(5000):
            deliverable = self.deliverable()
            self.step_prefill()
            self.step_decode()
            if deliverable:
                self.deliver(*deliverable[0])
            elif self.decode.pulls:
                pull = self.decode.pulls[0]
                if pull.source is None:
                    self.decode.begin_pull(pull)
                else:
                    self.decode.end_pull(pull, "well")
            elif self.prefill.engine.step is None and self.decode.engine.step is None:
                return
            self.check()
        raise AssertionError("it never comes to rest")

    def is_clean(self) -> bool:
        pools = (self.prefill.engine.pool, self.decode.engine.pool)
        return not any(pool.num_used or pool.num_quarantined for pool in pools) and not self.alive()

    def drain(self) -> None:
        """Nobody dies or fails any more: all requests end, and then time alone frees what is still held."""
        self.settle()
        for _ in range(2 * len(self.requests) + 2):
            if self.is_clean():
                break
            self.pass_time(LONGER_THAN_ALL_S)
            self.settle()
        for side in (self.prefill, self.decode):
            side.engine.check()
            assert side.engine.scheduler.seq_ids() == ()
            assert (side.engine.pool.num_used, side.engine.pool.num_quarantined) == (0, 0)
            assert side.engine.pool.num_free == side.engine.pool.num_blocks
        assert (self.prefill.book.num_open, self.prefill.jobs, self.decode.streams) == (0, {}, {})
        for request in self.requests.values():
            assert request.is_over
            if not request.is_cancelled and request.deadline_s is None:
                assert request.num_given == len(request.token_ids)


BASES = [[(i * i + 3 * b) % VOCABULARY for i in range(40)] for b in range(2)]


def config_of(quantum: int, budget: int, max_num_seqs: int, threshold: int = 1) -> SchedulerConfig:
    return SchedulerConfig(
        max_model_len=44,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        chunk_quantum_tokens=quantum,
        remote_threshold_tokens=threshold,
        remote_timeout_s=REMOTE_TIMEOUT_S,
        watermark=0.0,
    )


class LeaseMachine(RuleBasedStateMachine):
    """Everything that can happen between a prefill and a decode worker, in any order, with too few blocks."""

    world: World
    verifies = True

    @initialize(
        num_prefill_blocks=st.integers(3, 9),
        num_decode_blocks=st.integers(6, 16),
        prefill=st.builds(
            config_of, st.sampled_from([4, 6, 8]), st.sampled_from([8, 12, 24]), max_num_seqs=st.integers(1, 4)
        ),
        decode=st.builds(
            config_of, st.just(8), st.sampled_from([8, 24]), st.integers(2, 5), threshold=st.sampled_from([1, 1, 6])
        ),
    )
    def make(self, num_prefill_blocks, num_decode_blocks, prefill, decode) -> None:
        self.world = World(prefill, decode, num_prefill_blocks, num_decode_blocks, verifies=self.verifies)

    def _pulls(self, *, has_begun: bool) -> list[Pull]:
        return [pull for pull in self.world.decode.pulls if (pull.source is not None) == has_begun]

    @rule(
        data=st.data(),
        max_tokens=st.integers(1, 10),
        is_remote=st.sampled_from([True, True, True, True, False]),
        manners=st.sampled_from(["polite", "polite", "hasty", "mute"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([b"", b"", b"", b"s"]),
        has_stop=st.booleans(),
        patience_s=st.sampled_from([None, None, None, None, 4.0]),
    )
    def add(self, data, max_tokens, is_remote, manners, priority, salt, has_stop, patience_s) -> None:
        fits_prefill = SIZE * self.world.prefill.engine.pool.num_blocks - 1
        at_most = data.draw(st.sampled_from([fits_prefill, fits_prefill, fits_prefill, 40]))
        length = data.draw(st.integers(1, min(self.world.max_len - 1, at_most)))
        prompt = BASES[data.draw(st.integers(0, 1))][:length]
        if data.draw(st.booleans()):
            prompt = [*prompt[:-1], data.draw(st.integers(0, VOCABULARY - 1))]
        self.world.add(
            prompt,
            SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,) if has_stop else ()),
            salt=salt,
            priority=priority,
            is_remote=is_remote,
            manners=manners,
            patience_s=patience_s,
        )

    @precondition(lambda self: self.world.alive())
    @rule(num_rounds=st.integers(1, 6))
    def go_on(self, num_rounds) -> None:
        """Steps and messages as they come; pulls only begin."""
        for _ in range(num_rounds):
            self.world.step_prefill()
            for connection, to_prefill in self.world.deliverable():
                self.world.deliver(connection, to_prefill)
            for pull in self._pulls(has_begun=False):
                self.world.decode.begin_pull(pull)
            self.world.step_decode()

    @rule(data=st.data())
    def step_prefill(self, data) -> None:
        failed = set()
        step = self.world.prefill.engine.step
        if step is not None and data.draw(st.sampled_from([False] * 4 + [True])):
            failed = {data.draw(st.sampled_from([part.seq_id for part in step.parts]))}
        self.world.step_prefill(failed)

    @rule()
    def step_decode(self) -> None:
        self.world.step_decode()

    @precondition(lambda self: self.world.deliverable())
    @rule(data=st.data())
    def deliver(self, data) -> None:
        self.world.deliver(*data.draw(st.sampled_from(self.world.deliverable())))

    @precondition(lambda self: self._pulls(has_begun=False))
    @rule(data=st.data())
    def begin_pull(self, data) -> None:
        self.world.decode.begin_pull(data.draw(st.sampled_from(self._pulls(has_begun=False))))

    @precondition(lambda self: self._pulls(has_begun=True))
    @rule(data=st.data(), is_renewed=st.booleans())
    def copy(self, data, is_renewed) -> None:
        pull = data.draw(st.sampled_from(self._pulls(has_begun=True)))
        lacking = [position for position in range(len(pull.pairs)) if position not in pull.copied]
        if lacking:
            self.world.decode.copy(pull, data.draw(st.sampled_from(lacking)))
        if is_renewed:
            self.world.decode.renew(pull)

    @precondition(lambda self: self._pulls(has_begun=True))
    @rule(data=st.data(), ending=st.sampled_from(["well", "well", "well", "some", "none", "late", "late"]))
    def end_pull(self, data, ending) -> None:
        pull = data.draw(st.sampled_from(self._pulls(has_begun=True)))
        lost = data.draw(st.sets(st.integers(0, len(pull.pairs) - 1))) if ending == "some" else set()
        self.world.decode.end_pull(pull, ending, lost)

    @precondition(lambda self: self.world.late)
    @rule(data=st.data())
    def land(self, data) -> None:
        self.world.land(data.draw(st.sampled_from(self.world.late)))

    @rule(seconds=st.sampled_from([0.5, 1.0, LEASE_S + 0.5, LEASE_S + 0.5, REMOTE_TIMEOUT_S + 0.5]))
    def pass_time(self, seconds) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: self.world.alive())
    @rule(data=st.data(), what=st.sampled_from(["cancel", "clear", "decode dies", "prefill dies"]), is_so=st.booleans())
    def disturb(self, data, what, is_so) -> None:
        match what:
            case "cancel":
                self.world.cancel(data.draw(st.sampled_from(self.world.alive())))
            case "clear":
                (self.world.prefill if is_so else self.world.decode).engine.pool.clear()
            case "decode dies":
                self.world.kill_decode(loses_messages=is_so, is_retried=lambda: data.draw(st.sampled_from([1, 1, 0])))
            case "prefill dies":
                self.world.kill_prefill(loses_messages=is_so)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


class TestLeaseMachine(LeaseMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=50, derandomize=True, **_SETTINGS)


@pytest.mark.slow
class TestLeaseMachineAtLength(LeaseMachine.TestCase):
    settings = settings(max_examples=200, stateful_step_count=80, **_SETTINGS)


# ----------------------------------------------------------------------------------------------------- long random runs


def drive_at_random(seed: int, num_events: int) -> World:
    """Progress most of the time, so that every stage is reached, with everything else in between."""
    rng = random.Random(seed)
    prefill = config_of(rng.choice([4, 6, 8]), rng.choice([8, 12, 24]), rng.randint(1, 4))
    decode = config_of(8, rng.choice([8, 24]), rng.randint(2, 6), threshold=rng.choice([1, 6]))
    world = World(prefill, decode, rng.randint(6, 10), rng.randint(10, 20))
    for _ in range(num_events):
        action = rng.random()
        pulls = world.decode.pulls
        if action < 0.1 and len(world.alive()) < 8:
            add_at_random(world, rng)
        elif action < 0.35 and world.deliverable():
            world.deliver(*rng.choice(world.deliverable()))
        elif action < 0.5 and pulls:
            pull = rng.choice(pulls)
            lacking = [position for position in range(len(pull.pairs)) if position not in pull.copied]
            if pull.source is None:
                world.decode.begin_pull(pull)
            elif lacking and rng.random() < 0.5:
                world.decode.copy(pull, rng.choice(lacking))
                world.decode.renew(pull)
            else:
                lost = set(rng.sample(lacking, rng.randint(0, len(lacking))))
                world.decode.end_pull(pull, rng.choice(["well", "well", "well", "some", "none", "late"]), lost)
        elif action < 0.51 and world.late:
            world.land(rng.choice(world.late))
        elif action < 0.54:
            world.pass_time(rng.choice([0.3, 0.3, 1.0, LEASE_S + 0.1]))
        elif action < 0.545 and world.alive():
            world.cancel(rng.choice(world.alive()))
        elif action < 0.552:
            world.kill_decode(loses_messages=rng.random() < 0.5, is_retried=lambda: rng.random() < 0.8)
        elif action < 0.557:
            world.kill_prefill(loses_messages=rng.random() < 0.5)
        elif action < 0.8:
            step = world.prefill.engine.step
            world.step_prefill({part.seq_id for part in step.parts if rng.random() < 0.03} if step else set())
        else:
            world.step_decode()
        world.check()
    return world


def add_at_random(world: World, rng: random.Random) -> None:
    prompt = [*BASES[rng.randrange(2)][: rng.randint(1, 30)], rng.randrange(VOCABULARY)]
    world.add(
        prompt[: world.max_len - 1],
        SamplingParams(max_tokens=rng.randint(1, 8)),
        salt=rng.choice([b"", b"", b"s"]),
        priority=rng.choice([0, 0, 1]),
        is_remote=rng.random() < 0.9,
        manners=rng.choice(["polite", "polite", "hasty", "mute"]),
        patience_s=rng.choice([None] * 5 + [4.0]),
    )


def test_long_random_runs_meet_every_accident_and_end_clean() -> None:
    seen: Counter[str] = Counter()
    for seed in range(16):
        world = drive_at_random(seed, 400)
        world.drain()
        seen += world.seen
    accidents = (
        "finished",
        "copied",
        "damaged",
        "published early",
        "expired",
        "late writes",
    )
    accidents += ("peer lost", "refused", "prefill failed", "retried", "asked again", "too late")
    assert seen.keys() == set(accidents)
    assert min(seen.values()) >= 5, f"the runs must meet everything that is counted: {seen}"


@pytest.mark.slow
def test_many_long_random_runs_end_clean() -> None:
    for seed in range(100, 200):
        drive_at_random(seed, 600).drain()


# ------------------------------------------------------------------------------------------------- it is able to fail


def reused_under_a_pull(*, verifies: bool) -> World:
    """A pull copies only after its lease has ended and its source blocks hold another prompt."""
    config = config_of(8, 24, 4)
    world = World(config, config, num_prefill_blocks=4, num_decode_blocks=16, verifies=verifies)
    world.add(BASES[0][:10], SamplingParams(max_tokens=5))
    while not world.decode.pulls:
        world.step_prefill()
        for connection, to_prefill in world.deliverable():
            world.deliver(connection, to_prefill)
    (pull,) = world.decode.pulls
    world.decode.begin_pull(pull)
    world.pass_time(LEASE_S + 0.5)
    world.add(BASES[1][:15], SamplingParams(max_tokens=5))
    for _ in range(4):
        for connection, to_prefill in world.deliverable():
            world.deliver(connection, to_prefill)
        world.step_prefill()
    world.check()
    world.decode.end_pull(pull, "well")
    world.check()
    world.drain()
    return world


def test_a_block_reused_under_a_pull_is_noticed_by_its_checksum_and_computed() -> None:
    world = reused_under_a_pull(verifies=True)
    assert world.seen["damaged"] == 3
    assert world.seen["finished"] == 2


def test_without_checksums_the_model_sees_the_wrong_content() -> None:
    with pytest.raises(AssertionError, match="a name never lies"):
        reused_under_a_pull(verifies=False)


allocate, keep, on_event = BlockPool.allocate, SequenceLedger.keep, LeaseBook.on_event


def free_without_quarantine(pool: BlockPool, block_ids: Sequence[int], until_s: float) -> None:
    pool.unpin(block_ids)


def reuse_without_a_new_generation(pool: BlockPool, num_blocks: int) -> list[int]:
    block_ids = allocate(pool, num_blocks)
    for block_id in block_ids:
        pool._generations[block_id] -= 1
    return block_ids


def commit_bad_orphans(
    ledger: SequenceLedger, seq_id: str, bad_indexes: frozenset[int], quarantine_until_s: float | None
) -> None:
    for target in ledger.orphans.pop(seq_id, []):
        if target.name:
            ledger.pool.commit(target.block_id, target.name)
        ledger.pool.unpin([target.block_id])


def give_back_what_is_kept(ledger: SequenceLedger, seq: object) -> None:
    keep(ledger, seq)
    ledger._give_back(seq)


def forget_without_freeing(book: LeaseBook, request_ids: list[str], *, is_expired: bool = False) -> list[FreeBlocks]:
    for request_id in request_ids:
        del book._leases[request_id]
    return []


def never_expire(book: LeaseBook, event: LeaseEvent, now_s: float) -> list[FreeBlocks]:
    return [] if isinstance(event, leases.TimePassed) else on_event(book, event, now_s)


def lose_nobody(book: LeaseBook, event: LeaseEvent, now_s: float) -> list[FreeBlocks]:
    return [] if isinstance(event, PeerLost) else on_event(book, event, now_s)


def lose_everybody(book: LeaseBook, event: LeaseEvent, now_s: float) -> list[FreeBlocks]:
    return book._free(list(book._leases)) if isinstance(event, PeerLost) else on_event(book, event, now_s)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (LeaseMachine, "verifies", False),
        (BlockPool, "quarantine", free_without_quarantine),
        (BlockPool, "allocate", reuse_without_a_new_generation),
        (SequenceLedger, "free_orphans", commit_bad_orphans),
        (SequenceLedger, "keep", give_back_what_is_kept),
        (LeaseBook, "_free", forget_without_freeing),
        (LeaseBook, "on_event", never_expire),
        (LeaseBook, "on_event", lose_nobody),
        (LeaseBook, "on_event", lose_everybody),
    ],
)
def test_the_machine_finds_what_is_wrong(monkeypatch, owner, name, wrong) -> None:
    monkeypatch.setattr(owner, name, wrong)
    enough = settings(
        max_examples=300, stateful_step_count=50, derandomize=True, phases=[Phase.generate], database=None, **_SETTINGS
    )
    with pytest.raises((AssertionError, InvariantError)):
        run_state_machine_as_test(LeaseMachine, settings=enough)
