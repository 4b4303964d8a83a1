"""The kernels in C++ (`engine.kernels.cpu.native`) as a library to compile; no torch.

It neither includes nor links torch: `arguments.h`. OpenMP is the one that torch has loaded, whose functions are found
when the library is, so that both have the same threads, and a slim image needs no libgomp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transport.compiled import CompiledLibrary

_DIRECTORY: Final = Path(__file__).parent
_SOURCES: Final = (
    "arguments.h",
    "attention.h",
    "elementwise.h",
    "linear.h",
    "tiles.h",
    "vec.h",
    "binding.cpp",
    "decode.cpp",
    "elementwise.cpp",
    "linear.cpp",
    "prefill.cpp",
)
#: GCC 12's own intrinsics headers
_WARNINGS: Final = ("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized")

#: Products are fused into sums only where the sources say so (see vec.h).
KERNELS: Final = CompiledLibrary(
    "kvray_kernels",
    tuple(_DIRECTORY / name for name in _SOURCES),
    ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fvisibility=hidden", *_WARNINGS),
    is_python=True,
)
