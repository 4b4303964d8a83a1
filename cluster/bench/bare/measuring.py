"""Measures an engine for a model and a workload: checks what is asked, builds the contenders, runs the repeats."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from cluster.bench.bare.batch import Workload
from cluster.bench.bare.machine import measure_machine
from cluster.bench.bare.ours import KvrayEngine, Model
from cluster.bench.bare.report import Report
from cluster.bench.bare.running import Progress, Side, run
from cluster.bench.bare.theirs import TransformersEngine
from cluster.bench.bare.work import ModelWork, Weights, weights_of
from engine.memory.device_room import free_bytes
from engine.model.devices import choose_device
from engine.model.families import read_model_config
from engine.model.load import LoadedModel
from messages.errors import ConfigError, WorkerError

_MIN_ITEM_BYTES: Final = {"float32": 4}  #: the others, and whatever "auto" becomes: 2 at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A bench as it is asked for."""

    path: Path  #: a model directory; of a drawn model one with a config.json
    name: str  #: of the model, for people
    is_drawn: bool
    dtype: str
    kv_cache_dtype: str
    device: str  #: auto, cpu, cuda, cuda:1
    num_threads: int  #: of a CPU
    batch_size: int
    input_len: int
    output_len: int
    repeats: int
    seed: int
    max_num_batched_tokens: int
    has_peer: bool  #: transformers' continuous batching is measured beside


def measure(wanted: Wanted, say: Callable[[str], None], on_progress: Progress) -> Report:
    """Measure what is wanted; `say` takes lines for people meanwhile.

    Raises:
        ConfigError: the model, the device, the lengths or the memory there is do not go together; one line.
        WorkerError: the engine failed meanwhile.
    """
    device = found_device(wanted.device, say)
    config = read_model_config(wanted.path)
    weights = _checked_weights(wanted, config, device)
    workload = Workload(
        batch_size=wanted.batch_size,
        input_len=wanted.input_len,
        output_len=wanted.output_len,
        vocab_size=config.get_text_config().vocab_size,
        seed=wanted.seed,
    )
    model = Model(
        path=wanted.path,
        drawn_seed=wanted.seed if wanted.is_drawn else None,
        dtype=wanted.dtype,
        kv_cache_dtype=wanted.kv_cache_dtype,
        device=device,
        num_threads=wanted.num_threads,
    )
    with contextlib.ExitStack() as open_engines:
        ours = KvrayEngine(model, workload, wanted.max_num_batched_tokens, say)
        open_engines.callback(ours.close)
        loaded = ours.loaded
        say("measuring what the device can do")
        machine = measure_machine(device, loaded.dtype, wanted.num_threads)
        sides = [Side(ours)]
        if wanted.has_peer:
            theirs = TransformersEngine(model, workload, loaded.dtype)
            open_engines.callback(theirs.close)
            sides.append(Side(theirs))
        run(sides, workload, wanted.repeats, on_progress)
    if sides[0].failure:
        raise WorkerError(sides[0].failure)
    facts = _facts(wanted, loaded)
    return Report(
        model=facts,
        described=(
            f"{wanted.name}: {loaded.family}, {loaded.num_parameters / 1e6:,.1f} M parameters"
            f"{', drawn' if wanted.is_drawn else ''}, {facts['dtype']}, {loaded.kernel_path}"
        ),
        workload=workload,
        work=ModelWork(weights, loaded.layers, loaded.dtype.itemsize, loaded.kv_dtype.itemsize),
        machine=machine,
        sides=sides,
    )


def _checked_weights(wanted: Wanted, config: Any, device: torch.device) -> Weights:
    """Count the model's weights, for which there is memory, and check that the batch fits its positions.

    Raises:
        ConfigError: it does not, or there is too little; one line.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    num_tokens = wanted.input_len + wanted.output_len
    if positions is not None and num_tokens > positions:
        raise ConfigError(
            f"--input-len {wanted.input_len} and --output-len {wanted.output_len}: {num_tokens} tokens, "
            f"{wanted.name} has positions for {positions}"
        )
    weights = weights_of(config)
    num_bytes, free = weights.total * _MIN_ITEM_BYTES.get(wanted.dtype, 2), free_bytes(device)
    if num_bytes > free:
        raise ConfigError(
            f"{wanted.name} has {num_bytes / 1e9:,.1f} GB of weights, {free / 1e9:,.1f} GB are free on {device}: "
            "a smaller model, or another --device"
        )
    return weights


def _facts(wanted: Wanted, loaded: LoadedModel) -> dict[str, Any]:
    """Return what a program wants to know of the model and of how it was computed."""
    return {
        "name": wanted.name,
        "is_drawn": wanted.is_drawn,
        "family": loaded.family,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(loaded.kv_dtype).removeprefix("torch."),
        "num_parameters": loaded.num_parameters,
        "kernel_path": loaded.kernel_path,
        "max_num_batched_tokens": wanted.max_num_batched_tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def found_device(name: str, say: Callable[[str], None]) -> torch.device:
    """Return the device that is meant; `say` gets a line where there is a GPU and it cannot be used.

    Raises:
        ConfigError: there is none of that name here.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"--device: wanted auto, cpu, cuda or cuda:0 and so on, saw {name!r}")
    return choose_device(name, say)
