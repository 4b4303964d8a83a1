"""What a CUDA device must be for what is asked of it. Pure: facts in, a line for people out.

Without torch, so that who only judges a node need not import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

#: Major and minor of CUDA's compute capability.
Capability: TypeAlias = tuple[int, int]

#: From which on there are products of bfloat16, and copies that go on beside them.
MIN_CAPABILITY: Final[Capability] = (8, 0)
#: From which on there are conversions of float8.
FLOAT8_CAPABILITY: Final[Capability] = (8, 9)
#: The oldest driver of Linux that runs a wheel of this CUDA: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes
OLDEST_DRIVERS: Final = {11: 450, 12: 525, 13: 580}
_PLAIN: Final = "engine.kernels: off computes with torch's operators, slowly"


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaFacts:
    """What is known of a node's driver, of torch's build and, where torch sees one, of a CUDA device."""

    torch: str  #: version
    torch_cuda: str  #: of CUDA, that torch was built with; "": none
    driver: str  #: version of NVIDIA's driver; "": there is none
    name: str = ""  #: of the device; "": torch sees none
    capability: Capability = (0, 0)  #: of the device
    architectures: tuple[Capability, ...] = ()  #: that torch has machine code for
    virtual_architectures: tuple[Capability, ...] = ()  #: that torch has code for that later devices compile


def device_refusal(facts: CudaFacts) -> str | None:
    """Tell why torch sees no CUDA device, and what would help; None where it sees one."""
    if facts.name:
        return None
    driver = f"NVIDIA's driver {facts.driver} is there" if facts.driver else "no NVIDIA driver is there"
    if not facts.torch_cuda:
        advice = f"and {driver}" if facts.driver else f"{driver} either"
        return (
            f"torch {facts.torch} was built without CUDA, {advice}: install torch from the index of the driver's CUDA"
        )
    wheel = f"torch {facts.torch} with CUDA {facts.torch_cuda}"
    if not facts.driver:
        return f"{wheel} sees no CUDA device: {driver} (/proc/driver/nvidia/version); wanted a node with a GPU, or cpu"
    oldest = OLDEST_DRIVERS.get(int(facts.torch_cuda.partition(".")[0]))
    if oldest is not None and int(facts.driver.partition(".")[0]) < oldest:
        return (
            f"{wheel} wants NVIDIA's driver {oldest} or newer, and {facts.driver} is there: "
            "update the driver, or install torch from the index of the driver's CUDA (`nvidia-smi` shows it)"
        )
    return (
        f"{wheel} sees no CUDA device, and {driver}: wanted one that CUDA_VISIBLE_DEVICES, Ray "
        "(pools.gpus_per_worker) and the container show to this process"
    )


def use_refusal(facts: CudaFacts, *, dtype: str, kv_cache_dtype: str, use_kernels: bool) -> str | None:
    """Tell why the device will not do for a model in `dtype` with KV in `kv_cache_dtype`; None where it will."""
    seen = f"{facts.name} has compute capability {_dotted(facts.capability)}"
    if facts.architectures and not _has_code(facts):
        wanted = ", ".join(_dotted(one) for one in facts.architectures)
        return f"{seen}, and torch {facts.torch} has code for {wanted}: wanted another GPU, or another wheel of torch"
    if facts.capability < MIN_CAPABILITY:
        if use_kernels:
            return f"{seen}, the kernels want {_dotted(MIN_CAPABILITY)} or more: {_PLAIN}"
        if dtype == "bfloat16":
            return f"{seen}, bfloat16 wants {_dotted(MIN_CAPABILITY)} or more: --dtype float16 or float32 would do"
    if kv_cache_dtype == "fp8" and use_kernels and facts.capability < FLOAT8_CAPABILITY:
        return f"{seen}, KV in float8 wants {_dotted(FLOAT8_CAPABILITY)} or more: wanted --kv-cache-dtype auto"
    return None


def heads_refusal(head_sizes: Sequence[int], largest: int) -> str | None:
    """Tell which layer has larger heads than the kernels take; None where all are served.

    Args:
        head_sizes: of each layer, the larger of keys' and values' dimension.
        largest: that kernels take.
    """
    for number, size in enumerate(head_sizes):
        if size > largest:
            return f"layer {number} has heads of {size} numbers, the kernels take {largest} at most: {_PLAIN}"
    return None


def _has_code(facts: CudaFacts) -> bool:
    """Machine code runs on later devices of its major number, what later devices compile on all of these."""
    major, minor = facts.capability
    return any(one[0] == major and one[1] <= minor for one in facts.architectures) or any(
        one <= facts.capability for one in facts.virtual_architectures
    )


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
