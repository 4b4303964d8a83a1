"""A scheduler that is driven by hand. Blocks of 4 tokens, chunks of 8."""

from __future__ import annotations

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    EmitTokens,
    Instruction,
    OfferBlocks,
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceSpec,
    SequenceStep,
    StepEnded,
    StepResult,
    StepWanted,
)
from engine.scheduling.scheduler import Scheduler
from kvcache.locations import BlockLocation, each_location
from kvcache.names import block_names, pack_tokens, split_names
from kvcache.pool import BlockPool
from messages.request import SamplingParams
from messages.stream import TokenLogprob
from tests.slot_mirror import SlotMirror


class Bench:
    """A scheduler, a clock that stands still, and a model that always says 7."""

    def __init__(self, *, num_blocks: int = 64, **config: object) -> None:
        defaults = {
            "max_model_len": 200,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "chunk_quantum_tokens": 8,
            "watermark": 0.0,
        }
        self.pool = BlockPool(num_blocks, 4)
        made = SchedulerConfig(**(defaults | config))
        self.scheduler = Scheduler(made, self.pool, b"model")
        self.slots = SlotMirror(made.max_num_seqs)
        self.now_s = 0.0
        self.tokens: dict[str, list[int]] = {}  # emitted so far
        self.offered: list[BlockLocation] = []

    def post(self, event) -> list[Instruction]:
        out = self.scheduler.on_event(event, self.now_s)
        self.scheduler.check_invariants()
        for item in out:
            if isinstance(item, EmitTokens):
                self.tokens.setdefault(item.seq_id, []).extend(item.token_ids)
            elif isinstance(item, OfferBlocks):
                self.offered += each_location(item.blocks)
        return out

    def add(self, seq_id: str, prompt: list[int] | int, *, generated: int = 0, **fields) -> list[Instruction]:
        """`prompt`: tokens, or how many of those that this id alone has."""
        if isinstance(prompt, int):
            prompt = [1000 * sum(seq_id.encode()) + i for i in range(prompt)]
        params = {"max_tokens": fields.pop("max_tokens", 4)}
        for name in SamplingParams.__struct_fields__:
            if name in fields:
                params[name] = fields.pop(name)
        spec = SequenceSpec(
            seq_id=seq_id,
            token_ids=prompt + [7] * generated,
            num_prompt_tokens=len(prompt),
            params=SamplingParams(**params),
            **fields,
        )
        return self.post(SequenceAdded(spec))

    def start(self) -> list[SequenceStep]:
        """The parts of the step that the scheduler wants to run now."""
        steps = [item for item in self.post(StepWanted()) if isinstance(item, RunStep)]
        self.parts = list(self.slots.take_in(steps[0].plan, self.scheduler).parts) if steps else []
        return self.parts

    def finish(self, token_id: int = 7, elapsed_s: float = 0.001, **errors) -> list[Instruction]:
        sampled = {
            part.seq_id: Sampled(token_id) for part in self.parts if part.is_sampled and part.seq_id not in errors
        }
        logprobs = {
            part.seq_id: [
                TokenLogprob(token, -1.0, 1)
                for token in slot.token_ids[part.start + 1 : min(part.end + 1, slot.begins.num_prompt_tokens)]
            ]
            for part, slot in [(part, self.slots[part]) for part in self.parts]
            if part.wants_prompt_logprobs
        }
        return self.post(
            StepEnded(StepResult(sampled=sampled, prompt_logprobs=logprobs, errors=errors, elapsed_s=elapsed_s))
        )

    def step(self, **kwargs) -> list[tuple[str, str, int, int]]:
        """Run a step: (id, kind, start, end) of its parts."""
        spans = [(part.seq_id, part.kind, part.start, part.end) for part in self.start()]
        self.out = self.finish(**kwargs) if spans else []
        return spans

    def run(self) -> dict[str, list[int]]:
        """Steps until nothing runs; the tokens emitted for each sequence so far."""
        while self.step():
            pass
        return self.tokens

    def locations(
        self, prompt: list[int], *, begin: int = 0, end: int | None = None, salt: bytes = b""
    ) -> list[BlockLocation]:
        """What a peer would offer of `prompt`."""
        names = split_names(block_names(b"model", salt, pack_tokens(prompt), 4))
        num_blocks = (len(prompt) + 3) // 4
        return [
            BlockLocation(i, 90 + i, 5, names[i] if i < len(names) else b"", min(4, len(prompt) - 4 * i))
            for i in range(begin, num_blocks if end is None else end)
        ]


def emitted(out: list[Instruction]) -> list[EmitTokens]:
    return [item for item in out if isinstance(item, EmitTokens)]


PROMPT = list(range(100, 119))  # four full blocks and three tokens
