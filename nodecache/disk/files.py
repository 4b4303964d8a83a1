"""The few calls by which the store reaches its disk, apart, so that tests can record them, fail them and hold them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

#: Unit of places, lengths and addresses of all IO: a multiple of what O_DIRECT asks for (512 or 4096 bytes).
ALIGN_BYTES = 4096


def aligned(num_bytes: int) -> int:
    """Round up to a multiple of ALIGN_BYTES."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def aligned_buffer(num_bytes: int) -> memoryview:
    """Return zeroed, writable memory of at least `num_bytes`, at an aligned address and of an aligned length.

    In huge pages where there are any: the disk then gets few long pieces instead of one a page.
    """
    mapping = mmap.mmap(-1, max(aligned(num_bytes), ALIGN_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # kernels without
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)


class Files:
    """The operating system's files. Any thread; every call may last as long as the disk likes, and raises OSError."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file past the page cache, or with it where the file system knows no O_DIRECT; return its descriptor.

        Past the page cache because that is faster here for blocks in any order (docs/LOG.md), and because a block that
        is kept on disk shall not be kept in memory twice.
        """
        try:
            return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def read(self, fd: int, target: memoryview, offset: int) -> int:
        """Read into aligned memory until it is full or the file ends; return how many bytes came."""
        done = 0
        while done < len(target):
            came = os.preadv(fd, [target[done:]], offset + done)
            done += came
            if came == 0 or came % ALIGN_BYTES:  # what is not whole is the file's end
                break
        return done

    def write(self, fd: int, source: memoryview, offset: int) -> None:
        """Write all of aligned memory: a full disk shows in a short write first, then as an error."""
        done = 0
        while done < len(source):
            came = os.pwritev(fd, [source[done:]], offset + done)
            if came < min(ALIGN_BYTES, len(source) - done):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += came - came % ALIGN_BYTES

    def allocate(self, fd: int, num_bytes: int) -> None:
        """Reserve the room of a file, so that writing to it later finds the disk full as seldom as possible."""
        os.posix_fallocate(fd, 0, num_bytes)

    def sync(self, fd: int) -> None:
        """Return when what was written to the file is on disk."""
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        """Return when what was created, renamed and deleted in the directory is so on disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, in place of the file that has it."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Delete a file that may be gone already. Who has it open can still read it."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def is_linked(self, fd: int) -> bool:
        """Tell whether an open file has a name still."""
        return os.fstat(fd).st_nlink > 0

    def num_bytes(self, fd: int) -> int:
        """Return the length of an open file."""
        return os.fstat(fd).st_size
