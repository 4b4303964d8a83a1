"""What a launch is made of, besides tensors: head sizes cut into powers of two, the type to compute in, programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl

#: The least size of a matrix product.
_MIN_DIM: Final = 16
#: Programs where kernels run interpreted, one after the other: more than one, so that they share work out.
_INTERPRETED_PROGRAMS: Final = 3

_TYPES: Final[dict[torch.dtype, Any]] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of a layer's heads as products take them: a power of two, and what is beyond it as another."""

    group: int  #: query heads of one KV head
    group_padded: int
    k_main: int
    k_rest: int  #: 0: none
    v_main: int
    v_rest: int


@cache
def head_shape(num_heads: int, num_kv_heads: int, k_dim: int, v_dim: int) -> HeadShape:
    """Cut the sizes of heads: once for all layers and steps, whose time on the host counts."""
    group = num_heads // num_kv_heads
    return HeadShape(group, max(_MIN_DIM, triton.next_power_of_2(group)), *_cut(k_dim), *_cut(v_dim))


def _cut(dim: int) -> tuple[int, int]:
    main: int = triton.next_power_of_2(dim)
    if main == dim or main <= _MIN_DIM:
        return max(main, _MIN_DIM), 0
    main = max(main // 2, _MIN_DIM)
    return main, max(_MIN_DIM, triton.next_power_of_2(dim - main))


def is_interpreted() -> bool:
    """Whether kernels run interpreted on this process's CPU (TRITON_INTERPRET=1), as in tests."""
    return bool(triton.knobs.runtime.interpret)


def compute_dtype(dtype: torch.dtype) -> Any:
    """Return what products take their operands as. The interpreter computes wrongly with bfloat16 (3.6, 3.9)."""
    return tl.float32 if is_interpreted() else _TYPES[dtype]


@cache
def programs_of(device: torch.device, per_multiprocessor: int) -> int:
    """Return how many programs share a launch's work on `device`: always as many, whatever there is to do."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return per_multiprocessor * int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel cuts its work. Keys are taken so many at a time: part of the result's bits."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    #: Programs that a multiprocessor runs at once, which `tests/engine/kernels/test_triton_ahead.py` holds: one more,
    #: of a kernel that shares its work out evenly, would begin when the others end.
    programs: int = 1


@cache
def prefill_tiling(shape: HeadShape, dtype: torch.dtype) -> Tiling:
    """Choose tiles of prefill attention that fit into registers and shared memory, by the sizes of heads."""
    width = max(shape.k_main + shape.k_rest, shape.v_main + shape.v_rest)
    if dtype == torch.float32:
        return Tiling(32, 32, 4, 2) if width <= 128 else Tiling(16, 16, 4, 1)
    if width <= 128:
        return Tiling(128, 64, 8, 3)
    return Tiling(64, 32, 8, 2) if width <= 256 else Tiling(32, 16, 8, 1)


@cache
def decode_tiling(shape: HeadShape, dtype: torch.dtype, *, is_float8: bool = False) -> Tiling:
    """Choose tiles of decode attention, by the sizes of heads; `rows` are those of a group's heads.

    Where `is_float8`, KV is, and more registers are taken to convert it.
    """
    width = max(shape.k_main + shape.k_rest, shape.v_main + shape.v_rest)
    if dtype == torch.float32:
        return Tiling(shape.group_padded, 32, 4, 2) if width <= 256 else Tiling(shape.group_padded, 16, 8, 1)
    if width <= 256:
        is_light = width <= 128 and shape.group_padded <= _MIN_DIM and not is_float8
        keys = 32 if is_float8 and width > 128 else 64
        return Tiling(shape.group_padded, keys, 4, 3, programs=3 if is_light else 2)
    return Tiling(shape.group_padded, 32, 8, 2)
