"""Starts and ends an application on Ray, from the command line, and starts a Ray of its own anew when parts of it die.

The keeper (cluster/keeper.py) does it, in a process of its own, which this one starts, watches and ends. Everything
that was started is ended again, whatever happens: on Ctrl-C, on SIGTERM, on an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import msgspec
import psutil

from cluster.announcement import Announcement, ServerFound
from cluster.config import KvrayConfig, forget_credentials
from cluster.credentials import CredentialFiles, for_joined_cluster
from cluster.joining import cluster_to_join
from cluster.keeper_messages import Failed, InSession, KeeperTask, Progress, Report, Seen, Up
from cluster.listener import SharedListener
from cluster.log_tail import LogTail
from cluster.sessions import clean
from messages.errors import ConfigError, KvrayError, WorkerError, error_from_info
from messages.fleet import WorkerInfo

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_LOOK_S = 0.5  #: between two looks at the processes, at most
#: A process that stands still for so many is killed; not by the clock, which runs on while a machine sleeps.
_FROZEN_LOOKS = 10
#: Likewise without a word of Serve's controller, which is lost then; Ray replaces one that ended within seconds.
_SILENT_LOOKS = 60
_SHORT_LIFE_S = 10.0
_MAX_SHORT_LIVES = 3  #: in a row; then a further start is of no use
_SHUTDOWN_S = 7.0  #: for all to end politely; then it is killed
_KILL_S = 2.0
_PR_SET_CHILD_SUBREAPER = 36  #: linux/prctl.h

#: What a Ray of our own cannot do without, by process name; the raylet ends itself, at times late, without its agents.
_PARTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "raylet", "gcs_server")


class Stopped(Exception):  # noqa: N818 - not an error: the user wants us to end
    """SIGINT or SIGTERM arrived."""


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set, from now until the block ends."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running(
    config: KvrayConfig,
    stop: threading.Event,
    on_progress: Callable[[str], None] = lambda _: None,
    on_line: Callable[[str, str], None] = lambda _name, _line: None,
) -> Iterator[Launched]:
    """Serve the application for as long as the block lasts.

    On other threads `on_progress` is called with what happens while it starts, `on_line` with the name of a process of
    a Ray of our own and each line that it writes, until `stop` is set.

    Raises:
        ConfigError: the application cannot start as configured; one line says why.
        WorkerError: Ray or Serve failed.
        Stopped: `stop` was set while it started.
    """

    def on_line_before_end(name: str, line: str) -> None:
        if not stop.is_set():  # nothing is worth telling about the end of what is being ended
            on_line(name, line)

    launched = Launched(config, on_progress, on_line_before_end)
    try:
        launched.wait_until_up(stop)
        yield launched
    except WorkerError as error:
        launched.end()
        if launched.log_dir is not None:
            error.message += f"; what its processes said: {launched.log_dir}"
        raise
    finally:
        launched.end()


class Launched:
    """An application that is kept answering requests, by a thread of its own."""

    def __init__(
        self, config: KvrayConfig, on_progress: Callable[[str], None], on_line: Callable[[str, str], None]
    ) -> None:
        self.url = ""
        self.workers: tuple[WorkerInfo, ...] = ()  #: one of each kind, as they were when it began to serve
        self.is_own_cluster = False  #: Ray is started here, and ends with us
        self.wants_api_key = False
        self.log_dir: Path | None = None  #: of a Ray of our own: where each process keeps a file of what it says
        self._config = config
        self._credentials = CredentialFiles()
        self._on_progress = on_progress
        self._on_line = on_line
        self._announcement: Announcement | None = None
        self._error: BaseException | None = None
        self._is_up = threading.Event()
        self._ending = threading.Event()
        # One thread all the way: the keeper is killed when the thread that started it ends.
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def wait_until_up(self, stop: threading.Event) -> None:
        """Start, and wait until requests are answered; raises what `running` raises."""
        self._thread.start()
        while not self._is_up.is_set():
            if stop.wait(_POLL_S):
                raise Stopped
            if not self._thread.is_alive() and not self._is_up.is_set():
                assert self._error is not None, "it ends early with an error only"
                raise self._error

    def wait(self, stop: threading.Event) -> None:
        """Wait until `stop` is set.

        Raises:
            KvrayError: the application was lost, and could not be started anew.
        """
        while not stop.wait(_POLL_S):
            if self._error is not None:
                raise self._error

    def end(self) -> None:
        """End all that was started; what does not end politely is killed."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            address = cluster_to_join()
            self.is_own_cluster = address is None
            if address is None:
                self._config = self._credentials.keep(self._config)
                forget_credentials()
            else:
                self._config = for_joined_cluster(self._config)
            http = self._config.http
            has_tenants = bool(self._config.tenants.members)
            self.wants_api_key = http.requires_api_key or http.api_key_file is not None or has_tenants
            listener = SharedListener(self._config.http.host, self._config.http.port) if address is None else None
            with contextlib.closing(listener) if listener is not None else contextlib.nullcontext():
                self._keep_up(address, listener)
        except BaseException as error:  # noqa: BLE001 - carried to whoever waits
            self._error = error
        finally:
            if self._announcement is not None:
                self._announcement.close()
            self._credentials.close()

    def _keep_up(self, address: str | None, listener: SharedListener | None) -> None:
        """Bring the application up, and up again whenever it was lost, until its end is wanted."""
        task = KeeperTask(config=self._config, address=address, listener=None if listener is None else listener.name)
        lost = ""  #: what was lost, once something was
        num_short = 0
        while True:
            life = _Life(task, self._on_line)
            is_wanted_end = False
            try:
                lost = life.run(self._ending, self._on_progress, functools.partial(self._on_up, life))
                is_wanted_end = not lost
                if lost and listener is not None:
                    listener.refuse()  # at once, while the rest of this life ends and the next one begins
            except KvrayError as error:
                is_wanted_end = isinstance(error, ConfigError)
                if lost:
                    error.message = f"{lost}; starting anew failed: {error.message}"
                raise
            finally:
                self.log_dir = life.log_dir
                life.end(is_polite=not lost, keeps_session=not is_wanted_end)
            if self._ending.is_set():
                return
            if not self._is_up.is_set():
                raise WorkerError(f"{lost} while it started")
            if listener is None:
                raise WorkerError(f"lost the Ray cluster at {address}: {lost}; the application lives on where Ray does")
            num_short = num_short + 1 if life.up_s < _SHORT_LIFE_S else 0
            if num_short == _MAX_SHORT_LIVES:
                raise WorkerError(f"{lost}; {num_short} lives in a row ended within {_SHORT_LIFE_S:.0f} s")
            logger.error("%s: starting Ray and the application anew", lost)

    def _on_up(self, life: _Life, url: str, seconds: float) -> None:
        if self._is_up.is_set():
            logger.warning("serving again after %.0f s", seconds)
        self.url = url
        self.workers, self.log_dir = life.workers, life.log_dir
        if self._announcement is None:
            key_file = self._config.http.api_key_file if self.is_own_cluster else None  # elsewhere it is the nodes'
            self._announcement = Announcement(ServerFound(url=url, pid=os.getpid(), api_key_file=key_file))
        self._is_up.set()


