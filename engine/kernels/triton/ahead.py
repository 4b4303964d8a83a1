"""Compiles every kernel ahead of time, without a GPU, and tells what it takes of a multiprocessor.

    python -m engine.kernels.triton.ahead            for all devices and shapes, a line each

Registers and spills are read from the machine code, by the cuobjdump that comes with triton.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.triton import decode, operators, prefill, store
from engine.kernels.triton.shapes import Tiling, decode_tiling, head_shape, prefill_tiling

#: Compute capabilities, times ten: A100, H100 and H200, B200.
CAPABILITIES: Final = (80, 90, 100)
#: Of real models: query heads, KV heads, dimensions of keys and of values.
SHAPES: Final = {
    "Llama 3 8B": (32, 8, 128, 128),
    "Llama 3.2 1B": (32, 8, 64, 64),
    "Gemma 3": (8, 4, 256, 256),
    "Phi 3": (32, 32, 96, 96),
    "GPT-OSS": (64, 8, 64, 64),
    "DeepSeek V3, expanded": (16, 16, 192, 128),
    "DeepSeek V3, absorbed": (16, 1, 576, 512),
    "StarCoder, one KV head": (48, 1, 128, 128),
}
DTYPES: Final = {torch.bfloat16: ("*bf16", tl.bfloat16), torch.float16: ("*fp16", tl.float16)}
_FLOAT8_POINTER: Final = "*fp8e4nv"
#: From which on there is float8.
FLOAT8_CAPABILITY: Final = 89
_BLOCK_SIZE: Final = 16
_POINTERS: Final = {"block_tables": "*i32", "slots": "*i64", "kv_lens": "*i32", "spans": "*i32"} | dict.fromkeys(
    ("parts", "part_max", "part_sum"), "*fp32"
)
#: What a launch finds to be multiples of 16 in a pool laid out as ours.
_ALIGNED: Final = frozenset(
    [
        "x",
        "residual",
        "weight",
        "gate",
        "up",
        "cosine",
        "sine",
        "query",
        "key",
        "value",
        "k_pool",
        "v_pool",
        "out",
        "parts",
        "block_tables",
    ]
    + [f"{name}_{of}_stride" for name in ("query", "out") for of in ("row", "head")]
    + [f"{name}_{of}_stride" for name in ("k", "v") for of in ("block", "head", "token")]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one program of a compiled kernel takes."""

    kernel: str
    capability: int
    registers: int  #: of each thread
    spilled_bytes: int  #: of each thread, to local memory
    shared_bytes: int
    num_threads: int
    is_pipelined: bool  #: it copies into shared memory while it computes
    programs: int  #: that are to run on a multiprocessor at once


def compiled(
    shape: tuple[int, int, int, int], dtype: torch.dtype, capability: int, *, is_float8: bool = False
) -> Iterator[Usage]:
    """Compile attention, the store and fused operators for a layer of that shape, with all that options may add to it.

    Where `is_float8`, of attention and the store, with KV in float8.

    Raises:
        RuntimeError: a kernel needs more than such a device has.
    """
    heads, kv_heads, k_dim, v_dim = shape
    pointer, compute = DTYPES[dtype]
    pool = _FLOAT8_POINTER if is_float8 else pointer
    cut = head_shape(heads, kv_heads, k_dim, v_dim)
    types = _POINTERS | dict.fromkeys(("query", "key", "value", "cosine", "sine", "out", "sinks"), pointer)
    types |= {"k_pool": pool, "v_pool": pool, "block_ids": "*i64", "offsets": "*i64"}
    common = {"GROUP": cut.group, "K_DIM": k_dim, "V_DIM": v_dim, "BLOCK_SIZE": _BLOCK_SIZE, "COMPUTE": compute}
    common |= {"K_MAIN": cut.k_main, "K_REST": cut.k_rest, "V_MAIN": cut.v_main, "V_REST": cut.v_rest}
    tiling = decode_tiling(cut, dtype, is_float8=is_float8)
    of_heads = {"NUM_KV_HEADS": kv_heads, "GROUP_PADDED": cut.group_padded, "TILE": tiling.keys, "ROWS": 64}
    for softcap in (False, True):
        constants = common | of_heads | {"HAS_SOFTCAP": softcap}
        yield _compile(decode._attend_splits, types, constants, tiling, capability)  # noqa: SLF001
    merging = {"V_DIM": v_dim, "V_PIECE": 64, "TILE": tiling.keys, "HAS_SINKS": True}
    yield _compile(decode._merge_splits, types, merging, Tiling(0, 0, 4, 1, 4), capability)  # noqa: SLF001
    tiling = prefill_tiling(cut, dtype)
    of_tiles = {"SPANS": prefill.MIN_SPANS, "ROWS": tiling.rows, "TILE": tiling.keys}
    for has_all in (False, True):
        constants = common | of_tiles | dict.fromkeys(("HAS_LIMITS", "HAS_SOFTCAP", "HAS_SINKS"), has_all)
        yield _compile(prefill._attend_chunks, types, constants, tiling, capability)  # noqa: SLF001
    yield from _stores(shape, types, capability, is_float8=is_float8)
    if not is_float8:
        yield from _operators(heads * v_dim, pointer, capability)


