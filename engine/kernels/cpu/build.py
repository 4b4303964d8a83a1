"""Compiles for this machine, once, by an explicit command: `python -m engine.kernels.cpu.build`.

The kernels (see `engine.kernels.cpu.native`) and the checksum (`transport.checksum`), which lie in a cache afterwards
(`transport.compiled`). Nothing else ever starts a compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

import torch

from transport.checksum import CompiledChecksum, build_checksum, checksum_library
from transport.compiled import BuildError, CompiledLibrary, native_target, require_tool

MODULE_NAME = "kvray_kernels"

_SOURCE_DIRECTORY = Path(__file__).parent
_SOURCES = (
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


def compile_flags(target: str) -> list[str]:
    """Return flags for CPUs like `target`. Products are fused into sums only where the sources say so (see vec.h)."""
    warnings = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12's own intrinsics headers
    return ["-O3", target, "-ffp-contract=off", "-fno-math-errno", "-fopenmp", *warnings]


def kernel_library() -> CompiledLibrary:
    """Describe the library for this machine, torch and Python."""
    facts = (torch.__version__, str(sysconfig.get_config_var("SOABI")), *compile_flags(native_target()))
    return CompiledLibrary(MODULE_NAME, tuple(_SOURCE_DIRECTORY / name for name in _SOURCES), facts)


def import_library(path: Path) -> ModuleType:
    """Import a built library.

    Raises:
        ImportError: it does not load.
    """
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_library(directory: Path, target: str) -> Path:
    """Compile into an existing directory, whatever the cache holds.

    Raises:
        BuildError: a tool is missing, or the compiler refused.
    """
    require_tool("c++", "g++")
    require_tool("ninja", "ninja")
    try:
        from torch.utils import cpp_extension  # imports setuptools: only whoever builds pays for it
    except ImportError as error:
        raise BuildError(f"torch cannot build extensions here: {error}") from error
    try:
        cpp_extension.load(
            MODULE_NAME,
            [str(_SOURCE_DIRECTORY / name) for name in _SOURCES if name.endswith(".cpp")],
            extra_cflags=compile_flags(target),
            extra_ldflags=["-fopenmp"],
            build_directory=str(directory),
        )
    except (RuntimeError, subprocess.CalledProcessError, ImportError) as error:
        raise BuildError(f"the compiler refused: {error}") from error
    return directory / f"{MODULE_NAME}.so"


def build() -> Path:
    """Compile for this machine, unless the cache holds it.

    Returns:
        The shared library.

    Raises:
        BuildError: a tool is missing, or the compiler refused.
    """
    return kernel_library().build(lambda directory: compile_library(directory, native_target()))


def main() -> int:
    """Run the command: build, and print where the libraries lie. The exit code is 1 where one could not be built."""
    parser = argparse.ArgumentParser(prog="python -m engine.kernels.cpu.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="build again though the cache holds it")
    if parser.parse_args().force:
        for library in (checksum_library(), kernel_library()):
            library.path().unlink(missing_ok=True)
    begin_s = time.monotonic()
    try:
        path = build_checksum()
        name = CompiledChecksum(path).name
    except (BuildError, OSError) as error:
        sys.stderr.write(f"checksum not built, numpy will be used: {error}\n")
        return 1
    sys.stdout.write(f"checksum ready in {time.monotonic() - begin_s:.1f} s ({name}): {path}\n")
    begin_s = time.monotonic()
    try:
        path = build()
        module = import_library(path)
    except (BuildError, ImportError) as error:
        sys.stderr.write(f"kernels not built, the engine will use torch's operators: {error}\n")
        return 1
    sys.stdout.write(
        f"kernels ready in {time.monotonic() - begin_s:.1f} s ({module.vector_floats} floats a vector, "
        f"bfloat16 dot products: {'yes' if module.has_bf16_dot else 'no'}): {path}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
