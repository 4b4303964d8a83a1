"""Compiles the kernels for this machine, once, by an explicit command: `python -m engine.kernels.cpu.build`.

The result lies in a cache, under a key of everything that its bits and its binary interface depend on: sources, flags,
compiler, CPU, torch, Python. Nothing else in the engine ever starts a compiler; see `engine.kernels.cpu.native`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch

MODULE_NAME = "kvray_kernels"

_SOURCE_DIRECTORY = Path(__file__).parent
_SOURCES = (
    "attention.h",
    "elementwise.h",
    "linear.h",
    "vec.h",
    "binding.cpp",
    "decode.cpp",
    "elementwise.cpp",
    "linear.cpp",
    "prefill.cpp",
)


class BuildError(Exception):
    """The kernels could not be compiled; says what to install or shows the compiler's words."""


def native_target() -> str:
    """Return the compiler's flag for all that this machine's CPU can do."""
    return "-march=native" if platform.machine().lower() in {"x86_64", "amd64"} else "-mcpu=native"


def compile_flags(target: str) -> list[str]:
    """Return flags for CPUs like `target`. Products are fused into sums only where the sources say so (see vec.h)."""
    warnings = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12's own intrinsics headers
    return ["-O3", target, "-ffp-contract=off", "-fno-math-errno", "-fopenmp", *warnings]


def cache_directory() -> Path:
    """Return where builds are kept: `$XDG_CACHE_HOME/kvray/kernels`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvray" / "kernels"


def library_path() -> Path:
    """Return the library's path for this machine, torch, Python and these sources, whether or not it was built."""
    return cache_directory() / _key() / f"{MODULE_NAME}.so"


def _key() -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name in _SOURCES:
        digest.update((_SOURCE_DIRECTORY / name).read_bytes())
    facts = [torch.__version__, sysconfig.get_config_var("SOABI"), " ".join(compile_flags(native_target())), *_cpu()]
    digest.update("\0".join(map(str, facts)).encode())
    return digest.hexdigest()


def _cpu() -> list[str]:
    """Return what a native build depends on: architecture, and the CPU's model and features where the kernel tells."""
    facts = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [*facts, platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return facts + [" ".join(line.split()) for line in lines if line.startswith(wanted)]


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
    for tool, package in (("c++", "g++"), ("ninja", "ninja")):
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} is not on the PATH: install {package}")
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
    target = library_path()
    if target.exists():
        return target
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent.parent) as work:
        library = compile_library(Path(work), native_target())
        target.parent.mkdir(exist_ok=True)
        library.replace(target)  # whole or not at all, whoever else builds
    return target


def main() -> int:
    """Run the command: build, and print where the library lies. The exit code is 1 where it could not be built."""
    parser = argparse.ArgumentParser(prog="python -m engine.kernels.cpu.build", description=build.__doc__)
    parser.add_argument("--force", action="store_true", help="build again though the cache holds it")
    if parser.parse_args().force:
        library_path().unlink(missing_ok=True)
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
