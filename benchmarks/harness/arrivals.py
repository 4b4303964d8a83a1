"""Sequences that come while another computes the prefix that they share: what the scheduler takes for all of them."""

from __future__ import annotations

import gc
import time

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import SequenceAdded, SequenceSpec, StepWanted
from engine.scheduling.scheduler import Scheduler
from kvcache.pool import BlockPool
from messages.request import SamplingParams

NUM_SHARED_TOKENS, NUM_OWN_TOKENS = 256, 20


def arrivals(num_sequences: int, repeats: int) -> list[float]:
    """Return the milliseconds of processor time that `num_sequences` arrivals take together, of each repeat."""
    return [_arrivals_ms(num_sequences) for _ in range(repeats)]


def _arrivals_ms(num_sequences: int) -> float:
    scheduler = Scheduler(SchedulerConfig(max_model_len=8192), BlockPool(16_384, 16), b"model")
    prefix = [number % 251 for number in range(NUM_SHARED_TOKENS)]
    params = SamplingParams(max_tokens=16)

    def spec(number: int) -> SequenceSpec:
        tokens = prefix + [number % 1000] * NUM_OWN_TOKENS
        return SequenceSpec(seq_id=f"s{number}", token_ids=tokens, num_prompt_tokens=len(tokens), params=params)

    scheduler.on_event(SequenceAdded(spec(0)), 0.0)
    scheduler.on_event(StepWanted(), 0.0)  # from now on its prefix is in flight
    events = [SequenceAdded(spec(number)) for number in range(1, num_sequences + 1)]
    gc.collect()
    gc.freeze()  # what was there before is not to be looked through
    begin_s = time.process_time()
    for event in events:
        scheduler.on_event(event, 0.0)
    taken_ms = 1e3 * (time.process_time() - begin_s)
    gc.unfreeze()
    assert scheduler.num_waiting == num_sequences
    return taken_ms
