"""The checksum in C++ (`transport.checksum`) as a library to compile."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transport.compiled import CompiledLibrary

CHECKSUM: Final = CompiledLibrary(
    "kvray_checksum", (Path(__file__).with_name("checksum.cpp"),), ("-std=c++17", "-O3", "-Wno-psabi")
)
