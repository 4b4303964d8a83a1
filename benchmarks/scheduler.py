"""Seconds the scheduler and the namer take out of a step: planning and taking in a step of many decodes, a long prompt.

    python benchmarks/scheduler.py [--quick] [--record]

Goals, as medians: planning a step with 256 running sequences under 1 ms, taking in its result under 2 ms, naming a
prompt of 128 k tokens under 20 ms.
"""

from __future__ import annotations

import platform
import time
from statistics import median

from harness.report import goal, parser, record

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceSpec,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
)
from engine.scheduling.scheduler import Scheduler
from kvcache.names import block_names, pack_tokens
from kvcache.pool import BlockPool
from messages.request import SamplingParams

_GOALS_S = {"plan_256": 1e-3, "take_in_256": 2e-3, "name_128k": 20e-3}


def step_seconds(num_sequences: int, num_steps: int) -> tuple[float, float]:
    """Measure the median seconds to plan a step of decodes, and to take in what it gave."""
    config = SchedulerConfig(max_model_len=8192, max_num_seqs=num_sequences, max_num_batched_tokens=8192)
    scheduler = Scheduler(config, BlockPool(num_sequences * 40, 16), b"model")
    for number in range(num_sequences):
        spec = SequenceSpec(
            seq_id=f"s{number}",
            token_ids=[number, *range(99)],
            num_prompt_tokens=100,
            params=SamplingParams(max_tokens=10_000),
        )
        scheduler.on_event(SequenceAdded(spec), 0.0)
    plan_s: list[float] = []
    take_in_s: list[float] = []
    while len(plan_s) < num_steps:
        begin_s = time.perf_counter()
        [step] = scheduler.on_event(StepWanted(), 0.0)
        planned_s = time.perf_counter()
        assert isinstance(step, RunStep)
        result = _result(step.plan)
        ran_s = time.perf_counter()
        scheduler.on_event(StepEnded(result), 0.0)
        if all(part.kind == "decode" for part in step.plan.parts):
            plan_s.append(planned_s - begin_s)
            take_in_s.append(time.perf_counter() - ran_s)
    return median(plan_s), median(take_in_s)


def name_seconds(num_tokens: int, repeats: int) -> float:
    """Measure the median seconds to name a prompt's blocks of 16 tokens."""
    tokens = pack_tokens(range(num_tokens))
    times = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        block_names(b"model", b"", tokens, 16)
        times.append(time.perf_counter() - begin_s)
    return median(times)


def _result(plan: StepPlan) -> StepResult:
    sampled = {part.seq_id: Sampled(7) for part in plan.parts if part.is_sampled}
    return StepResult(sampled=sampled, elapsed_s=0.02)


def main() -> None:
    options = parser(__doc__, "scheduler", quick="fewer repeats").parse_args()
    num_steps = 50 if options.quick else 300
    plan_s, take_in_s = step_seconds(256, num_steps)
    figures = {"plan_256": plan_s, "take_in_256": take_in_s, "name_128k": name_seconds(131_072, num_steps // 10)}
    if options.record:
        record("scheduler", {"seconds": figures}, python=platform.python_version())
    for name, figure_s in figures.items():
        print(goal(name, 1e3 * figure_s, under=1e3 * _GOALS_S[name], unit=" ms"))


if __name__ == "__main__":
    main()
