"""What a device can do at best, measured now: a large copy, and a large product of matrices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch

from engine.memory.device_room import free_bytes

_REPEATS: Final = 7
_COPY_BYTES: Final = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX_SIZE: Final = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Machine:
    """A device, and its rates."""

    name: str
    num_threads: int | None  #: None: it is no CPU
    copy_bytes_per_s: float  #: bytes read and bytes written, alike
    flops_per_s: float  #: of a product in the model's dtype: a multiplication and an addition are two


def measure_machine(device: torch.device, dtype: torch.dtype, num_threads: int) -> Machine:
    """Measure `device`: medians of a few, each of some milliseconds to a second.

    `num_threads`: of a CPU; torch has as many as before afterwards.
    """
    is_cuda = device.type == "cuda"
    num_bytes, size = min(_COPY_BYTES[device.type], free_bytes(device) // 4), _MATRIX_SIZE[device.type]
    with torch.inference_mode(), torch_threads(num_threads):
        copy_s = _copy_s(num_bytes, device)
        product_s = _product_s(size, device, dtype)
    return Machine(
        name=torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        num_threads=None if is_cuda else num_threads,
        copy_bytes_per_s=2 * num_bytes / copy_s,
        flops_per_s=2 * size**3 / product_s,
    )


@contextlib.contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Have torch compute with so many threads; then with as many as before, which our engine counts on."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copy_s(num_bytes: int, device: torch.device) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return _seconds(lambda: target.copy_(source), device)


def _product_s(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of `work`, after once that does not count."""
    work()
    seconds: list[float] = []
    new_event: Any = torch.cuda.Event
    for _ in range(_REPEATS):
        if device.type == "cuda":
            begin, end = (new_event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            begun_s = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun_s)
    return median(seconds)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a file of the kernel's
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
