"""A prefill and a decode worker for a test: real books, schedulers and pools; channels, roads and engines are lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from decode.streams import (
    AskPrefill,
    BeginSequence,
    Cancelled,
    CancelSequence,
    Reply,
    Requested,
    StreamBook,
    StreamEvent,
)
from engine.lending import Lender
from engine.loans import (
    AskOwner,
    BeginPull,
    HandedOff,
    LearnHandoff,
    LoanBook,
    LoanEvent,
    OwnerLost,
    PromptWanted,
    PullProgressed,
    PullStopped,
    Refused,
    SchedulerTold,
    SequenceOver,
    TellOwner,
    TellScheduler,
)
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    AskAhead,
    AskBlocks,
    BlocksReleased,
    EmitTokens,
    Event,
    Instruction,
    LendBlocks,
    PullBlocks,
    SequenceAdded,
    SequenceCancelled,
    StopAsking,
    StopRemote,
)
from kvcache.leases import AskerLost, FreeBlocks, LeaseEvent, Released, Renewed, TimePassed
from kvcache.locations import each_location, num_locations, pack_locations
from kvcache.pool import BlockState
from messages.handoff import (
    BlocksRequest,
    KvHandoff,
    PrefetchBlocks,
    PrefillFailed,
    PrefillRequest,
    ReleaseLease,
    RenewLease,
)
from messages.price import MovePrice
from messages.request import Copy
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
from tests.locations import pairs_of
from tests.prefill.fake_engine import (
    LEASE_S,
    QUARANTINE_S,
    SIZE,
    UNARRIVED,
    Connection,
    Ending,
    FakeEngine,
    LateWrite,
    Published,
    Pull,
    Request,
    checksum,
)

if TYPE_CHECKING:
    from tests.prefill.world import World


#: Seconds that a block takes from a tier; computing it takes four milliseconds, by the assumed price.
_BLOCK_S = {"device": 1e-4, "disk": 4e-3}


class WorldLender(Lender):
    """A lender by the world's clock."""

    def __init__(self, side: PrefillSide) -> None:
        super().__init__(LEASE_S, side.post, side.send_lent, side.engine.published)
        self._side = side

    def _decide(self, event: LeaseEvent) -> None:
        for freed in self.leases.on_event(event, self._side.world.now_s):
            self._questions.pop(freed.request_id, None)
            self._side.world.seen["lease on lent blocks expired"] += freed.is_expired
            self._post(BlocksReleased(freed.request_id))


