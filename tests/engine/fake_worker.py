"""A worker around the real scheduler and pool: its KV is numbers, its client knows what must come."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    AskAhead,
    AskBlocks,
    AskRemote,
    BlocksOffered,
    BlocksReleased,
    BlocksWanted,
    EmitTokens,
    FoundAhead,
    KvOffered,
    KvRefused,
    LendBlocks,
    OfferBlocks,
    OffloadBlocks,
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
    StopAsking,
    TakeIn,
    TimePassed,
)
from engine.scheduling.scheduler import Scheduler
from kvcache.locations import BlockLocation, each_location, pack_locations
from kvcache.names import block_names, pack_tokens, split_names
from kvcache.pool import BlockPool, BlockState
from messages.errors import WorkerError
from messages.handoff import FoundRun
from messages.price import MovePrice
from messages.request import Copy
from messages.stream import TokenLogprob
from tests.fake_kv import FINGERPRINT, kv_numbers, next_token
from tests.locations import pairs_of
from tests.slot_mirror import MirroredSlot, SlotMirror


@dataclass
class Expected:
    """What a sequence must give, known when it is added."""

    spec: SequenceSpec
    token_ids: list[int]  #: prompt and all that will be generated
    numbers: list[int]
    reason: str
    num_given: int  #: tokens of `token_ids` known to whoever asked
    is_over: bool = False
    is_cancelled: bool = False
    has_sources: bool = False
    held: set[int] = field(default_factory=set)  #: indexes the peer need not offer


def expect(spec: SequenceSpec, max_len: int) -> Expected:
    token_ids = list(spec.token_ids)
    params, num_prompt = spec.params, spec.num_prompt_tokens
    max_tokens = 1 if spec.is_kept else params.max_tokens
    while True:
        num_output = len(token_ids) - num_prompt
        if num_output > params.min_tokens and token_ids[-1] in params.stop_token_ids:
            reason = "stop"
            break
        if num_output and (num_output >= max_tokens or len(token_ids) >= max_len):
            reason = "length"
            break
        token_ids.append(next_token(kv_numbers(spec.salt, token_ids)[-1]))
    return Expected(spec, token_ids, kv_numbers(spec.salt, token_ids), reason, len(spec.token_ids))


#: Seconds of a block, by its tier; the fake compute price is a millisecond a token and block. "lost" cannot be reached.
_BLOCK_S = {"device": 1e-4, "host": 2e-4, "disk": 4e-3, "remote": 1e-2}


def price_of(copy: Copy) -> MovePrice | None:
    if copy.address == "lost":
        return None
    return MovePrice(
        source=copy.address, tier=copy.tier, road="fake", fixed_s=0.0, byte_s=_BLOCK_S[copy.tier], handoff_s=0.0
    )


@dataclass
class RunningStep:
    plan: StepPlan
    slots: list[MirroredSlot]  #: of its parts: who was in them as it began
    generations: dict[int, int]
    writers: dict[int, str]  #: by block that it writes: the sequence


class FakeWorker:
    """Carries instructions out on lists, and checks each of them."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.scheduler = Scheduler(config, pool, FINGERPRINT, price_of=price_of)
        self.scheduler.set_node_cache("cache")
        self.slots = SlotMirror(config.max_num_seqs)
        self.max_len = min(config.max_model_len, pool.num_blocks * pool.block_size)
        self.kv: list[list[int | None]] = [[None] * pool.block_size for _ in range(pool.num_blocks)]
        self.now_s = 100.0
        self.sequences: dict[str, Expected] = {}
        self.steps: deque[RunningStep] = deque()  # those that run, oldest first
        self.num_ahead = self.num_for_nothing = 0  # parts that awaited a token; of those, whose sequence had ended
        self.asked: dict[str, int] = {}  # remote sequences whose peer has not ended: first index to offer
        self.offered: dict[str, set[int]] = {}
        self.pulls: dict[str, tuple[list[tuple[BlockLocation, int]], dict[int, int]]] = {}
        self.kept: dict[str, list[BlockLocation]] = {}  # offered, not released
        self.questions: dict[tuple[str, str], range] = {}  # by sequence and holder: indexes that were asked for
        self.ahead: dict[tuple[str, str], range] = {}  # the same, of those that wait
        self.num_found_ahead = 0
        self.lent: dict[str, list[BlockLocation]] = {}
        self.taken_in: dict[str, tuple[bytes, ...]] = {}  # names that are under way, by intake
        self.num_intakes = 0
        self.pulled_ahead: set[str] = set()  # sequences whose pull began before they were admitted
        self.num_joined = self.num_left = 0  # of them, those that were admitted under that pull, or ended
        self.offloaded: set[bytes] = set()  # names that lower tiers were told of
        self.num_mixed = 0
        self.published: list[tuple[BlockLocation, list[int]]] = []
        self.content_of: dict[bytes, list[int]] = {}  # by block name
        self.index: set[bytes] = set()  # what a router would believe

    # ------------------------------------------------------------------------------------------------------- events

    def post(self, event) -> None:
        for instruction in self.scheduler.on_event(event, self.now_s):
            match instruction:
                case RunStep(plan):
                    assert isinstance(event, StepWanted)
                    self._start(plan)
                case AskRemote(seq_id, num_held):
                    assert num_held % self.pool.block_size == 0
                    assert num_held < self.sequences[seq_id].spec.num_prompt_tokens
                    self.asked[seq_id] = num_held // self.pool.block_size
                    if seq_id not in self.pulls:  # else it goes on with what it was offered while it waited
                        self.offered[seq_id] = set()
                case AskBlocks(seq_id, source, first_index, names) if seq_id not in self.sequences:
                    assert isinstance(event, TakeIn)
                    assert (seq_id, source, first_index) == (event.intake_id, event.source, 0)
                    assert names
                    assert not {name for asked in self.taken_in.values() for name in asked} & set(names)
                    assert set(names) <= set(event.names)
                    self.taken_in[seq_id] = names
                    self.questions[seq_id, source] = range(len(names))
                    self.offered[seq_id] = set()
                case AskAhead(seq_id, source, first_index, names):
                    every = split_names(self.names_of(self.sequences[seq_id]))
                    assert names
                    assert list(names) == every[first_index : first_index + len(names)]
                    assert (seq_id, source) not in self.ahead
                    self.ahead[seq_id, source] = range(first_index, first_index + len(names))
                case AskBlocks(seq_id, source, first_index, names, is_tail_first):
                    assert (seq_id, source) not in self.ahead
                    self.num_mixed += is_tail_first
                    expected = self.sequences[seq_id]
                    every = split_names(self.names_of(expected))
                    assert list(names) == every[first_index : first_index + len(names)]
                    assert source != "lost"
                    self.questions[seq_id, source] = range(first_index, first_index + len(names))
                    self.offered.setdefault(seq_id, set())
                case StopAsking(seq_id, source) if (seq_id, source) in self.ahead:
                    del self.ahead[seq_id, source]
                case StopAsking(seq_id, source):
                    del self.questions[seq_id, source]
                case OffloadBlocks(names):
                    assert self.config.has_lower_tiers
                    assert names
                    assert self.content_of.keys() >= set(names)
                    self.offloaded |= set(names)
                case LendBlocks(lease_id, blocks):
                    self._take_lent(lease_id, each_location(blocks))
                case PullBlocks(seq_id):
                    self._start_pull(seq_id, pairs_of(instruction))
                case EmitTokens():
                    self._take_tokens(instruction)
                case OfferBlocks():
                    self._take_offer(instruction)
        self.check()

    def add(self, spec: SequenceSpec) -> None:
        expected = expect(spec, self.max_len)
        self.sequences[spec.seq_id] = expected
        names = split_names(block_names(FINGERPRINT, spec.salt, pack_tokens(expected.token_ids), self.pool.block_size))
        size = self.pool.block_size
        for index, name in enumerate(names):
            numbers = expected.numbers[index * size : (index + 1) * size]
            assert self.content_of.setdefault(name, numbers) == numbers
        self.post(SequenceAdded(spec))

    def names_of(self, expected: Expected) -> bytes:
        return block_names(FINGERPRINT, expected.spec.salt, pack_tokens(expected.token_ids), self.pool.block_size)

    def offer_blocks(
        self, seq_id: str, source: str, indexes: list[int], *, is_last: bool, wrong: set[int] = frozenset()
    ) -> None:
        """A holder offers blocks that it was asked for; those in `wrong` are named as something else."""
        names = self.taken_in.get(seq_id) or split_names(self.names_of(self.sequences[seq_id]))
        blocks = [
            BlockLocation(i, 7, 7, b"another's name.." if i in wrong else names[i], self.pool.block_size)
            for i in indexes
        ]
        self.offered[seq_id] |= set(indexes)
        if is_last:
            del self.questions[seq_id, source]
        self.post(BlocksOffered(seq_id, source, pack_locations(blocks), is_last))

    def find_ahead(self, seq_id: str, source: str, runs: list[FoundRun]) -> None:
        """A holder says where it has what it will be asked for."""
        self.num_found_ahead += 1
        self.post(FoundAhead(seq_id, source, tuple(runs)))

    def lend(self, lease_id: str, seq_id: str, first_index: int) -> None:
        names = split_names(self.names_of(self.sequences[seq_id]))
        self.post(BlocksWanted(lease_id, first_index, tuple(names[first_index:])))

    def end_lending(self, lease_id: str) -> None:
        del self.lent[lease_id]
        self.post(BlocksReleased(lease_id))

    def take_in(self, seq_id: str, first_index: int, used_s: float | None) -> None:
        """Somebody says that blocks of this sequence are worth having."""
        self.num_intakes += 1
        names = split_names(self.names_of(self.sequences[seq_id]))[first_index:]
        self.post(TakeIn(f"intake {self.num_intakes}", "near", tuple(reversed(names)), used_s))

    def mark(self, seq_id: str, first_index: int, *, is_spare: bool) -> None:
        """The router says who keeps blocks of this sequence."""
        names = split_names(self.names_of(self.sequences[seq_id]))[first_index:]
        self.pool.mark(names, is_spare=is_spare)

    def _take_lent(self, lease_id: str, blocks: list[BlockLocation]) -> None:
        for location in blocks:
            assert location.generation == self.pool.generation(location.block_id)
            assert self.pool.name(location.block_id) == location.name
        self.lent[lease_id] = blocks

    def _forget_questions(self, seq_id: str) -> None:
        for key in [key for key in self.questions if key[0] == seq_id]:
            del self.questions[key]

    def cancel(self, seq_id: str) -> None:
        self.sequences[seq_id].is_cancelled = self.sequences[seq_id].is_over = True
        self.asked.pop(seq_id, None)
        self.kept.pop(seq_id, None)
        self._forget_questions(seq_id)
        self.post(SequenceCancelled(seq_id))

    def end_step(self, failed: set[str] = frozenset(), token_s: float = 1e-3) -> None:
        step = self.steps.popleft()
        parts = step.plan.parts
        for block_id, generation in step.generations.items():
            assert self.pool.generation(block_id) == generation, "nothing is reused under a running step"
        for part, slot in zip(parts, step.slots, strict=True):
            size = self.pool.block_size
            numbers = kv_numbers(self.sequences[part.seq_id].spec.salt, slot.token_ids)
            for position in range(part.start, part.end):
                self.kv[slot.block_table[position // size]][position % size] = numbers[position]
        sampled, logprobs = {}, {}
        for part, slot in zip(parts, step.slots, strict=True):
            self.num_for_nothing += part.awaits_token and self.sequences[part.seq_id].is_over
            numbers = kv_numbers(self.sequences[part.seq_id].spec.salt, slot.token_ids[: part.end])
            assert self._read(slot.block_table, part.end) == numbers, "a token attends to its own past"
            if part.is_sampled:
                sampled[part.seq_id] = Sampled(next_token(numbers[-1]))
                slot.take_sampled(next_token(numbers[-1]))
            if part.wants_prompt_logprobs:
                end = min(part.end + 1, slot.begins.num_prompt_tokens)
                logprobs[part.seq_id] = [TokenLogprob(t, -1.0, 1) for t in slot.token_ids[part.start + 1 : end]]
        errors = {seq_id: WorkerError("no") for seq_id in failed}
        for seq_id in failed:
            sampled.pop(seq_id, None)
            if not self.sequences[seq_id].is_cancelled:
                self.sequences[seq_id].reason = "error"
        elapsed_s = token_s * sum(part.num_tokens for part in parts)
        self.post(StepEnded(StepResult(sampled=sampled, prompt_logprobs=logprobs, errors=errors, elapsed_s=elapsed_s)))

    def offer(
        self, seq_id: str, indexes: list[int], *, is_last: bool, wrong: set[int] = frozenset(), cached: int = 0
    ) -> None:
        """The peer offers blocks; those in `wrong` are named as something else."""
        expected = self.sequences[seq_id]
        num_prompt, size = expected.spec.num_prompt_tokens, self.pool.block_size
        names = split_names(block_names(FINGERPRINT, expected.spec.salt, pack_tokens(expected.token_ids), size))
        blocks = []
        for index in indexes:
            num_tokens = min(size, num_prompt - index * size)
            name = names[index] if num_tokens == size else b""
            blocks.append(BlockLocation(index, 7, 7, b"another's name.." if index in wrong else name, num_tokens))
        first = expected.token_ids[num_prompt] if is_last else None
        self.offered[seq_id] |= set(indexes)
        if is_last:
            del self.asked[seq_id]
        self.post(KvOffered(seq_id, "owner", pack_locations(blocks), is_last, first, None, cached))

    def end_pull(self, seq_id: str, bad: set[int] = frozenset(), quarantine_until_s: float | None = None) -> None:
        pairs, generations = self.pulls.pop(seq_id)
        self.num_joined += seq_id in self.pulled_ahead and seq_id in self.scheduler._ledger.pulling
        self.num_left += seq_id in self.pulled_ahead and self.sequences[seq_id].is_over
        self.pulled_ahead.discard(seq_id)
        size = self.pool.block_size
        for location, target in pairs:
            assert self.pool.generation(target) == generations[target], "no target of a pull is reused under it"
            if location.index in bad:
                self.kv[target] = [-1] * size
            elif seq_id in self.taken_in:
                self.kv[target] = list(self.content_of[location.name])
            else:
                expected = self.sequences[seq_id]
                numbers = expected.numbers[location.index * size :][: location.num_tokens]
                self.kv[target] = [*numbers, *[None] * (size - len(numbers))]
        self.post(PullEnded(seq_id, frozenset(bad), quarantine_until_s))

    def release(self, seq_id: str) -> None:
        self.kept.pop(seq_id, None)
        if not self.sequences[seq_id].is_over:
            self.sequences[seq_id].is_cancelled = self.sequences[seq_id].is_over = True
        self.post(BlocksReleased(seq_id))

    @property
    def may_want_step(self) -> bool:
        return len(self.steps) < 1 + self.config.plans_ahead

    @property
    def step(self) -> RunningStep | None:
        """The one that ends next."""
        return self.steps[0] if self.steps else None

    def want_step(self) -> bool:
        """Whether one runs then."""
        self.post(StepWanted())
        return self.step is not None

    def want_steps(self) -> None:
        """As many as there are to run, and may run at once."""
        num_before = -1
        while self.may_want_step and num_before < len(self.steps):
            num_before = len(self.steps)
            self.want_step()

    # -------------------------------------------------------------------------------------------------- instructions

    def _read(self, table: list[int], num_tokens: int) -> list[int | None]:
        size = self.pool.block_size
        return [self.kv[table[position // size]][position % size] for position in range(num_tokens)]

    def _start(self, plan: StepPlan) -> None:
        assert self.may_want_step
        plan = self.slots.take_in(plan, self.scheduler)
        parts, size = plan.parts, self.pool.block_size
        assert parts
        assert len({part.seq_id for part in parts}) == len(parts)
        kinds = [part.kind for part in parts]
        assert kinds == sorted(kinds), "decode parts come first"
        num_rows = sum(part.kind == "decode" and part.is_sampled and part.num_tokens == 1 for part in parts)
        room = max(self.config.max_num_batched_tokens, num_rows + self.config.chunk_quantum_tokens)
        assert sum(part.num_tokens for part in parts) <= room
        assert len(parts) <= self.config.max_num_seqs
        writers: dict[int, str] = {}
        for part in parts:
            expected, slot = self.sequences[part.seq_id], self.slots[part]
            num_prompt = slot.begins.num_prompt_tokens
            assert not expected.is_over
            assert slot.token_ids == expected.token_ids[: len(slot.token_ids)]
            assert part.num_tokens >= 1
            assert part.is_sampled == (part.end == len(slot.token_ids) + slot.num_awaited)
            assert part.awaits_token == (slot.num_awaited > 0) == (part.end > len(slot.token_ids))
            assert not part.awaits_token or (part.num_tokens == 1 and part.seq_id in self._sampled_next())
            self.num_ahead += part.awaits_token
            assert len(slot.block_table) >= -(-part.end // size)
            if part.kind == "prefill":
                assert part.end <= num_prompt
                if part.end % self.config.chunk_quantum_tokens and part.end != num_prompt:
                    held = self.scheduler._ledger.sequences[part.seq_id].held  # as placed, or found ahead
                    assert held, "only blocks that are on their way cut a chunk"
                    assert part.end % size == 0
            else:
                assert part.start >= num_prompt, "a prompt is never computed as decode rows"
            touched = slot.block_table[part.start // size : -(-part.end // size)]
            for block_id in touched:
                assert self.pool.state(block_id) is BlockState.WRITING
                assert self.pool.num_pins(block_id) == 1
                assert writers.setdefault(block_id, part.seq_id) == part.seq_id, "nobody writes where another writes"
        for pairs, _ in self.pulls.values():
            assert writers.keys().isdisjoint(target for _, target in pairs), "nor where a pull does"
        for step in self.steps:
            assert all(step.writers.get(block_id, seq_id) == seq_id for block_id, seq_id in writers.items())
        slots = [self.slots[part] for part in parts]
        generations = {block_id: self.pool.generation(block_id) for slot in slots for block_id in slot.block_table}
        self.steps.append(RunningStep(plan, slots, generations, writers))

    def _sampled_next(self) -> set[str]:
        """Who gets a token by the step that ends next."""
        return {part.seq_id for part in self.steps[0].plan.parts if part.is_sampled} if self.steps else set()

    def _start_pull(self, seq_id: str, pairs: list[tuple[BlockLocation, int]]) -> None:
        assert seq_id not in self.pulls, "one pull at a time"
        assert pairs
        for step in self.steps:
            assert step.writers.keys().isdisjoint(target for _, target in pairs), "no step writes where a pull does"
        for location, target in pairs:
            assert location.index in self.offered[seq_id]
            assert self.pool.state(target) is BlockState.WRITING
            assert self.pool.num_pins(target) == 1
        if any(seq.seq_id == seq_id for seq in self.scheduler._ledger.waiting):
            self.pulled_ahead.add(seq_id)
        self.pulls[seq_id] = (pairs, {target: self.pool.generation(target) for _, target in pairs})

    def _take_tokens(self, emitted: EmitTokens) -> None:
        expected = self.sequences[emitted.seq_id]
        spec = expected.spec
        assert not expected.is_over, "nothing follows the end or a cancel"
        begin = expected.num_given
        expected.num_given += len(emitted.token_ids)
        assert emitted.token_ids == expected.token_ids[begin : expected.num_given]
        if emitted.token_ids and not expected.has_sources:
            expected.has_sources = True
            sources = emitted.sources
            assert sources is not None
            assert sources.cached + sources.computed == spec.num_prompt_tokens
            assert min(sources.device, sources.peer, sources.host, sources.disk, sources.remote) >= 0
            assert sources.computed >= 0
            check_origins(emitted.plan.got, sources, spec.num_prompt_tokens)
            if spec.params.prompt_logprobs is not None and len(spec.token_ids) == spec.num_prompt_tokens:
                told = [None if entry is None else entry.token_id for entry in emitted.prompt_logprobs]
                assert told == [None, *spec.token_ids[1:]]
        elif emitted.token_ids:
            assert emitted.sources is None
            assert emitted.prompt_logprobs is None
        if emitted.finish_reason is None:
            assert emitted.token_ids
            return
        if emitted.finish_reason == "error":
            assert emitted.error is not None
            assert expected.reason == "error" or self.now_s >= spec.deadline_s
        else:
            assert emitted.finish_reason == expected.reason
            assert expected.num_given == len(expected.token_ids)
            assert emitted.stop_token_id == (expected.token_ids[-1] if expected.reason == "stop" else None)
        expected.is_over = True
        self.asked.pop(emitted.seq_id, None)
        self._forget_questions(emitted.seq_id)
        if emitted.finish_reason == "error":
            self.kept.pop(emitted.seq_id, None)

    def _take_offer(self, offer: OfferBlocks) -> None:
        expected, size = self.sequences[offer.seq_id], self.pool.block_size
        assert expected.spec.is_kept
        assert not expected.is_over
        num_prompt = expected.spec.num_prompt_tokens
        known = {location.index: location for location in self.kept.get(offer.seq_id, [])}
        for location in each_location(offer.blocks):
            numbers = expected.numbers[location.index * size :][: location.num_tokens]
            assert location.num_tokens == min(size, num_prompt - location.index * size)
            assert location.generation == self.pool.generation(location.block_id)
            assert self.kv[location.block_id][: location.num_tokens] == numbers, "what is offered is written"
            assert self.pool.num_pins(location.block_id) > 0
            self.published.append((location, numbers))
            known[location.index] = location
        self.kept[offer.seq_id] = list(known.values())
        if offer.is_last:
            assert sorted(known) == list(range(-(-num_prompt // size)))

    # -------------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        self.scheduler.check_invariants()
        pool = self.pool
        for block_id in range(pool.num_blocks):
            name = pool.name(block_id)
            if name is not None:
                assert self.kv[block_id] == self.content_of[name], "a name never lies"
        for location, numbers in self.published:
            if pool.generation(location.block_id) == location.generation:
                assert self.kv[location.block_id][: location.num_tokens] == numbers, "a generation never lies"
        for seq_id, locations in self.kept.items():
            if self.sequences[seq_id].is_over:  # finished, so no preemption can have moved them
                for location in locations:
                    assert pool.generation(location.block_id) == location.generation
                    assert pool.num_pins(location.block_id) > 0
        for locations in self.lent.values():
            for location in locations:
                assert pool.generation(location.block_id) == location.generation, "what is lent stays"
                assert pool.name(location.block_id) == location.name
        stored, removed = pool.take_events()
        assert self.index.isdisjoint(stored)
        assert self.index.issuperset(removed)
        self.index = (self.index | set(stored)) - set(removed)
        assert self.index == set(pool.snapshot())
        self.published = [p for p in self.published if pool.generation(p[0].block_id) == p[0].generation]
        alive = {seq_id for seq_id, expected in self.sequences.items() if not expected.is_over}
        assert set(self.scheduler.seq_ids()) - set(self.kept) == alive - set(self.kept)
        assert self.scheduler.queued_tokens >= 0
        assert {seq_id for seq_id, _ in self.ahead} <= {seq.seq_id for seq in self.scheduler._ledger.waiting}
        under_way = {seq_id for seq_id, _ in self.questions} | self.pulls.keys()
        intakes = set(self.scheduler._ledger.intakes.ids())
        waiting = {seq.seq_id for seq in self.scheduler._ledger.waiting}
        assert intakes - waiting <= self.taken_in.keys()
        assert intakes <= under_way
        assert under_way & self.taken_in.keys() <= intakes | self.scheduler._ledger.orphans.keys()
        for key in self.taken_in.keys() - intakes:  # of one that is over, what is being pulled is still under way
            pairs, _ = self.pulls.get(key, ([], {}))
            self.taken_in[key] = tuple(location.name for location, _ in pairs)
        self.taken_in = {key: names for key, names in self.taken_in.items() if key in under_way}

    def drain(self) -> None:
        """Peers fall silent or answer, steps run, leases end: then everything has ended and nothing is held."""
        for _ in range(2000):
            self.want_steps()
            if self.step is not None:
                self.end_step()
            elif self.pulls:
                self.end_pull(next(iter(self.pulls)))
            elif self.questions:
                seq_id, source = next(iter(self.questions))
                self.offer_blocks(seq_id, source, [], is_last=True)
            elif lacking := [key for key in self.ahead if self.scheduler._ledger.sequences[key[0]].lacks_holders]:
                self.find_ahead(*lacking[0], [])
            elif self.lent:
                self.end_lending(next(iter(self.lent)))
            elif self.asked:
                seq_id = next(iter(self.asked))
                self.post(KvRefused(seq_id))
                self.asked.pop(seq_id, None)
            elif any(not expected.is_over for expected in self.sequences.values()):
                assert self.kept or self.pool.num_quarantined, "somebody waits for nothing"
                if self.kept:
                    self.release(next(iter(self.kept)))
                else:
                    self.now_s += 5
                    self.post(TimePassed())
            else:
                break
        assert all(expected.is_over for expected in self.sequences.values())
        for seq_id in list(self.kept):
            self.release(seq_id)
        self.now_s += 100
        self.post(TimePassed())
        assert self.scheduler.seq_ids() == ()
        assert self.ahead == {}
        assert self.pool.num_used == 0
        assert self.pool.num_free == self.pool.num_blocks


def check_origins(got, sources, num_prompt_tokens):
    """The runs cover the prompt without a gap, and add up to its sources."""
    assert [run.begin for run in got] == [0, *(run.end for run in got[:-1])]
    assert got[-1].end == num_prompt_tokens
    tokens = Counter()
    for run in got:
        tokens[run.source] += run.end - run.begin
    assert tokens == {name: count for name, count in msgspec.structs.asdict(sources).items() if count}
