"""Drives a Runner by step plans written out by hand: greedy, several sequences at once, no scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.memory.kv_pool import KvPool
from engine.model.load import LoadedModel
from engine.runner import Accelerator, Runner
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import SequenceStep, SlotBegins, StepPlan
from engine.scheduling.slots import Slot, SlotPool
from kvcache.names import pack_tokens
from messages.request import SamplingParams

GREEDY = SamplingParams(max_tokens=1_000_000, temperature=0.0)


@dataclass
class Sequence:
    """One sequence: tokens so far, its blocks, how many tokens have their KV in the pool, what the runner was told."""

    seq_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    slot: Slot | None = None

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


class Bench:
    """A model, a pool of its own and the sequences in it. Blocks are given out from both ends and never freed."""

    def __init__(
        self,
        loaded: LoadedModel,
        num_blocks: int = 256,
        block_size: int = 16,
        *,
        is_reversed: bool = False,
        accelerator: Accelerator | None = None,
    ):
        self.loaded = loaded
        self.pool = KvPool(loaded.layer_specs, block_size, loaded.dtype, loaded.device, num_blocks=num_blocks)
        self.runner = Runner(loaded, self.pool, Sampler(loaded.vocab_size, None), accelerator=accelerator)
        self.block_size = block_size
        self.slots = SlotPool()
        self.free = list(range(num_blocks))
        if is_reversed:
            self.free.reverse()
        else:  # so that a sequence's blocks are never neighbours
            self.free = self.free[::2] + self.free[1::2]

    def add(self, seq_id: str, prompt: Iterable[int], held: Sequence | None = None) -> Sequence:
        """A sequence; with `held` it starts from the full blocks of the prefix that both share."""
        sequence = Sequence(seq_id, list(prompt), len(list(prompt)))
        if held is not None:
            limit = min(held.num_computed, sequence.num_prompt_tokens - 1)
            shared = 0
            while shared < limit and held.token_ids[shared] == sequence.token_ids[shared]:
                shared += 1
            sequence.blocks = held.blocks[: shared // self.block_size]
            sequence.num_computed = len(sequence.blocks) * self.block_size
        return sequence

    def part(self, sequence: Sequence, num_tokens: int, *, kind: str = "", **options: object) -> SequenceStep:
        """The next `num_tokens` of `sequence`; sampled when they are its last. To be executed in this order."""
        end = sequence.num_computed + num_tokens
        while len(sequence.blocks) * self.block_size < end:
            sequence.blocks.append(self.free.pop(0))
        params, begins = options.pop("params", GREEDY), None
        slot = sequence.slot
        if slot is None:
            slot = sequence.slot = self.slots.take()
            begins = SlotBegins(num_prompt_tokens=sequence.num_prompt_tokens, params=params)
        new_token_ids = pack_tokens(sequence.token_ids[slot.num_told_tokens :])
        new_block_ids = tuple(sequence.blocks[slot.num_told_blocks :])
        slot.num_told_tokens, slot.num_told_blocks = len(sequence.token_ids), len(sequence.blocks)
        return SequenceStep(
            seq_id=sequence.seq_id,
            slot=slot.index,
            begins=begins,
            kind=kind or ("decode" if sequence.num_computed >= sequence.num_prompt_tokens else "prefill"),
            start=sequence.num_computed,
            num_tokens=num_tokens,
            new_token_ids=new_token_ids,
            new_block_ids=new_block_ids,
            is_sampled=end == len(sequence.token_ids),
            **options,
        )

    def run_parts(self, work: list[tuple[Sequence, SequenceStep]]):
        """One step; sampled tokens are appended to their sequences."""
        work = sorted(work, key=lambda item: item[1].kind != "decode")
        result = self.runner.execute(StepPlan(tuple(part for _, part in work)))
        assert not result.errors, result.errors
        for sequence, part in work:
            sequence.num_computed = part.end
            if part.is_sampled:
                sequence.token_ids.append(result.sampled[sequence.seq_id].token_id)
        return result

    def run(self, sequences: list[Sequence], num_output: int, max_step_tokens: int = 48) -> list[list[int]]:
        """Generate until each has `num_output` tokens: decode rows first, then prefill chunks in order."""
        while True:
            budget, work = max_step_tokens, []
            for sequence in sequences:
                missing = len(sequence.token_ids) - sequence.num_computed
                is_decoding = sequence.num_computed >= sequence.num_prompt_tokens
                if len(sequence.output) >= num_output or budget == 0:
                    continue
                count = missing if is_decoding else min(missing, budget)
                budget -= min(budget, count)
                work.append((sequence, self.part(sequence, count)))
            if not work:
                return [sequence.output for sequence in sequences]
            self.run_parts(work)

    def receive(self, sequence: Sequence, other: Bench) -> Sequence:
        """A copy of `sequence` from `other`'s pool in ours: its blocks' rows are all that moves."""
        count = -(-sequence.num_computed // self.block_size)
        blocks = [self.free.pop(0) for _ in range(count)]
        self.pool.write_blocks(blocks, other.pool.read_blocks(sequence.blocks[:count]))
        return Sequence(
            sequence.seq_id, list(sequence.token_ids), sequence.num_prompt_tokens, blocks, sequence.num_computed
        )
