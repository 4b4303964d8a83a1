"""C++ compiled for this machine, once, by an explicit command, and kept in a cache.

The key is of everything that a library's bits and its interface depend on: sources, flags, CPU, and what its owner
adds. Whoever uses a library only looks whether it is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class BuildError(Exception):
    """A library could not be compiled; says what to install or shows the compiler's words."""


@dataclass(frozen=True, slots=True)
class CompiledLibrary:
    """A shared library that may lie in the cache."""

    name: str
    sources: tuple[Path, ...]
    facts: tuple[str, ...]  #: what it depends on beside sources and CPU: flags, versions

    def path(self) -> Path:
        """Return the library's path for this machine and these sources, whether or not it was built."""
        digest = hashlib.blake2b(digest_size=12)
        for source in self.sources:
            digest.update(source.read_bytes())
        digest.update("\0".join([*self.facts, *_cpu()]).encode())
        return cache_directory("kernels") / digest.hexdigest() / f"{self.name}.so"

    def build(self, compile_into: Callable[[Path], Path]) -> Path:
        """Return the library's path; if it is not there, `compile_into(directory)` first makes it and returns where."""
        target = self.path()
        if target.exists():
            return target
        target.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent.parent) as work:
            library = compile_into(Path(work))
            target.parent.mkdir(exist_ok=True)
            library.replace(target)  # whole or not at all, whoever else builds
        return target


def native_target() -> str:
    """Return the compiler's flag for all that this machine's CPU can do."""
    return "-march=native" if platform.machine().lower() in {"x86_64", "amd64"} else "-mcpu=native"


def require_tool(tool: str, package: str) -> None:
    """Raise BuildError, which names the package, unless the tool is on the PATH."""
    if shutil.which(tool) is None:
        raise BuildError(f"{tool} is not on the PATH: install {package}")


def compile_shared(source: Path, library: Path, flags: Sequence[str]) -> Path:
    """Compile `source` into a shared library at `library`, whatever the cache holds; return where it is.

    Raises:
        BuildError: there is no compiler, or it refused.
    """
    require_tool("c++", "g++")
    done = subprocess.run(["c++", *flags, str(source), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the compiler refused: {done.stderr}")
    return library


def cache_directory(kind: str) -> Path:
    """Return where what was made of `kind` is kept: `$XDG_CACHE_HOME/kvray/KIND`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvray" / kind


def _cpu() -> list[str]:
    """Return what a native build depends on: architecture, and the CPU's model and features where the kernel tells."""
    facts = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [*facts, platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return facts + [" ".join(line.split()) for line in lines if line.startswith(wanted)]
