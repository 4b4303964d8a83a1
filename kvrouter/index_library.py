"""The block index in C++ (`kvrouter.compiled_index`) as a library to compile."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transport.compiled import CompiledLibrary

INDEX: Final = CompiledLibrary(
    "kvray_index",
    tuple(Path(__file__).with_name(name) for name in ("index.cpp", "holder_sets.h")),
    ("-std=c++17", "-O3", "-fvisibility=hidden"),
)
