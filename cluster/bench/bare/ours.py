"""kvray's engine as a contender: scheduler, pool and runner as a worker has them, asked in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from cluster.bench.bare.batch import Batch, Tokens, Workload
from cluster.bench.bare.steps import watch_of
from engine.core import Engine, EngineOptions
from engine.memory.device_room import free_bytes
from engine.memory.kv_pool import block_bytes
from engine.model.load import LoadedModel, load_model
from engine.scheduling.plan import SequenceAdded, SequenceSpec
from messages.errors import ConfigError, WorkerError
from messages.request import SamplingParams

#: Of the blocks that a batch fills: the scheduler leaves some to those that run, and some to short prompts.
_ROOM: Final = 1.5
_MORE_BLOCKS: Final = 64
#: Nobody watches a batch stream, no peer has such a target: prompts are computed as soon as they can be.
_NO_TARGET_S: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which model, and how it is computed, by whomever."""

    path: Path
    drawn_seed: int | None  #: None: its weights are read
    dtype: str
    kv_cache_dtype: str
    device: torch.device
    num_threads: int  #: of a CPU


class KvrayEngine:
    """The engine, built for one workload."""

    name = "kvray"

    def __init__(
        self,
        model: Model,
        workload: Workload,
        max_num_batched_tokens: int,
        say: Callable[[str], None],
    ) -> None:
        """Load the model, and make a pool in which the batch fits.

        Raises:
            ConfigError: the model cannot be served, or there is too little memory for its weights or the batch.
        """
        max_model_len = workload.input_len + workload.output_len
        self.loaded = load_model(
            model.path,
            dtype=model.dtype,
            kv_cache_dtype=model.kv_cache_dtype,
            device=str(model.device),
            num_threads=model.num_threads,
            max_model_len=max_model_len,
            drawn_seed=model.drawn_seed,
            on_progress=say,
        )
        options = EngineOptions(
            kv_cache_bytes=pool_bytes(self.loaded, workload),
            max_num_seqs=2 * workload.batch_size,  # a share of them is left to short prompts
            max_num_batched_tokens=max_num_batched_tokens,
            itl_target_s=_NO_TARGET_S,
        )
        self._engine = Engine.build(self.loaded, options)
        say("warming up")
        self._engine.warm_up()  # as a worker does: on a GPU steps are captured
        self._watch = watch_of(self._engine)
        self._numbers = itertools.count()

    def generate(self, prompts: Tokens, num_tokens: int) -> Batch:
        """Generate so many tokens, greedily, for each of the prompts, all there at once.

        Raises:
            WorkerError: a sequence ended with an error.
        """
        engine = self._engine
        engine.pool.clear()  # what other batches left is nobody's any more: admission need not spare it
        engine.pool.take_events()
        ids = [str(next(self._numbers)) for _ in prompts]
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        batch = Batch(begun_s=time.perf_counter())
        times: dict[str, list[float]] = {seq_id: [] for seq_id in ids}
        outputs: dict[str, list[int]] = {seq_id: [] for seq_id in ids}
        for seq_id, prompt in zip(ids, prompts, strict=True):
            spec = SequenceSpec(seq_id=seq_id, token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
            engine.post(SequenceAdded(spec))
        while engine.has_work():
            self._watch.begin()
            emitted = engine.step()
            step = self._watch.end()
            batch.steps.append(step)
            for item in emitted:
                if item.error is not None:
                    raise WorkerError(f"a sequence failed: {item.error.message}")
                times[item.seq_id] += [step.ended_s] * len(item.token_ids)
                outputs[item.seq_id] += item.token_ids
        engine.step()  # nothing to do: its threads leave the cores to others
        batch.token_times_s, batch.outputs = list(times.values()), list(outputs.values())
        return batch

    def close(self) -> None:
        """Give the pool's memory back."""
        self._watch.close()
        self._engine.close()


def pool_bytes(loaded: LoadedModel, workload: Workload) -> int:
    """Return the bytes of a pool in which the batch fits at once.

    Raises:
        ConfigError: so much is not free.
    """
    block_size = EngineOptions().block_size
    of_each = -(-(workload.input_len + workload.output_len) // block_size)
    num_blocks = int(_ROOM * workload.batch_size * of_each) + _MORE_BLOCKS
    wanted = num_blocks * block_bytes(loaded.layer_specs, block_size, loaded.kv_dtype)
    free = free_bytes(loaded.device)
    if wanted > free:
        raise ConfigError(
            f"{workload.batch_size} sequences of {workload.input_len} + {workload.output_len} tokens want "
            f"{wanted / 1e9:,.1f} GB of KV, {free / 1e9:,.1f} GB are free on {loaded.device}: a smaller --batch-size, "
            "--input-len or --output-len"
        )
    return wanted
