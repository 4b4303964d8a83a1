"""C++ compiled ahead: for this machine by an explicit command, or for several baselines when a wheel is built.

A library has a name that its sources and flags decide, so that one of other sources is never taken for it. Whoever uses
one only looks whether it is there (`CompiledLibrary.opened`): in the cache, compiled for just this machine, or else
beside the package, where a wheel has it for each of BASELINES (`hatch_build.py`). In the cache a digest of its bytes
lies beside it: half a library may be loaded as if it were whole, and end who calls it. Nothing here needs more than the
standard library: a wheel is built without what kvray needs to run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Where a wheel has libraries: PREBUILT / baseline / name-digest.so.
PREBUILT: Final = Path(__file__).parent / "prebuilt"
_DIGEST: Final = ".blake2b"  #: of a library in the cache: the ending of the file that has it, in hex


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
        return next(iter(self._candidates()), None)

    def opened(self, open_path: Callable[[Path], T]) -> T | None:
        """Return what `open_path` makes of the best library that loads on this machine; None: there is none."""
        for path in self._candidates():
            try:
                return open_path(path)
            except (
                OSError,
                ImportError,
                AttributeError,
            ) as error:  # of another C library, say, in a home that is shared
                _log.warning("%s does not load: %s", path, error)
        return None

    def _candidates(self) -> list[Path]:
        """Return the libraries for this machine that are there, the best first."""
        found = []
        with contextlib.suppress(OSError):  # no home, or one that is somebody else's
            path = self.path()
            if _is_whole(path):
                found.append(path)
            elif path.exists():
                _log.warning("%s does not load: it is not as it was written", path)
        prebuilt = (self.prebuilt(baseline) for baseline in baselines_of(platform.machine(), cpu_flags()))
        return found + [path for path in prebuilt if path.exists()]

    def path(self) -> Path:
        """Return where the library that is compiled for this machine lies, whether or not it was built.

        Raises:
            OSError: as for `cache_directory`.
        """
        digest = self._digest(native_target(), *_cpu())
        return cache_directory("kernels") / digest / f"{self.name}.so"

    def prebuilt(self, baseline: str) -> Path:
        """Return where a wheel has the library for `baseline`, whether or not it does."""
        flags = BASELINES[platform.machine()][baseline].compiler_flags
        return PREBUILT / baseline / f"{self.name}-{self._digest(*flags)}.so"

    def build(self) -> Path:
        """Compile for this machine, unless the cache holds it; return the library's path.

        Raises:
            BuildError: a tool is missing, the compiler refused, or there is no place for it.
        """
        try:
            target = self.path()
            if _is_whole(target):
                return target
            target.parent.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent.parent) as work:
                library = self.compile(Path(work), [native_target()])
                digest = Path(work) / f"{self.name}{_DIGEST}"
                digest.write_text(_digest_of(library))
                target.parent.mkdir(exist_ok=True)
                digest.replace(target.with_suffix(_DIGEST))
                library.replace(target)  # whole or not at all, whoever else builds
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise BuildError(f"{where}{error.strerror or error} (XDG_CACHE_HOME says where it lies)") from error
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


def _digest_of(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _is_whole(path: Path) -> bool:
    """Tell whether a library in the cache is there, as it was written; one without a digest was put there by hand."""
    if not path.exists():
        return False
    digest = path.with_suffix(_DIGEST)
    return not digest.exists() or digest.read_text(errors="replace") == _digest_of(path)


def _compile(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
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
    """Return where what was made of `kind` is kept: `$XDG_CACHE_HOME/kvray/KIND`, by default below `~/.cache`.

    Raises:
        OSError: there is no home.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # as its specification wants it
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            raise OSError(errno.ENOENT, "there is no home directory, and no XDG_CACHE_HOME") from None
    return root / "kvray" / kind


def cpu_flags() -> list[str]:
    """Return what this machine's CPU can do, as Linux calls it."""
    return next((line.partition(":")[2].split() for line in _cpu() if line.startswith(("flags", "Features"))), [])


def _cpu() -> list[str]:
    """Return what a native build depends on: architecture, and the CPU's model and features where the kernel tells."""
    facts = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return [*facts, platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return facts + [" ".join(line.split()) for line in lines if line.startswith(wanted)]