class PrefillSide:
    """Carries out what a publication book says, and checks each publication; lends blocks by name."""

    def __init__(self, world: World, config: SchedulerConfig, num_blocks: int) -> None:
        self.world = world
        self.engine = FakeEngine(world, config, num_blocks)
        self.book = PublicationBook(LEASE_S, SIZE)
        self.lender = WorldLender(self)
        self.published: dict[str, Published] = {}

    def post(self, event: Event) -> None:
        self.on_instructions(self.engine.carry_out(event))

    def on_message(self, asker: bytes, message: Message) -> None:
        match message:
            case BlocksRequest() | RenewLease() | ReleaseLease() if self.lender.take(asker, message):
                pass
            case PrefetchBlocks():
                pass  # it has no slower tier
            case PrefillRequest(request=request):
                self.world.seen["asked again"] += self.book.leases.asker_of(request.request_id) is not None
                self.decide(PromptAsked(asker, message))
            case RenewLease(request_id=request_id):
                self.decide(Renewed(request_id, asker))
            case ReleaseLease(request_id=request_id):
                self.decide(Released(request_id, asker))
            case _:
                raise AssertionError(message)

    def on_sender_lost(self, asker: bytes) -> None:
        self.lender.lose(asker)
        seq_ids = self.engine.scheduler.seq_ids
        others = {seq_id for seq_id in seq_ids() if self.book.leases.asker_of(seq_id) != asker}
        self.decide(AskerLost(asker))
        assert set(seq_ids()) == others, "all of that asker is freed, and nothing of others"

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, LendBlocks):
                self.lender.lend(instruction)
            else:
                self.decide(instruction)

    def pass_time(self) -> None:
        self.lender.pass_time()
        self.decide(TimePassed())

    def send_lent(self, asker: bytes, handoff: Message) -> None:
        assert isinstance(handoff, KvHandoff)
        self.world.seen["lent by name"] += num_locations(handoff.blocks)
        self.world.seen["not there any more"] += not handoff.blocks
        for block in each_location(handoff.blocks):
            assert self.engine.kv[block.block_id] == self.world.content_of[block.name]
            assert block.checksum == checksum(self.engine.kv[block.block_id])
        self.world.send_to_decode(asker, handoff)

    def decide(self, event: PublicationEvent) -> None:
        for instruction in self.book.on_event(event, self.world.now_s):
            match instruction:
                case BeginPrompt(spec):
                    self.post(SequenceAdded(spec))
                case FreeBlocks(request_id, is_expired):
                    published = self.published.pop(request_id, Published())
                    self.world.seen["expired"] += is_expired
                    assert published.is_whole or not is_expired, "what is still computed has no lease to expire"
                    self.post(SequenceCancelled(request_id))
                    self.post(BlocksReleased(request_id))
                    self.decide(BlocksFreed(request_id))
                case Publish(asker, handoff):
                    self._publish(asker, handoff)
                case TellFailed(asker, message):
                    self.published.pop(message.request_id, None)
                    self.world.send_to_decode(asker, message)

    def _publish(self, asker: bytes, handoff: KvHandoff) -> None:
        pool, blocks = self.engine.pool, each_location(handoff.blocks)
        published = self.published.setdefault(handoff.request_id, Published())
        assert not published.is_whole, "the last handoff is the last"
        assert handoff.is_last == (handoff.first_token is not None)
        checksums = self.engine.published([block.block_id for block in blocks])
        numbers = self.world.requests[handoff.request_id].numbers
        for block, value in zip(blocks, checksums, strict=True):
            content = self.engine.kv[block.block_id]
            assert block.generation == pool.generation(block.block_id)
            assert pool.num_pins(block.block_id) > 0
            assert value == checksum(content), "what is remembered is what lies there"
            assert content[: block.num_tokens] == numbers[block.index * SIZE :][: block.num_tokens], "it is written"
        published.blocks += blocks
        published.is_whole = handoff.is_last
        self.world.seen["published early"] += bool(blocks) and not handoff.is_last
        summed = [
            msgspec.structs.replace(block, checksum=value) for block, value in zip(blocks, checksums, strict=True)
        ]
        self.world.send_to_decode(asker, msgspec.structs.replace(handoff, blocks=pack_locations(summed)))

    def check(self) -> None:
        self.engine.check()
        self.book.check_invariants(self.engine.scheduler.seq_ids())
        assert self.published.keys() <= set(self.engine.scheduler.seq_ids())
        pool = self.engine.pool
        for published in self.published.values():
            for location in published.blocks if published.is_whole else []:
                assert pool.num_pins(location.block_id) > 0, "what is leased is pinned"
                assert pool.generation(location.block_id) == location.generation
        assert self.engine.scheduler._ledger.lent.keys() == self.lender._questions.keys()


