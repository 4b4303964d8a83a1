"""What is told of a repeat. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from cluster.bench.bare.batch import Batch, Workload
from cluster.bench.bare.machine import Machine
from cluster.bench.bare.work import Effort, ModelWork
from cluster.bench.figures import Figures, percentile


def figures(prefill: Batch, whole: Batch, workload: Workload, work: ModelWork, machine: Machine) -> Figures:
    """Return the figures of one repeat of one contender: of its prompts alone, and of all of it.

    Shares are of the machine's rates; what cannot be told is absent.
    """
    prompts = work.prefill(workload.batch_size, workload.input_len)
    values = {
        "seconds": whole.seconds,
        "output_tokens_per_s": workload.batch_size * workload.output_len / whole.seconds,
        "of_bound": bound_s(workload, work, machine) / whole.seconds,
        "prefill_tokens_per_s": workload.batch_size * workload.input_len / prefill.seconds,
        "prefill_of_rate": prompts.num_flops / prefill.seconds / machine.flops_per_s,
    }
    window = whole.decode
    if window is not None:
        effort = work.decode(window.positions(workload.input_len), window.num_steps)
        values |= {
            "decode_tokens_per_s": window.num_tokens / window.seconds,
            "decode_of_bandwidth": effort.num_bytes / window.seconds / machine.copy_bytes_per_s,
            "decode_of_rate": effort.num_flops / window.seconds / machine.flops_per_s,
        }
    values |= _distribution("ttft_ms", whole.ttft_s) | _distribution("itl_ms", whole.gaps_s)
    if window is not None:
        steps = [step for step in whole.steps if window.begin_s < step.ended_s <= window.end_s]
        if steps:
            values |= {
                "host_ms": 1e3 * median(step.host_s for step in steps),
                "idle_ms": 1e3 * median(step.idle_s for step in steps),
            }
    return Figures(values, {}, {}, {})


def bound_s(workload: Workload, work: ModelWork, machine: Machine) -> float:
    """Return the seconds that the whole batch takes at least: prompts at once, then steps in which all decode."""
    prompts = work.prefill(workload.batch_size, workload.input_len)
    seconds = prompts.bound_s(machine.copy_bytes_per_s, machine.flops_per_s)
    for number in range(workload.output_len - 1):
        positions = [workload.input_len + number] * workload.batch_size
        step: Effort = work.decode(positions, 1)
        seconds += step.bound_s(machine.copy_bytes_per_s, machine.flops_per_s)
    return seconds


def num_same(batches: Sequence[Batch], others: Sequence[Batch]) -> tuple[int, int]:
    """Return how many sequences got the same tokens from two contenders, and of how many."""
    pairs = [
        (ours, theirs)
        for one, other in zip(batches, others, strict=True)
        for ours, theirs in zip(one.outputs, other.outputs, strict=True)
    ]
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)


def _distribution(name: str, seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"{name}_p{rank}": 1e3 * percentile(ordered, rank) for rank in (50, 90) if ordered}
