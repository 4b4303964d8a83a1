"""Which device a model is computed on, and whether it will do (`engine.kernels.capability` judges)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from engine.kernels.capability import Capability, CudaFacts, device_refusal, use_refusal
from messages.errors import ConfigError

_DRIVER: Final = Path("/proc/driver/nvidia/version")


def choose_device(wanted: str, say: Callable[[str], None]) -> torch.device:
    """Choose "cpu", a CUDA device, or for "auto" the accelerator, where there is one; `say` gets a line if none works.

    Raises:
        ConfigError: a CUDA device was asked for and none can be used; says what is there and what would help.
    """
    if wanted not in ("auto", "cpu"):
        reason = device_refusal(cuda_facts(torch.device(wanted)))
        if reason is not None:
            raise ConfigError(f"device {wanted} was asked for: {reason}")
        return torch.device(wanted)
    if wanted == "auto" and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "auto" and (facts := cuda_facts(torch.device("cuda"))).driver:
        say(f"computing on the CPU: {device_refusal(facts)}")
    return torch.device("cpu")


def check_device(device: torch.device, dtype: torch.dtype, kv_cache_dtype: str, *, use_kernels: bool) -> None:
    """Check that a CUDA device does for a model in `dtype`; a CPU always does.

    Raises:
        ConfigError: it does not; says what it is, what is wanted and what would help.
    """
    if device.type != "cuda":
        return
    name = str(dtype).removeprefix("torch.")
    reason = use_refusal(cuda_facts(device), dtype=name, kv_cache_dtype=kv_cache_dtype, use_kernels=use_kernels)
    if reason is not None:
        raise ConfigError(reason)


def cuda_facts(device: torch.device) -> CudaFacts:
    """Gather what is known; opens the device where torch sees one."""
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _DRIVER.read_text())
    is_there = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    names = torch.cuda.get_arch_list() if is_there else []
    return CudaFacts(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        driver=found[1] if found else "",
        name=torch.cuda.get_device_name(device) if is_there else "",
        capability=torch.cuda.get_device_capability(device) if is_there else (0, 0),
        architectures=_architectures(names, "sm"),
        virtual_architectures=_architectures(names, "compute"),
    )


def _architectures(names: list[str], kind: str) -> tuple[Capability, ...]:
    """Return those of `kind` in what torch lists: sm_90, sm_120, compute_120, sm_90a."""
    found = (re.fullmatch(rf"{kind}_(\d+)(\d)[a-z]?", name) for name in names)
    return tuple((int(match[1]), int(match[2])) for match in found if match)
