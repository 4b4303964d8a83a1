"""What a runner knows, made of lists: fed with nothing but the values of plans, which went over a wire."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from engine.scheduling.plan import SequenceStep, SlotBegins, StepPlan
from engine.scheduling.scheduler import Scheduler
from kvcache.names import unpack_tokens


@dataclass
class MirroredSlot:
    """One slot, as far as it was told of."""

    seq_id: str
    begins: SlotBegins
    token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_awaited: int = 0  #: tokens behind them that steps compute with, though none of them ended that gives one

    def take_sampled(self, token_id: int) -> None:
        """A step ended that sampled it: who awaits a token is not told of it."""
        if self.num_awaited:
            self.num_awaited -= 1
            self.token_ids.append(token_id)


class SlotMirror:
    """The slots of a scheduler's runner."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._slots: dict[int, MirroredSlot] = {}

    def __getitem__(self, part: SequenceStep) -> MirroredSlot:
        return self._slots[part.slot]

    def take_in(self, plan: StepPlan, scheduler: Scheduler) -> StepPlan:
        """The plan as another process has it; every slot that was told of then holds what the scheduler's books say."""
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        for slot in plan.freed_slots:
            self._slots.pop(slot, None)
        for part in plan.parts:
            if part.begins is not None:
                assert part.slot not in self._slots, "a slot is freed before another takes it"
                self._slots[part.slot] = MirroredSlot(part.seq_id, part.begins)
            mirrored = self._slots[part.slot]
            assert mirrored.seq_id == part.seq_id
            mirrored.token_ids += unpack_tokens(part.new_token_ids)
            mirrored.block_table += part.new_block_ids
            mirrored.num_awaited += part.awaits_token
            seq = scheduler._ledger.running[part.seq_id]
            assert mirrored.token_ids == seq.token_ids.tolist()
            assert mirrored.block_table == seq.block_table[: seq.num_blocks_for(part.end)]
            assert mirrored.begins == SlotBegins(num_prompt_tokens=seq.num_prompt_tokens, params=seq.params)
        running = {seq.slot.index: seq for seq in scheduler._ledger.running.values()}
        assert max(running, default=0) < self._max_num_seqs
        for slot, mirrored in self._slots.items():
            assert running[slot].seq_id == mirrored.seq_id, "nobody stays in a slot that was left"
            assert running[slot].token_ids[: len(mirrored.token_ids)].tolist() == mirrored.token_ids
            assert running[slot].block_table[: len(mirrored.block_table)] == mirrored.block_table
        return plan
