"""Model directories made of GGUF files, in a cache: converted once, whole or not at all, whoever else wants the same.

What was converted lies below `~/.cache/kvray/models` (`$XDG_CACHE_HOME`), may be removed at any time, and is looked
through at each start:

    models/KEY/NAME/...         the model directory; clients know the model as NAME
    models/KEY/contents.json    its files: size and BLAKE3 of each
    models/KEY.lock             held by whoever looks at it or makes it
    models/KEY.*.partial/       the same, being made: it becomes KEY when it is whole and on the disk
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec
from blake3 import blake3

from cluster.child_process import Say, run_child
from cluster.launch import Stopped
from messages.errors import ConfigError
from transport.compiled import cache_directory

_POLL_S = 0.1
_CONTENTS = "contents.json"
_CONVERTER = "engine.model.gguf_conversion"


class ConvertedModel:
    """One converted model in the cache, whether or not it is there."""

    def __init__(self, name: str, *facts: bytes) -> None:
        """Name what `facts` decide, beside the converter and the libraries that it uses.

        Raises:
            ConfigError: there is no place for a cache.
        """
        converter = Path(__file__).parents[1] / Path(*_CONVERTER.split(".")).parent
        sources = [path.read_bytes() for path in sorted(converter.glob("gguf_*.py"))]
        versions = [f"{package} {version(package)}".encode() for package in ("transformers", "gguf")]
        digest = hashlib.blake2b(digest_size=12)
        for fact in (name.encode(), *facts, *sources, *versions):
            digest.update(len(fact).to_bytes(8, "little") + fact)
        self._name = name
        try:
            self._root = cache_directory("models")
        except OSError as error:
            raise ConfigError(f"there is no place to convert {name} into: {error.strerror}") from None
        self._key = digest.hexdigest()
        self._path = self._root / self._key

    def made(
        self, source_in: Callable[[Path], Path], chat_template: bytes | None, stop: threading.Event, say: Say
    ) -> Path:
        """Return the model directory, made from the GGUF file `source_in(work)` where it is not there, or damaged."""
        directory = self._path / self._name
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with _locked(self._root / f"{self._key}.lock", stop, say):
                damage = self._damage() if self._path.exists() else None
                if self._path.exists() and damage is None:
                    return directory
                if damage is not None:
                    say(f"{directory} is damaged ({damage}): made again")
                    shutil.rmtree(self._path)
                for left in self._root.glob(f"{self._key}.*.partial"):
                    shutil.rmtree(left)  # of somebody who was killed: whoever lives holds the lock
                with tempfile.TemporaryDirectory(
                    prefix=f"{self._key}.", suffix=".partial", dir=self._root, ignore_cleanup_errors=True
                ) as made:
                    self._make(Path(made), source_in, chat_template, stop, say)
        except OSError as error:
            raise ConfigError(f"{error.filename or self._path}: {error.strerror or error}") from error
        return directory

    def _make(
        self,
        made: Path,
        source_in: Callable[[Path], Path],
        chat_template: bytes | None,
        stop: threading.Event,
        say: Say,
    ) -> None:
        work, entry = made / "work", made / "entry"
        directory = entry / self._name
        work.mkdir()
        directory.mkdir(parents=True)
        source = source_in(work)
        _convert(source, directory, stop, say)
        if chat_template is not None:
            (directory / "chat_template.jinja").write_bytes(chat_template)
        files = [path for path in directory.rglob("*") if path.is_file()]
        contents = {str(path.relative_to(directory)): _File(path.stat().st_size, _digest(path)) for path in files}
        (entry / _CONTENTS).write_bytes(msgspec.json.encode(contents))
        for path in (entry, *entry.rglob("*")):
            _sync(path)
        entry.rename(self._path)
        _sync(self._root)

    def _damage(self) -> str | None:
        """Tell what of the entry is not as it was written; None: it is whole."""
        try:
            contents = msgspec.json.decode((self._path / _CONTENTS).read_bytes(), type=dict[str, _File])
        except (OSError, msgspec.DecodeError):
            return f"no {_CONTENTS}"
        for name, wanted in contents.items():
            path = self._path / self._name / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted.num_bytes:
                return f"{name} has {path.stat().st_size} bytes, not {wanted.num_bytes}"
            if _digest(path) != wanted.blake3:
                return f"{name} has other bytes than were written"
        return None


class _File(msgspec.Struct, frozen=True, array_like=True):
    """What a file of an entry must be."""

    num_bytes: int
    blake3: str


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _convert(source: Path, directory: Path, stop: threading.Event, say: Say) -> None:
    """Convert in a process of its own, whose memory ends with it."""
    command = [sys.executable, "-m", _CONVERTER, str(source), str(directory)]
    code, errors = run_child(command, stop, lambda line: say(f"converting {source.name}: {line}"))
    reason = errors[-1] if errors else "it said nothing"
    if code == 2:  # its own word: a line for people
        raise ConfigError(reason)
    if code < 0:
        needed = f"it takes some {8 * source.stat().st_size / 2**30:.1f} GiB of memory"  # of a file of 4-bit weights
        raise ConfigError(f"converting {source} was ended by {signal.Signals(-code).name}; {needed}")
    if code:
        raise ConfigError(f"converting {source} failed: {reason}")


@contextlib.contextmanager
def _locked(path: Path, stop: threading.Event, say: Say) -> Iterator[None]:
    """Hold the lock at `path`, which ends with this process."""
    with path.open("w") as file:
        has_waited = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not has_waited:
                    say("waiting for another process, which makes the same model")
                has_waited = True
                if stop.wait(_POLL_S):
                    raise Stopped from None
        yield


def _sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