class _Life:
    """One keeper and all processes that came of it, from its start to their end."""

    def __init__(self, task: KeeperTask, on_line: Callable[[str, str], None] = lambda _name, _line: None) -> None:
        """Start the keeper with `task`; `end` is to be called, whatever happens.

        `on_line` is called, on any thread, with the name of a process of ours and each line that it writes.
        """
        self.workers: tuple[WorkerInfo, ...] = ()  #: one of each kind, once requests are answered
        self.log_dir: Path | None = None  #: once Ray was started
        self._session: Path | None = None
        self._tail: LogTail | None = None
        self._on_line = on_line
        self._is_own_cluster = task.address is None
        self._others = set(psutil.Process().children(recursive=True))  #: not ours to end
        # Orphans come to us: whatever ends between us and them, we find all that was started.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._line, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "cluster.keeper", str(theirs.fileno()), str(os.getpid())]
            self._keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._line.sendall(msgspec.json.encode(task) + b"\n")
        self._line.setblocking(False)
        self._received = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._line, selectors.EVENT_READ)
        self._up_since_s: float | None = None
        self._parts: dict[psutil.Process, str] = {}  #: of Ray, by name
        self._frozen: dict[psutil.Process, int] = {}  #: looks at which it stood still, without a break

    @property
    def up_s(self) -> float:
        """For how long requests have been answered."""
        return 0.0 if self._up_since_s is None else time.monotonic() - self._up_since_s

    def run(
        self, ending: threading.Event, on_progress: Callable[[str], None], on_up: Callable[[str, float], None]
    ) -> str:
        """Wait until something that cannot be replaced was lost; return what, "" where `ending` was set.

        `on_up` is called with the URL at which requests are answered now, and the seconds that it took.

        Raises:
            KvrayError: the keeper says that requests cannot be answered, or not any more, as configured.
        """
        began_s = time.monotonic()
        num_silent = 0
        while not ending.is_set():
            reports = self._reports(_LOOK_S)
            num_silent = 0 if reports else num_silent + 1
            for report in reports:
                match report:
                    case Progress(text):
                        on_progress(text)
                    case InSession(directory, log_dir):
                        self._session, self.log_dir = Path(directory), Path(log_dir)
                        self._tail = LogTail(self.log_dir, self._on_line)
                    case Up(url, workers):
                        if self._tail is not None:
                            self._tail.drain()
                        self.workers = workers
                        self._up_since_s = time.monotonic()
                        on_up(url, self._up_since_s - began_s)
                    case Seen():
                        pass
                    case Failed(error):
                        raise error_from_info(error)
            if self._is_own_cluster:
                if (part := self._look()) is not None:
                    return part
                if self._up_since_s is not None and num_silent >= _SILENT_LOOKS:
                    return f"Ray Serve's controller has not answered for {_SILENT_LOOKS * _LOOK_S:.0f} s"
            if self._keeper.poll() is not None:
                return self._end_of_keeper()
        return ""

    def end(self, *, is_polite: bool, keeps_session: bool = False) -> None:
        """End all of it: by the keeper, which is given time for it if `is_polite`, and by force.

        Ray's session is deleted, with all log files, unless `keeps_session`: then the next one that starts does so.
        """
        self._selector.close()
        self._line.close()
        if is_polite:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(_SHUTDOWN_S)
        ends_s = time.monotonic() + _KILL_S
        while (family := self._family()) and time.monotonic() < ends_s:
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=_POLL_S)
        if self._tail is not None:
            self._tail.close()
        if self._session is not None and not keeps_session:
            clean(self._session)

    def _reports(self, timeout_s: float) -> list[Report]:
        """Return what the keeper reported; waits for `timeout_s`, less where there is something already."""
        if not self._selector.select(timeout_s):
            return []
        try:
            received = self._line.recv(2**16)
        except OSError:
            received = b""
        if not received:  # the keeper ends
            time.sleep(timeout_s)
        *lines, self._received = (self._received + received).split(b"\n")
        return [msgspec.json.decode(line, type=Report) for line in lines]

    def _end_of_keeper(self) -> str:
        code = self._keeper.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process that Ray's driver runs in {how}"

    def _look(self) -> str | None:
        """Tell which parts that Ray cannot do without have ended; kill whoever stands still."""
        frozen = {}
        for member in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if member not in self._parts and (name := member.name()) in _PARTS:
                    self._parts[member] = name
                if member.status() == psutil.STATUS_STOPPED:  # SIGSTOP, and nobody to continue it
                    frozen[member] = self._frozen.get(member, 0) + 1
                    if frozen[member] == _FROZEN_LOOKS:
                        logger.error("%s (process %d) stands still: killed", member.name(), member.pid)
                        member.kill()
                elif self._is_dead_orphan(member):
                    with contextlib.suppress(psutil.TimeoutExpired):  # other threads of it are still ending
                        member.wait(0)
        self._frozen = frozen
        lost = {name for part, name in self._parts.items() if not _is_alive(part)}
        return f"Ray's {' and '.join(sorted(lost, key=_PARTS.index))} ended" if lost else None

    def _is_dead_orphan(self, member: psutil.Process) -> bool:
        """Tell whether it came to us and has ended; how the keeper ended is asked for elsewhere."""
        is_ours = member.ppid() == os.getpid() and member.pid != self._keeper.pid
        return is_ours and bool(member.status() == psutil.STATUS_ZOMBIE)

    def _family(self) -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - self._others


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
