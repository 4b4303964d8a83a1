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

from engine.kernels.triton import decode, prefill, store
from engine.kernels.triton.shapes import HeadShape, Tiling, decode_tiling, prefill_tiling

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
_BLOCK_SIZE: Final = 16
_POINTERS: Final = {"block_tables": "*i32", "slots": "*i64", "kv_lens": "*i32", "spans": "*i32"} | dict.fromkeys(
    ("parts", "part_max", "part_sum"), "*fp32"
)
#: What a launch finds to be multiples of 16 in a pool laid out as ours.
_ALIGNED: Final = frozenset(
    ["query", "key", "value", "k_pool", "v_pool", "out", "parts", "block_tables"]
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


def compiled(shape: tuple[int, int, int, int], dtype: torch.dtype, capability: int) -> Iterator[Usage]:
    """Compile attention and the store for a layer of that shape, with all that options may add to it.

    Raises:
        RuntimeError: a kernel needs more than such a device has.
    """
    heads, kv_heads, k_dim, v_dim = shape
    pointer, compute = DTYPES[dtype]
    cut = HeadShape.of(heads, kv_heads, k_dim, v_dim)
    types = _POINTERS | dict.fromkeys(("query", "key", "value", "k_pool", "v_pool", "out", "sinks"), pointer)
    common = {"GROUP": cut.group, "K_DIM": k_dim, "V_DIM": v_dim, "BLOCK_SIZE": _BLOCK_SIZE, "COMPUTE": compute}
    common |= {"K_MAIN": cut.k_main, "K_REST": cut.k_rest, "V_MAIN": cut.v_main, "V_REST": cut.v_rest}
    tiling = decode_tiling(cut, dtype)
    of_heads = {"NUM_KV_HEADS": kv_heads, "GROUP_PADDED": cut.group_padded, "TILE": tiling.keys, "ROWS": 64}
    for softcap in (False, True):
        constants = common | of_heads | {"HAS_SOFTCAP": softcap}
        yield _compile(decode._attend_splits, types, constants, tiling, capability)  # noqa: SLF001
    merging = {"V_DIM": v_dim, "V_PIECE": 64, "TILE": tiling.keys, "HAS_SINKS": True}
    yield _compile(decode._merge_splits, types, merging, Tiling(0, 0, 4, 1), capability)  # noqa: SLF001
    tiling = prefill_tiling(cut, dtype)
    of_tiles = {"SPANS": 64, "ROWS": tiling.rows, "TILE": tiling.keys}
    for softcap, sinks in ((False, False), (True, True)):
        constants = common | of_tiles | {"HAS_SOFTCAP": softcap, "HAS_SINKS": sinks}
        yield _compile(prefill._attend_chunks, types, constants, tiling, capability)  # noqa: SLF001
    sizes = {"K_DIM": k_dim, "V_DIM": v_dim}
    sizes |= {"K_PADDED": triton.next_power_of_2(k_dim), "V_PADDED": triton.next_power_of_2(v_dim)}
    types |= {"block_ids": "*i64", "offsets": "*i64"}
    yield _compile(store._write, types, sizes, Tiling(0, 0, 1, 1), capability)  # noqa: SLF001


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], tiling: Tiling, capability: int) -> Usage:
    names = kernel.arg_names
    floats = {"scaling": "fp32", "softcap": "fp32"}
    wide = dict.fromkeys(("k_block_stride", "v_block_stride"), "i64")
    signature = {name: (types | floats | wide).get(name, "i32") for name in names}
    constants = constants | {name: 1 for name in ("k_dim_stride", "v_dim_stride") if name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in _ALIGNED}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    found = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
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
    for (name, shape), dtype, capability in itertools.product(SHAPES.items(), DTYPES, CAPABILITIES):
        for usage in compiled(shape, dtype, capability):
            print(  # noqa: T201
                f"sm_{capability} {name:24} {str(dtype).removeprefix('torch.'):9} {usage.kernel:14} "
                f"{usage.registers:3} registers, {usage.spilled_bytes:4} bytes spilled, "
                f"{usage.shared_bytes / 1024:6.1f} KiB shared, {usage.num_threads} threads"
                f"{', pipelined' if usage.is_pipelined else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
