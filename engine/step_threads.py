"""How many threads compute a step on a CPU: as many as get a core of their own.

The threads of a team wait for each other many times in a step. One of them that shares its core holds up all, and
they spin meanwhile: two threads beside one busy process are slower than one alone. So a team has no more threads than
its worker has cores of the node (`engine.cores`), becomes smaller when they wait for cores that other processes take,
and larger again when cores lie idle. A model gives the same bits with any number of threads.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from engine.cores import NodeCores

#: A team is judged by what it got in so many seconds of steps.
_WINDOW_S = 0.1
#: Of the time that it wants to run a thread runs for so much, or it shares its core.
_OWN_CORE = 0.7
#: So much less than a whole core counts as one.
_TOLERANCE = 0.3
#: The parts of the node's cores are looked at so often within a step: a few microseconds each time.
_LOOK_S = 0.001
#: A team that shrank looks for idle cores after so long; after twice as long each time that it grew too soon.
_PAUSE_S = 0.1
_MAX_PAUSE_S = 30.0
#: Who is of a team is at work for at least so much of the time of its steps.
_AT_WORK = 0.5
_TASKS = Path("/proc/self/task")
_STAT = Path("/proc/stat")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class TeamSize:
    """Decides the number of threads, `size`, at most `most`. Pure."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = most
        self._pause_s = _PAUSE_S
        self._shrunk_s = self._grown_s = float("-inf")

    def on_shares(self, shares: Sequence[float], now_s: float) -> None:
        """Take in, of each of the team's threads, for which share of the time that it wanted a core it had one."""
        if len(shares) < 2 or min(shares) >= _OWN_CORE:
            return
        self.size = max(1, min(len(shares) - 1, int(sum(shares) + _TOLERANCE)))
        is_too_soon = now_s < self._grown_s + 2 * self._pause_s
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S) if is_too_soon else _PAUSE_S
        self._shrunk_s = now_s

    def may_grow(self, now_s: float) -> bool:
        """Tell whether idle cores are worth looking for."""
        return self.size < self.most and now_s >= self._shrunk_s + self._pause_s

    def on_idle(self, num_idle_cores: float, now_s: float) -> None:
        """Take in how many of the machine's cores are used by nobody while the team computes."""
        added = int(num_idle_cores + _TOLERANCE)
        if added > 0 and self.may_grow(now_s):
            self.size = min(self.most, self.size + added)
            self._grown_s = now_s


class _Times(NamedTuple):
    """What a thread did so far, in ns."""

    ran: int
    waited: int  #: for a core


#: Where the counters stand, by the thread's id: all of the process, or those of the team once they are known.
_Counters: TypeAlias = dict[str, _Times]


class StepThreads:
    """Sets torch's threads for what is computed within `step()`. One thread at a time, the same one within steps.

    Where the kernel does not tell how long threads wait for cores, only the worker's part of the node counts.
    """

    def __init__(self, most: int, cores: NodeCores) -> None:
        self.team = TeamSize(most)
        self._cores = cores
        self._size = 0  # torch's threads; 0: not set yet
        self._looked_s = 0.0
        self._members: list[str] | None = None  # ids of the team's threads; None: not known
        self._before: _Counters | None = None  # when the window began
        self._busy_s = 0.0  # within steps of the window; the two others of those steps that could have had more threads
        self._watched_s = 0.0
        self._unused_s = 0.0  # cores that no other process used, times seconds

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Compute a step, on the worker's part of the cores."""
        begun_s = time.monotonic()
        self._fit(begun_s)
        if self._before is None and self.team.most > 1:
            self._before = _counters(self._members)
        unused_s = _unused_s() if self.team.may_grow(begun_s) else None
        yield
        now_s = time.monotonic()
        self._busy_s += now_s - begun_s
        if unused_s is not None:
            self._unused_s += _unused_s() - unused_s
            self._watched_s += now_s - begun_s
        if self._before is not None and self._busy_s >= _WINDOW_S:
            self._before = self._judge(self._before, now_s)
            self._busy_s = self._watched_s = self._unused_s = 0.0

    def on_layer(self) -> None:
        """Go on with other threads, within a step, where the worker's part of the cores is another by now."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_S:
            self._fit(now_s)

    def rest(self) -> None:
        """Leave the cores to others until the next step."""
        self._cores.give_back()

    def close(self) -> None:
        """End: nothing is computed any more."""
        self._cores.close()

    def _fit(self, now_s: float) -> None:
        """Compute with as many threads as there are cores for."""
        self._looked_s = now_s
        size = self._cores.take(self.team.size)
        if size != self._size:
            torch.set_num_threads(size)
            self._size = size
            self._members = self._before = None
            self._busy_s = self._watched_s = self._unused_s = 0.0

    def _judge(self, before: _Counters, now_s: float) -> _Counters | None:
        """Let the team be as large as it should after a window; return where the next begins."""
        now = _counters(self._members)
        if now is None:
            return None
        spent = {
            thread: _Times(times.ran - earlier.ran, times.waited - earlier.waited)
            for thread, times in now.items()
            if (earlier := before.get(thread)) is not None
        }
        if self._members is None:
            # Whoever is of the team was at work, or waited for others of it, or for a core, while steps were computed.
            busy = [thread for thread, times in spent.items() if sum(times) > _AT_WORK * 1e9 * self._busy_s]
            self._members = sorted(busy, key=lambda thread: sum(spent[thread]))[-self._size :]
        team = [spent[thread] for thread in self._members if thread in spent]
        if len(team) == self._size:
            self.team.on_shares([times.ran / max(1, sum(times)) for times in team], now_s)
        else:
            self._members = None
        if self._watched_s > 0:
            self.team.on_idle(self._unused_s / self._watched_s - self._size, now_s)
        return now


def _counters(members: list[str] | None) -> _Counters | None:
    """Read the counters of these threads, or of all; None where the kernel does not give them."""
    threads: _Counters = {}
    for thread in [task.name for task in _TASKS.iterdir()] if members is None else members:
        with contextlib.suppress(OSError, ValueError):  # it ended
            ran, waited, _ = (_TASKS / thread / "schedstat").read_text().split()
            threads[thread] = _Times(int(ran), int(waited))
    return threads or None


def _unused_s() -> float:
    """Read for how long cores of the machine, counted together, were used by no other process."""
    return int(_STAT.read_text().split(None, 5)[4]) / _TICKS_PER_S + time.process_time()
