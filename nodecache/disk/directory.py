"""The folder of one model's segments: whose it is, what lies in it, and in what order that was used."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from messages.errors import ConfigError
from nodecache.disk.files import ALIGN_BYTES, Files, aligned, aligned_buffer
from nodecache.disk.layout import Model, own_checksum
from nodecache.disk.segment import SUFFIX, UNFINISHED_SUFFIX

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"
CHECKPOINT_NAME = "checkpoint"

_CHECKPOINT = struct.Struct("<8sIIQQ")  # magic, version, unused, number of blocks, checksum of what follows
_CHECKPOINT_MAGIC = b"kvrayuse"
_CHECKPOINT_VERSION = 1
_PLACE_BYTES = 16
#: With these a disk can be read but not written for now; with any other it is not what was configured.
_READ_ONLY_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}


class Unusable(NamedTuple):
    """Something in the directory that is left alone, and why."""

    path: Path
    reason: str


class ModelDirectory:
    """A model's folder below the configured one, locked against other processes. One thread at a time."""

    def __init__(self, root: Path, model: Model, files: Files) -> None:
        """Make the folder and lock it. Where that cannot be written, what is there can be read still.

        Raises:
            ConfigError: another process has it; or it is no place for files.
        """
        self.root = root
        self.model = model
        self.path = root / model.directory_name
        self._files = files
        self._lock_fd: int | None = None
        try:
            self.ensure()
        except OSError as error:
            if error.errno not in _READ_ONLY_ERRORS:
                raise ConfigError(f"disk directory {self.path}: {error.strerror}; a directory is wanted") from error
            logger.warning("disk directory %s cannot be written (%s): it is only read", self.path, error.strerror)

    def ensure(self) -> None:
        """Make the folder and lock it, where that is not so yet, or no more: it was deleted.

        Raises:
            OSError: it cannot be made, or not be written.
            ConfigError: another process has it.
        """
        if self._lock_fd is not None and self._files.is_linked(self._lock_fd):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / LOCK_NAME
        try:
            fd, is_writable = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), True
        except OSError as error:
            if error.errno not in _READ_ONLY_ERRORS or not path.exists():
                raise
            fd, is_writable = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise ConfigError(f"disk directory {self.path} is in use by {owner}; each wants its own") from None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = fd
        if is_writable:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def unlock(self) -> None:
        """Let another process have it."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def segment_paths(self) -> list[Path]:
        """Return the segments' files, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted((path for path in self.path.iterdir() if path.suffix == SUFFIX), key=lambda path: path.name)

    def delete_unfinished(self) -> None:
        """Delete what was being made when the process before ended. Raises OSError where it cannot be written."""
        for path in self.path.iterdir():
            if path.suffix == UNFINISHED_SUFFIX:
                self._files.unlink(path)

    def strangers(self) -> list[Unusable]:
        """Name what is neither ours nor a segment: other models' folders, and files of others."""
        found = []
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if path == self.path:
                continue
            other = Model.of_directory(path.name)
            if other is None:
                reason = "it is no folder of a model's blocks"
            elif other.fingerprint != self.model.fingerprint:
                reason = f"it is of another model, fingerprint {other.fingerprint.hex()[:16]}..."
            else:
                reason = f"it is of layout {other.layout_version} with blocks of {other.block_bytes} bytes"
            found.append(Unusable(path, reason))
        ours = {SUFFIX, UNFINISHED_SUFFIX}
        within = sorted(self.path.iterdir()) if self.path.is_dir() else []
        others = (path for path in within if path.name not in (LOCK_NAME, CHECKPOINT_NAME) and path.suffix not in ours)
        return found + [Unusable(path, "it is no file of a disk store") for path in others]

    def write_checkpoint(self, places: npt.NDArray[np.uint64]) -> None:
        """Write the order of use, segment id and row [num_blocks, 2], in place of the one before.

        Raises:
            OSError: the one before stays.
        """
        body = places.astype("<u8").tobytes()
        content = aligned_buffer(checkpoint_bytes(len(places)))
        header = _CHECKPOINT.pack(_CHECKPOINT_MAGIC, _CHECKPOINT_VERSION, 0, len(places), own_checksum(body))
        content[: len(header)] = header
        content[ALIGN_BYTES : ALIGN_BYTES + len(body)] = body
        unfinished = self.path / f"{CHECKPOINT_NAME}{UNFINISHED_SUFFIX}"
        fd = self._files.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            self._files.write(fd, content, 0)
            self._files.sync(fd)
        finally:
            self._files.close(fd)
        self._files.rename(unfinished, self.path / CHECKPOINT_NAME)
        self._files.sync_directory(self.path)

    def read_checkpoint(self) -> npt.NDArray[np.uint64]:
        """Return the order of use as it was written last, [num_blocks, 2]; nothing where none is whole."""
        nothing = np.zeros((0, 2), np.uint64)
        try:
            fd = self._files.open(self.path / CHECKPOINT_NAME, os.O_RDONLY)
        except OSError:
            return nothing
        try:
            content = aligned_buffer(aligned(self._files.num_bytes(fd)))
            came = self._files.read(fd, content, 0)
        except OSError:
            return nothing
        finally:
            self._files.close(fd)
        magic, version, _, num_blocks, checksum = _CHECKPOINT.unpack_from(content)
        body = content[ALIGN_BYTES : min(ALIGN_BYTES + _PLACE_BYTES * num_blocks, came)]
        is_whole = len(body) == _PLACE_BYTES * num_blocks and own_checksum(body) == checksum
        if (magic, version) != (_CHECKPOINT_MAGIC, _CHECKPOINT_VERSION) or not is_whole:
            logger.warning("disk directory %s: its checkpoint is ignored, it is not whole", self.path)
            return nothing
        return np.frombuffer(body, "<u8").reshape(num_blocks, 2).astype(np.uint64)


def checkpoint_bytes(num_blocks: int) -> int:
    """Return the length of a checkpoint of so many blocks."""
    return aligned(ALIGN_BYTES + _PLACE_BYTES * num_blocks)


def in_order_of_use(
    segment_ids: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.uint64],
    sequences: npt.NDArray[np.uint64],
    checkpoint: npt.NDArray[np.uint64],
) -> npt.NDArray[np.intp]:
    """Return the order of blocks, least recently used first: the checkpoint's, then what it does not name, as written.

    The three first are [num_blocks] and belong together.
    """
    known = {(segment_id, row): rank for rank, (segment_id, row) in enumerate(checkpoint.tolist())}
    ranks = [known.get(place, len(known)) for place in zip(segment_ids.tolist(), rows.tolist(), strict=True)]
    return np.lexsort((sequences, np.array(ranks, np.uint64)))
