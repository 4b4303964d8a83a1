"""The largest step that a worker may be asked for, carried out once to see what it takes, captured steps beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engine.memory.device_room import DeviceReader, device_room, measure
from engine.memory.kv_pool import KvPool
from engine.model.load import LoadedModel
from engine.runner import Runner
from engine.scheduling.plan import SequenceStep, SlotBegins, StepPlan
from kvcache.names import pack_tokens
from messages.request import SamplingParams

logger = logging.getLogger(__name__)

#: All that takes memory where tokens are chosen.
_DEAREST: Final = SamplingParams(
    max_tokens=1, top_k=50, top_p=0.9, min_p=0.01, frequency_penalty=0.5, logit_bias={0: 1.0}, logprobs=20
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that is asked of a step, and the form of the pool."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int  #: tokens


def largest_step(limits: Limits, max_model_len: int) -> tuple[StepPlan, int]:
    """Return a step of as many prompt tokens as a step may have, and a row for each sequence that may run.

    Every sequence gets a token, by all that its request can ask for. Its KV is of no use: sequences that generate share
    a block.

    Returns:
        The step, and how many blocks a pool has to have for it.
    """
    parts: list[SequenceStep] = []
    num_blocks, left = 1, limits.max_num_batched_tokens
    while left and len(parts) < limits.max_num_seqs:
        num_tokens = min(left, max_model_len)
        end_block = num_blocks + -(-num_tokens // limits.block_size)
        parts.append(_part(len(parts), "prefill", num_tokens, tuple(range(num_blocks, end_block))))
        num_blocks, left = end_block, left - num_tokens
    num_tokens = min(2, max_model_len)  # its prompt's, and one more
    blocks = (0,) * -(-num_tokens // limits.block_size)
    rows = [_part(slot, "decode", num_tokens, blocks) for slot in range(len(parts), limits.max_num_seqs)]
    return StepPlan((*rows, *parts)), num_blocks


def measured_room(
    loaded: LoadedModel,
    limits: Limits,
    make_runner: Callable[[KvPool], Runner],
    reader: DeviceReader,
    *,
    kv_cache_bytes: int | None,
    utilization: float,
) -> int:
    """Return the bytes that the pool gets on an accelerator, by carrying the largest step out and measuring it.

    Args:
        loaded: the model, on the accelerator.
        limits: of steps.
        make_runner: makes a runner over a pool that is for this step alone.
        reader: of the accelerator's memory.
        kv_cache_bytes: an explicit size; None: by `utilization`.
        utilization: of all memory of the accelerator, what this worker may use in all.

    Raises:
        ConfigError: the step does not fit, or the explicit size does not beside it, or nothing is left for KV.
    """

    def run_step() -> int:
        plan, num_blocks = largest_step(limits, loaded.max_model_len)
        pool = KvPool(loaded.layer_specs, limits.block_size, loaded.kv_dtype, loaded.device, num_blocks=num_blocks)
        runner = make_runner(pool)
        runner.capture(is_trial=True)
        runner.execute(plan)
        return pool.block_bytes * num_blocks

    use = measure(reader, run_step)
    room = device_room(use, kv_cache_bytes=kv_cache_bytes, memory_utilization=utilization)
    logger.info(
        "of the device's %.2f GiB weights take %.2f, the largest step %.2f, KV %.2f",
        *(num_bytes / 2**30 for num_bytes in (use.total, use.held, use.step, room)),
    )
    return room


def _part(slot: int, kind: str, num_tokens: int, block_ids: tuple[int, ...]) -> SequenceStep:
    is_prefill = kind == "prefill"
    return SequenceStep(
        seq_id=f"trial {slot}",
        slot=slot,
        begins=SlotBegins(num_prompt_tokens=num_tokens if is_prefill else 1, params=_DEAREST),
        kind="prefill" if is_prefill else "decode",
        start=0 if is_prefill else num_tokens - 1,
        num_tokens=num_tokens if is_prefill else 1,
        new_token_ids=pack_tokens([0] * num_tokens),
        new_block_ids=block_ids,
        is_sampled=True,
    )
