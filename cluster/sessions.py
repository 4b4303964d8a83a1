"""The directories of Ray's sessions that were kvray's own: each is locked while it is used, and cleaned afterwards.

Ray leaves a directory of logs and sockets behind for each of its lives, and two agents that notice only after minutes
that their raylet was killed. Whose lock is free, nobody uses any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

_LOCK: Final = "kvray.lock"
_LOGS: Final = "kvray"
_KILL_S: Final = 2.0
#: By which Ray tells its processes of their session; of others that were told of it, a person's, nothing is ended.
_TOLD_BY: Final = r"--(session[-_]dir|logs?[-_]dir|raylet-name|raylet_socket_name|object-store-name|store_socket_name)"


class Session:
    """The session of a Ray that this process has started."""

    def __init__(self, directory: Path) -> None:
        """Lock it, for as long as this process lives, and make room for log files."""
        self.directory = directory
        # Not closed: the lock is this process's. No process that it starts inherits it. Locked before it has its name.
        unnamed = directory / f"{_LOCK}.new"
        # Ray lets every user write into its directories: nothing that another has put there is opened.
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, _owner(directory))
        unnamed.rename(directory / _LOCK)
        self.log_dir = directory / "logs" / _LOGS
        self.log_dir.mkdir(mode=0o700, parents=True)


def clean(directory: Path) -> bool:
    """End what is left of a session of kvray's that nobody uses any more, and delete its directory; True if so."""
    try:
        if directory.is_symlink() or directory.stat().st_uid != os.getuid():
            return False
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone, or not kvray's
        return False
    try:
        if not _is_of_session(lock, directory):
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use
        return False
    finally:
        os.close(lock)
    left = list(_processes_of(directory))
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_KILL_S)
    shutil.rmtree(directory, ignore_errors=True)
    latest = directory.parent / "session_latest"
    if latest.is_symlink() and not latest.exists():
        with contextlib.suppress(OSError):
            latest.unlink()
    return True


def clean_former(ray_dir: Path) -> list[Path]:
    """Clean all sessions of this user's kvray in Ray's directory that nobody uses any more; return which.

    Those of the same command line stay: it lost a Ray and started another, and a person may look for the reason.
    """
    with contextlib.suppress(OSError):
        former = [path for path in sorted(ray_dir.glob("session_*_*")) if not _is_of_command_line(path)]
        return [directory for directory in former if clean(directory)]
    return []


def _owner(directory: Path) -> bytes:
    """Name the session, and the process that started this one: in a container that was started anew it has the same id.

    The session, because every user may move files between Ray's directories.
    """
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]  # since the boot
    return f"{directory.name} {parent} {started}".encode()


def _is_of_session(lock: int, directory: Path) -> bool:
    """Tell whether an open lock is this user's, for the session in `directory`."""
    status = os.fstat(lock)
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
    return is_ours and os.pread(lock, 4096, 0).partition(b" ")[0] == os.fsencode(directory.name)


def _is_of_command_line(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return (directory / _LOCK).read_bytes() == _owner(directory)
    return False


def _processes_of(directory: Path) -> Iterator[psutil.Process]:
    """Find this user's processes that were told of that session as Ray tells its own, by --session-dir=... or so."""
    told = re.compile(rf"{_TOLD_BY}={re.escape(str(directory))}(/.*)?", re.DOTALL)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real == os.getuid() and any(map(told.fullmatch, process.cmdline())):
                yield process
