"""What two workers that exist for a test compute with, and what travels between them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    Event,
    Instruction,
    RunStep,
    Sampled,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
)
from engine.scheduling.scheduler import Scheduler
from kvcache.locations import BlockLocation
from kvcache.names import unpack_tokens
from kvcache.pool import BlockPool, BlockState
from messages.errors import WorkerError
from messages.request import GenerateRequest
from messages.wire import Message
from tests.fake_kv import FINGERPRINT, kv_numbers, next_token, seed_number
from tests.slot_mirror import SlotMirror

SIZE = 4  #: tokens in a block
LEASE_S = 3.0
QUARANTINE_S = 3.0
REMOTE_TIMEOUT_S = 10.0
LONGER_THAN_ALL_S = 11.0
TORN, UNARRIVED, LATE = 1, 2, 3  #: bytes that are no token's

Ending = Literal["well", "some", "none", "late"]  #: how a pull ends
Manners = Literal["polite", "hasty", "mute"]  #: releases as engine.loans says; with a pull to begin, too; never
#: Who is said to hold a prompt's blocks: the prefill worker, too far for loading alone, or somebody who is gone first.
Holders = Literal["nobody", "near", "slow", "gone"]

if TYPE_CHECKING:
    from tests.prefill.world import World


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

    address: str  #: of the prefill worker
    asker: bytes
    source: list[list[int]]  #: the blocks of the prefill worker at the other end; they can be read after its death
    to_prefill: deque[Message] = field(default_factory=deque)
    to_decode: deque[Message] = field(default_factory=deque)
    is_prefill_dead: bool = False
    is_decode_dead: bool = False


@dataclass(eq=False)
class Pull:
    """A PullBlocks that was handed out."""

    seq_id: str
    address: str
    pairs: list[tuple[BlockLocation, int]]
    generations: list[int]  #: of the targets
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
        self.slots = SlotMirror(config.max_num_seqs)
        self.kv = [[0] * SIZE for _ in range(num_blocks)]
        self.step: StepPlan | None = None
        self.in_step: dict[int, int] = {}  # block -> generation, of all tables of the step
        self.generations = [self.pool.generation(block_id) for block_id in range(num_blocks)]
        self.known: dict[int, tuple[int, int]] = {}  # as engine.memory.checksums.BlockChecksums

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
        self.step = plan = self.slots.take_in(plan, self.scheduler)
        self.in_step = {b: self.pool.generation(b) for part in plan.parts for b in self.slots[part].block_table}
        for part in plan.parts:
            for position in range(part.start, part.end):  # whoever reads it meanwhile reads something unfinished
                block_id = self.slots[part].block_table[position // SIZE]
                assert self.pool.state(block_id) is BlockState.WRITING
                self.kv[block_id][position % SIZE] = TORN

    def _compute(self, plan: StepPlan, failed: set[str]) -> StepResult:
        for block_id, generation in self.in_step.items():
            assert self.pool.generation(block_id) == generation, "nothing is reused under a running step"
        sampled: dict[str, Sampled] = {}
        for part in plan.parts:
            request, slot = self.world.requests[part.seq_id], self.slots[part]
            table = slot.block_table
            for position in range(part.start, part.end):
                before = seed_number(request.message.salt) if position == 0 else self._at(table, position - 1)
                self.kv[table[position // SIZE]][position % SIZE] = hash((before, slot.token_ids[position]))
            read = [self._at(table, position) for position in range(part.end)]
            assert read == request.numbers[: part.end], "a token attends to its own past"
            if part.is_sampled and part.seq_id not in failed:
                sampled[part.seq_id] = Sampled(next_token(read[-1]))
            if part.is_kept:
                end = -(-part.end // SIZE) if part.is_sampled else part.end // SIZE
                self.published(table[part.start // SIZE : end])
        elapsed_s = 1e-3 * sum(part.num_tokens for part in plan.parts)
        return StepResult(sampled=sampled, errors={seq_id: WorkerError("no") for seq_id in failed}, elapsed_s=elapsed_s)

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
    return hash(tuple(content)) % 2**64


@dataclass
class Published:
    """What was published of a prompt."""

    blocks: list[BlockLocation] = field(default_factory=list)
    is_whole: bool = False
