"""Our engine: scheduler, pool and runner as a worker has them, without its processes."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import fmean

from job import Tokens, answer, read_job

from engine.core import Engine, EngineOptions
from engine.cores import num_cores
from engine.model.load import load_model
from engine.scheduling.plan import (
    EmitTokens,
    Instruction,
    RunStep,
    SequenceAdded,
    SequenceSpec,
    StepEnded,
    StepPlan,
    StepWanted,
)
from messages.request import SamplingParams

job = read_job()
loaded = load_model(
    Path(job.model_dir),
    dtype=job.dtype,
    num_threads=min(job.num_threads, num_cores()),
    use_kernels=job.method != "torch",
)
# Everything is there at once and nobody watches it stream: no ITL target, as none of the peers has one.
engine = Engine.build(loaded, EngineOptions(kv_cache_bytes=3 << 30, itl_target_s=1e9))
numbers = itertools.count()
shares: list[float] = []
num_blocks: dict[str, int] = {}  # held by each sequence, none of which is preempted here


def sample_waste(plan: StepPlan) -> None:
    """Note the share of the blocks held by the step's sequences that no token fills when it ends."""
    for part in plan.parts:
        num_blocks[part.seq_id] = num_blocks.get(part.seq_id, 0) + len(part.new_block_ids)
    held = sum(num_blocks[part.seq_id] for part in plan.parts) * engine.options.block_size
    used = sum(part.end for part in plan.parts)
    if all(part.end >= 256 for part in plan.parts):
        shares.append((held - used) / held)


def generate(prompts: Tokens, num_tokens: int) -> Tokens:
    outputs: dict[str, list[int]] = {str(next(numbers)): [] for _ in prompts}
    todo: list[Instruction] = []
    for seq_id, prompt in zip(outputs, prompts, strict=True):
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        spec = SequenceSpec(seq_id=seq_id, token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
        todo += engine.decide(SequenceAdded(spec))
    while engine.has_work():
        todo += engine.decide(StepWanted())
        for plan in [item.plan for item in todo if isinstance(item, RunStep)]:
            todo += engine.decide(StepEnded(engine.finish(engine.launch(plan))))
            sample_waste(plan)
        for item in todo:
            if isinstance(item, EmitTokens):
                outputs[item.seq_id] += item.token_ids
        todo.clear()
    return list(outputs.values())


answer(job, generate, lambda: {"waste_percent": 100 * fmean(shares)} if shares else {})
