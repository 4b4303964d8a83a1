"""How much of an accelerator's memory KV gets: what a step at its largest leaves of it, which is measured, not guessed.

total         | weights | largest step | KV pool .............. | others, and what nobody may use |
utilization   |<- of the total, so much ---------------------->|
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from messages.errors import ConfigError
from transport.memory import available_bytes

_GIB = float(2**30)
_HELP = (
    "lower engine.max_num_batched_tokens, engine.max_num_seqs or model.max_model_len, or end what else uses the device"
)


class DeviceReader(Protocol):
    """What is known of an accelerator's memory."""

    def settle(self) -> None:
        """Wait for the device, give back what is held and not used, and measure the peak from now on."""

    def free_and_total(self) -> tuple[int, int]:
        """Return the bytes that nobody has, of this process or another, and all bytes."""

    def held(self) -> int:
        """Return the bytes that this process's tensors lie in, with what is between them."""

    def peak_held(self) -> int:
        """Return the most that `held` was since `settle`."""


class CudaReader:
    """Reads a CUDA device's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def settle(self) -> None:
        """Do as `DeviceReader` says."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def free_and_total(self) -> tuple[int, int]:
        """Do as `DeviceReader` says."""
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free), int(total)

    def held(self) -> int:
        """Do as `DeviceReader` says."""
        return torch.cuda.memory_reserved(self._device)

    def peak_held(self) -> int:
        """Do as `DeviceReader` says."""
        return torch.cuda.max_memory_reserved(self._device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be had on `device`; on a CPU no more than the container's limit leaves."""
    return CudaReader(device).free_and_total()[0] if device.type == "cuda" else available_bytes()


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a worker uses of a device, in bytes, and what there is."""

    total: int
    free: int  #: of the device, while no step runs
    held: int  #: by tensors, while no step runs: weights above all
    step: int  #: what a step at its largest takes besides
    outside: int  #: what came with the first step and is no tensor's: kernels, libraries' own


def measure(reader: DeviceReader, run_step: Callable[[], int]) -> DeviceUse:
    """Measure what the largest step takes.

    Args:
        reader: of the device.
        run_step: carries that step out, and returns how many bytes of what it allocated are no step's.

    Raises:
        ConfigError: the step does not fit.
    """
    reader.settle()
    free_before, total = reader.free_and_total()
    held_before = reader.held()
    num_other_bytes = _try(run_step)
    if num_other_bytes is None:
        raise ConfigError(
            f"the largest step does not fit beside the weights: they take {_gib(held_before)} of the device's "
            f"{_gib(total)}, {_gib(free_before)} are free; {_HELP}"
        )
    peak = reader.peak_held()
    reader.settle()
    free, _ = reader.free_and_total()
    held = reader.held()
    return DeviceUse(
        total=total,
        free=free,
        held=held,
        step=max(0, peak - num_other_bytes - held),
        outside=max(0, (free_before + held_before) - (free + held)),
    )


def device_room(use: DeviceUse, *, kv_cache_bytes: int | None, memory_utilization: float) -> int:
    """Return the bytes that a pool of KV gets on a device.

    Args:
        use: of that device.
        kv_cache_bytes: an explicit size; None: what `memory_utilization` leaves.
        memory_utilization: of all memory of the device, what this worker may use in all.

    Raises:
        ConfigError: there is less than the explicit size, or nothing at all.
    """
    unused = use.free - use.step
    if kv_cache_bytes is not None:
        if kv_cache_bytes > unused:
            raise ConfigError(
                f"a KV pool of {_gib(kv_cache_bytes)} was asked for, and {_gib(max(0, unused))} of the device's "
                f"{_gib(use.total)} are free beside the weights and the largest step; lower engine.kv_cache_memory, or "
                f"{_HELP}"
            )
        return kv_cache_bytes
    room = min(int(use.total * memory_utilization) - use.held - use.step - use.outside, unused)
    if room <= 0:
        raise ConfigError(
            f"no memory is left for KV: of the device's {_gib(use.total)}, of which engine.gpu_memory_utilization is "
            f"{memory_utilization:g}, weights take {_gib(use.held)}, the largest step {_gib(use.step)}, and "
            f"{_gib(use.free)} are free; raise engine.gpu_memory_utilization, or {_HELP}"
        )
    return room


def check_weights_fit(num_bytes: int, reader: DeviceReader) -> None:
    """Raise ConfigError where weights of `num_bytes` do not fit into what is free of the device."""
    free, total = reader.free_and_total()
    if num_bytes > free:
        raise ConfigError(
            f"the weights take {_gib(num_bytes)}, and {_gib(free)} of the device's {_gib(total)} are free: take a "
            "smaller model, --dtype bfloat16 where they would be float32, or end what else uses the device"
        )


def _try(run_step: Callable[[], int]) -> int | None:
    """Run the step; None where it does not fit. The error is gone then: its traceback keeps what was computed."""
    try:
        return run_step()
    except torch.OutOfMemoryError:
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
