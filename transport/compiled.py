"""C++ compiled ahead: for this machine by an explicit command, or for several baselines when a wheel is built.

A library has a name that its sources and flags decide, so that one of other sources is never taken for it. Whoever uses
one only looks whether it is there (`CompiledLibrary.found`): in the cache, compiled for just this machine, or else
beside the package, where a wheel has it for each of BASELINES (`hatch_build.py`). Nothing here needs more than the
standard library: a wheel is built without what kvray needs to run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

#: Where a wheel has libraries: PREBUILT / baseline / name-digest.so.
PREBUILT: Final = Path(__file__).parent / "prebuilt"


class BuildError(Exception):
    """A library could not be compiled; says what to install or shows the compiler's words."""


class Baseline(NamedTuple):
    """What a library needs of a CPU."""

    cpu_flags: frozenset[str]  #: what the CPU can do, as Linux calls it
    compiler_flags: tuple[str, ...]


#: x86-64-v3 and -v4, as the psABI has them: https://gitlab.com/x86-psABIs/x86-64-ABI
_V3: Final = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4: Final = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
#: By machine, then by name, the best first. All of x86-64's have kernels on AMX's tiles, and ask for them at start.
BASELINES: Final[dict[str, dict[str, Baseline]]] = {
    "x86_64": {
        "avx512-bf16": Baseline(_V4 | {"avx512_bf16"}, ("-march=x86-64-v4", "-mavx512bf16")),
        "avx512": Baseline(_V4, ("-march=x86-64-v4",)),
        "avx2": Baseline(_V3, ("-march=x86-64-v3",)),
    },
    "aarch64": {"neon": Baseline(frozenset(), ("-march=armv8-a",))},
}


def baselines_of(machine: str, cpu_flags: Iterable[str]) -> list[str]:
    """Return the names of the baselines that a CPU with these flags meets, the best first."""
    flags = frozenset(cpu_flags)
    return [name for name, baseline in BASELINES.get(machine, {}).items() if baseline.cpu_flags <= flags]


@dataclass(frozen=True, slots=True)
class CompiledLibrary:
    """A shared library that may have been compiled."""

    name: str
    sources: tuple[Path, ...]  #: headers among them
    flags: tuple[str, ...] = ()  #: of the compiler, beside the CPU's
    is_python: bool = False  #: it includes Python.h, of which it uses the stable ABI

    def found(self) -> Path | None:
        """Return the library to use on this machine; None where it was never built, or not for such a CPU."""
        if (path := self.path()).exists():
            return path
        prebuilt = (self.prebuilt(baseline) for baseline in baselines_of(platform.machine(), cpu_flags()))
        return next((path for path in prebuilt if path.exists()), None)

    def path(self) -> Path:
        """Return where the library that is compiled for this machine lies, whether or not it was built."""
        digest = self._digest(native_target(), *_cpu())
        return cache_directory("kernels") / digest / f"{self.name}.so"

    def prebuilt(self, baseline: str) -> Path:
        """Return where a wheel has the library for `baseline`, whether or not it does."""
        flags = BASELINES[platform.machine()][baseline].compiler_flags
        return PREBUILT / baseline / f"{self.name}-{self._digest(*flags)}.so"

    def build(self) -> Path:
        """Compile for this machine, unless the cache holds it; return the library's path.

        Raises:
            BuildError: a tool is missing, or the compiler refused.
        """
        target = self.path()
        if target.exists():
            return target
        target.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent.parent) as work:
            library = self.compile(Path(work), [native_target()])
            target.parent.mkdir(exist_ok=True)
            library.replace(target)  # whole or not at all, whoever else builds
        return target

    def compile(self, directory: Path, target: Sequence[str]) -> Path:
        """Compile into an existing directory for CPUs that the flags `target` name, whatever the cache holds.

        Raises:
            BuildError: a tool is missing, or the compiler refused.
        """
        require_tool("c++", "g++")
        flags = [*self.flags, *target, "-fPIC"]
        if self.is_python:
            flags += ["-I", sysconfig.get_paths()["include"]]
        sources = [source for source in self.sources if source.suffix == ".cpp"]
        objects = [directory / f"{source.stem}.o" for source in sources]
        commands = [["c++", *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            list(threads.map(_compile, commands))
        library = directory / f"{self.name}.so"
        _compile(["c++", "-shared", *map(str, objects), "-o", str(library)])
        return library

    def _digest(self, *facts: str) -> str:
        digest = hashlib.blake2b(digest_size=12)
        for source in self.sources:
            digest.update(source.read_bytes())
        digest.update("\0".join([*self.flags, *facts]).encode())
        return digest.hexdigest()


def _compile(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the compiler refused: {done.stderr}")


def native_target() -> str:
    """Return the compiler's flag for all that this machine's CPU can do."""
    return "-march=native" if platform.machine().lower() in {"x86_64", "amd64"} else "-mcpu=native"


def require_tool(tool: str, package: str) -> None:
    """Raise BuildError, which names the package, unless the tool is on the PATH."""
    if shutil.which(tool) is None:
        raise BuildError(f"{tool} is not on the PATH: install {package}")


def cache_directory(kind: str) -> Path:
    """Return where what was made of `kind` is kept: `$XDG_CACHE_HOME/kvray/KIND`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvray" / kind


def cpu_flags() -> list[str]:
    """Return what this machine's CPU can do, as Linux calls it."""
    return next((line.partition(":")[2].split() for line in _cpu() if line.startswith(("flags", "Features"))), [])


def _cpu() -> list[str]:
    """Return what a native build depends on: architecture, and the CPU's model and features where the kernel tells."""
    facts = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [*facts, platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return facts + [" ".join(line.split()) for line in lines if line.startswith(wanted)]