def _stores(
    shape: tuple[int, int, int, int], types: dict[str, str], capability: int, *, is_float8: bool
) -> Iterator[Usage]:
    """Compile what stores keys and values as they are, and rotated by a half of them."""
    heads, kv_heads, k_dim, v_dim = shape
    padded = {"K_PADDED": triton.next_power_of_2(k_dim), "V_PADDED": triton.next_power_of_2(v_dim)}
    common = {"KV_HEADS": kv_heads, "V_DIM": v_dim, "V_PADDED": padded["V_PADDED"], "IS_FLOAT8": is_float8}
    sizes = common | {
        "K_DIM": k_dim,
        "K_PADDED": padded["K_PADDED"],
        "HEADS": store.heads_of(kv_heads, max(padded.values())),
    }
    yield _compile(store._write, types, sizes, Tiling(0, 0, 2, 1, 16), capability)  # noqa: SLF001
    half = k_dim // 4
    sizes = common | {"NUM_HEADS": heads, "HEADS": store.heads_of(heads, max(padded.values()))}
    sizes |= {"HALF": half, "HALF_PADDED": triton.next_power_of_2(half)}
    sizes |= {"REST": k_dim - 2 * half, "REST_PADDED": triton.next_power_of_2(k_dim - 2 * half)}
    yield _compile(store._rotate_write, types, sizes, Tiling(0, 0, 2, 1, 16), capability)  # noqa: SLF001


def _operators(hidden: int, pointer: str, capability: int) -> Iterator[Usage]:
    """Compile fused operators for rows of `hidden` numbers."""
    types = dict.fromkeys(("x", "residual", "weight", "out", "gate", "up"), pointer) | {"eps": "fp32"}
    for added in (False, True):
        sizes = {"SIZE": hidden, "PADDED": triton.next_power_of_2(hidden), "ROWS": 1}
        sizes |= {"ADDS_RESIDUAL": added, "ADDS_ONE": added, "ROUNDS_FIRST": not added}
        warps = operators.norm_warps(sizes["PADDED"])
        yield _compile(operators._rms_norm, types, sizes, Tiling(0, 0, warps, 1, 2), capability)  # noqa: SLF001
    for is_gelu in (False, True):
        sizes = {"IS_GELU": is_gelu, "NUMBERS": operators.GATE_NUMBERS}
        yield _compile(operators._gate, types, sizes, Tiling(0, 0, 4, 1, 8), capability)  # noqa: SLF001


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], tiling: Tiling, capability: int) -> Usage:
    names = kernel.arg_names
    floats = dict.fromkeys(
        ("scaling", "factor", "softcap", "value_scale", "inverse_k_scale", "inverse_v_scale"), "fp32"
    )
    wide = dict.fromkeys(("k_block_stride", "v_block_stride"), "i64")
    signature = {name: (types | floats | wide).get(name, "i32") for name in names}
    constants = constants | {name: 1 for name in ("k_dim_stride", "v_dim_stride") if name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in _ALIGNED}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    found = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages, "enable_fp_fusion": True},
    )
    registers, spilled = _resources(found.asm["cubin"])
    return Usage(
        kernel=kernel.fn.__name__.lstrip("_"),
        capability=capability,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=found.metadata.shared,
        num_threads=32 * tiling.num_warps,
        is_pipelined="cp.async" in found.asm["ptx"],
        programs=tiling.programs,
    )


def _resources(machine_code: bytes) -> tuple[int, int]:
    """Return registers and bytes of local memory of each thread."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {told[:200]!r}")
    return int(found[1]), int(found[2])


def main() -> None:
    """Print what each kernel takes."""
    for (name, shape), dtype, capability, is_float8 in itertools.product(
        SHAPES.items(), DTYPES, CAPABILITIES, (False, True)
    ):
        if is_float8 and capability < FLOAT8_CAPABILITY:
            continue
        for usage in compiled(shape, dtype, capability, is_float8=is_float8):
            kind = str(dtype).removeprefix("torch.") + (", KV float8" if is_float8 else "")
            print(  # noqa: T201
                f"sm_{capability} {name:24} {kind:19} {usage.kernel:14} "
                f"{usage.registers:3} registers, {usage.spilled_bytes:4} bytes spilled, "
                f"{usage.shared_bytes / 1024:6.1f} KiB shared, {usage.num_threads} threads"
                f"{', pipelined' if usage.is_pipelined else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