class DecodeSide:
    """Carries out what a book of streams and one of loans say; pulls are led from outside."""

    def __init__(self, world: World, config: SchedulerConfig, num_blocks: int) -> None:
        self.world = world
        self.engine = FakeEngine(world, config, num_blocks)
        self.engine.scheduler.set_prices(self.price_of)
        self.book = StreamBook()
        self.loans = LoanBook()
        self.pulls: list[Pull] = []
        self.pulled_ahead: set[str] = set()  # sequences whose pull began before they were admitted
        self.connections: dict[str, Connection] = {}  # by address

    def can_pull(self, address: str) -> bool:
        return not self.loans.is_avoided(address, self.world.now_s)

    def price_of(self, copy: Copy) -> MovePrice | None:
        if not self.can_pull(copy.address):
            return None
        return MovePrice(source=copy.address, road="", fixed_s=0.0, byte_s=_BLOCK_S[copy.tier], handoff_s=0.0)

    def post(self, event: Event) -> None:
        self.on_instructions(self.engine.carry_out(event))
        if isinstance(event, SequenceCancelled):
            self.borrow(SequenceOver(event.seq_id))

    def accept(self, request: Request) -> None:
        address = request.message.prefill_address
        self.decide(Requested(b"ingress", request.message, address is not None and self.can_pull(address)))

    def cancel(self, request_id: str) -> None:
        self.decide(Cancelled(request_id))

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        of_streams = []
        for instruction in instructions:
            match instruction:
                case AskBlocks(is_tail_first=is_mixed):
                    self.world.seen["head computed meanwhile"] += is_mixed
                    self.borrow(instruction)
                case AskAhead() | StopAsking() | StopRemote() | PullBlocks():
                    self.borrow(instruction)
                case _:
                    of_streams.append(instruction)
        for instruction in of_streams:
            self.decide(instruction)
        for instruction in of_streams:
            if isinstance(instruction, EmitTokens) and instruction.finish_reason is not None:
                self.borrow(SequenceOver(instruction.seq_id))

    def on_message(self, address: str, message: Message) -> None:
        before = self.loans.num_refused
        match message:
            case KvHandoff(request_id=loan_id, is_last=is_last):
                self.borrow(HandedOff(address, message))
                request_id = self.world.request_id_of(loan_id)
                is_hasty = self.world.requests[request_id].manners == "hasty"
                if is_last and is_hasty and any(pull.seq_id == request_id for pull in self._waiting_pulls()):
                    self._send(address, ReleaseLease(request_id=loan_id))
            case PrefillFailed(request_id=request_id):
                self.borrow(Refused(address, request_id))
            case _:
                raise AssertionError(message)
        self.world.seen["prefill failed"] += self.loans.num_refused - before

    def on_owner_lost(self, address: str) -> None:
        del self.connections[address]
        before = self.loans.num_refused
        self.borrow(OwnerLost(address))
        self.world.seen["refused"] += self.loans.num_refused - before

    def decide(self, event: StreamEvent) -> None:
        """As DecodeWorker."""
        for instruction in self.book.on_event(event, self.world.now_s):
            match instruction:
                case Reply(_, chunk):
                    self.world.take_tokens(chunk)
                case BeginSequence(spec):
                    self.post(SequenceAdded(spec))
                case CancelSequence(request_id):
                    self.post(SequenceCancelled(request_id))
                case AskPrefill(address, message):
                    self.borrow(PromptWanted(address, message))

    def borrow(self, event: LoanEvent) -> None:
        """As Borrower."""
        for instruction in self.loans.on_event(event, self.world.now_s):
            match instruction:
                case TellScheduler(seq_id, told):
                    self.post(told)
                    self.borrow(SchedulerTold(seq_id))
                case AskOwner(address, message):
                    if address not in self.connections:
                        self.connections[address] = self.world.connect(address)
                    self._send(address, message)
                case TellOwner(address, message):
                    is_mute = self.world.requests[self.world.request_id_of(message.request_id)].manners == "mute"
                    if not (is_mute and isinstance(message, ReleaseLease)):
                        self._send(address, message)
                case BeginPull(pull):
                    self._take_pull(pull)
                case LearnHandoff(_, tier, elapsed_s, source_s, num_blocks, _):
                    self.world.seen["learned"] += 1
                    assert 0 <= source_s <= elapsed_s
                    assert num_blocks or tier is None

    def _send(self, address: str, message: Message) -> None:
        connection = self.connections.get(address)
        if connection is not None and not connection.is_prefill_dead:
            connection.to_prefill.append(message)

    # --------------------------------------------------------------------------------------------------------- pulls

    def _waiting_ids(self) -> set[str]:
        return {seq.seq_id for seq in self.engine.scheduler._ledger.waiting}

    def _waiting_pulls(self) -> list[Pull]:
        return [pull for pull in self.pulls if pull.source is None]

    def _take_pull(self, pull: PullBlocks) -> None:
        pool = self.engine.pool
        pairs = pairs_of(pull)
        assert pairs
        is_ahead = pull.seq_id in self._waiting_ids()
        self.world.seen["pulled for who waits"] += is_ahead
        if is_ahead:
            self.pulled_ahead.add(pull.seq_id)
        for _, target in pairs:
            assert pool.state(target) is BlockState.WRITING
            assert pool.num_pins(target) == 1
        generations = [pool.generation(target) for _, target in pairs]
        self.pulls.append(Pull(pull.seq_id, pull.source, pairs, generations))

    def begin_pull(self, pull: Pull) -> None:
        """It needs the prefill worker; without it all of it is bad."""
        connection = self.connections.get(pull.address)
        if connection is None:
            self._pull_ended(pull, frozenset(location.index for location, _ in pull.pairs))
        else:
            pull.source = connection.source

    def look_at(self, pull: Pull) -> None:
        self.borrow(PullProgressed(pull.seq_id, len(pull.copied)))

    def copy(self, pull: Pull, position: int) -> None:
        """One block as it is at this moment, and verified where it lies now."""
        assert pull.source is not None
        location, _ = pull.pairs[position]
        content = self._write(pull, position, pull.source[location.block_id])
        pull.copied[position] = checksum(content) == location.checksum or not self.world.verifies
        self.world.seen["copied"] += 1

    def end_pull(self, pull: Pull, ending: Ending, lost: set[int] = frozenset()) -> None:
        """As engine/puller.py: what was damaged is asked for once more; what is quarantined is all bad.

        Of the blocks that have not come yet "well" brings all, "some" those not in `lost`, "none" and "late" none.
        """
        for position in range(len(pull.pairs)):
            if position in pull.copied:
                continue
            if ending == "well" or (ending == "some" and position not in lost):
                self.copy(pull, position)
            else:
                self._write(pull, position, [UNARRIVED] * SIZE)
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
        self._pull_ended(pull, bad, QUARANTINE_S if ending == "late" else 0.0)

    def _pull_ended(self, pull: Pull, bad: frozenset[int], quarantine_s: float = 0.0) -> None:
        self.pulls.remove(pull)
        is_joined = pull.seq_id in self.pulled_ahead and pull.seq_id in self.engine.scheduler._ledger.pulling
        self.world.seen["admitted under its pull"] += is_joined
        self.pulled_ahead.discard(pull.seq_id)
        self.borrow(PullStopped(pull.seq_id, bad, quarantine_s))

    def _write(self, pull: Pull, position: int, content: list[int]) -> list[int]:
        _, target = pull.pairs[position]
        assert self.engine.pool.generation(target) == pull.generations[position], "no target is reused under its pull"
        self.engine.kv[target] = list(content)
        return self.engine.kv[target]

    def check(self) -> None:
        self.engine.check()
        seq_ids = self.engine.scheduler.seq_ids()
        self.book.check_invariants(seq_ids)
        self.loans.check_invariants(seq_ids)
        assert self.loans.num_pulls == len(self.pulls)
        loans = self.loans._loans
        open_sources = {(loan.seq_id, loan.source) for loan in loans.values() if not loan.is_offered_whole}
        for seq_id, seq in self.engine.scheduler._ledger.sequences.items():
            if seq.pull is not None:
                assert seq.pull.has_last_offer or seq_id in loans, "who waits for blocks has asked for them"
                assert {(seq_id, holder) for holder in seq.pull.holders} <= open_sources
        intakes = self.engine.scheduler._ledger.intakes
        for seq_id in intakes.ids():
            intake = intakes.find(seq_id)
            assert intake.is_offered_whole or (seq_id, intake.source) in open_sources, "who waits for blocks asked"
