"""Cells, turns and what was measured of them: contenders pull, round by round, and the bytes are compared.

run = Run(target, source)
await first_pulls(run, {"shm": pull, ...})
await measure(run, Cell(512 * KIB, 16), budget_s=10.0, min_rounds=9)
run.gb_per_s(cell, "shm"), run.ratio(cell, "shm", "memcpy")
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import numpy as np
import psutil

from transport.memory import Memory
from transport.protocol import Copy, TransferError

KIB, MIB = 1 << 10, 1 << 20
SEED = 1
LARGE_BYTES = 512 * KIB  #: of a block
SUM = "+sum"  #: ends the name of a road that is verified


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table: so many blocks of one size, pulled at once."""

    block_bytes: int
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.block_bytes * self.num_blocks

    @property
    def is_large(self) -> bool:
        """Whether it is a batch of large blocks: there rates are judged."""
        return self.block_bytes >= LARGE_BYTES and self.num_blocks >= 16

    def __str__(self) -> str:
        return f"{self.num_blocks} x {_bytes_shown(self.block_bytes)}"

    def copies(self, rng: random.Random, pool_bytes: int) -> list[Copy]:
        """Draw copies from random places of one pool to random places of the other."""
        size, places = self.block_bytes, range(pool_bytes // self.block_bytes)
        pairs = zip(rng.sample(places, self.num_blocks), rng.sample(places, self.num_blocks), strict=True)
        return [Copy(source * size, target * size, size) for source, target in pairs]


#: Returns the seconds that it took only where it pulls in a process of its own, which measures and compares by itself.
Pull = Callable[[Sequence[Copy]], Awaitable[float | None]]


@dataclass(slots=True)
class Run:
    """The pools, who takes part, and what was measured."""

    target: Memory
    source: Memory  #: the same bytes as the other process's pool
    pulls: dict[str, Pull] = field(default_factory=dict)  #: by contender
    left_out: dict[str, str] = field(default_factory=dict)  #: why
    processes: list[psutil.Process] = field(default_factory=list)
    seconds: defaultdict[Cell, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  #: medians
    cpu_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  #: in large cells
    cpu_bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    lag_ms: dict[str, float] = field(default_factory=dict)  #: by road

    def gb_per_s(self, cell: Cell, name: str) -> float | None:
        """Return the rate by the median time; None where it was not measured."""
        seconds = self.seconds[cell].get(name)
        return None if seconds is None else cell.num_bytes / seconds / 1e9

    def ratio(self, cell: Cell, name: str, peer: str) -> float | None:
        """Return how many times as fast as `peer` contender `name` is; None where one was not measured."""
        own, other = self.seconds[cell].get(name), self.seconds[cell].get(peer)
        return None if own is None or other is None else other / own

    def sum_percent(self, cell: Cell, road: str) -> float | None:
        """Return what verification adds to the time of a transfer, in percent; None where it was not measured."""
        ratio = self.ratio(cell, road, road + SUM)
        return None if ratio is None else 100 * (ratio - 1)


async def first_pulls(run: Run, pulls: Mapping[str, Pull]) -> None:
    """Let more contenders take part: each touches every page, and connects; who cannot is left out."""
    rng = random.Random(SEED)
    cell = Cell(2 * MIB, run.target.num_bytes // (2 * MIB))
    for name, pull in pulls.items():
        copies = cell.copies(rng, run.target.num_bytes)
        wipe(run, copies)
        try:
            if await pull(copies) is None:
                check(run, name, copies)
        except TransferError as error:
            run.left_out[name] = error.message
        else:
            run.pulls[name] = pull


# --------------------------------------------------------------------------------------------------------- measuring


async def measure(run: Run, cell: Cell, *, budget_s: float, min_rounds: int) -> None:
    """Measure a cell, in rounds until the time is over; in the first, which does not count, bytes are compared."""
    rng = random.Random(SEED)
    taken: dict[str, list[float]] = {name: [] for name in run.pulls}
    ends_s = time.perf_counter() + budget_s
    num_rounds = 0
    while num_rounds <= min_rounds or time.perf_counter() < ends_s:
        for name in rng.sample(list(run.pulls), len(run.pulls)):
            copies = cell.copies(rng, run.target.num_bytes)
            if num_rounds == 0:
                wipe(run, copies)
                if await run.pulls[name](copies) is None:
                    check(run, name, copies)
                continue
            await asyncio.sleep(0)  # not every pull lets the loop turn, which keeps the channel alive
            cpu_s = cpu_seconds(run) if cell.is_large else 0.0
            started_s = time.perf_counter()
            seconds = await run.pulls[name](copies)
            taken[name].append(time.perf_counter() - started_s if seconds is None else seconds)
            if cell.is_large:
                run.cpu_s[name] += cpu_seconds(run) - cpu_s
                run.cpu_bytes[name] += cell.num_bytes
        num_rounds += 1
    run.seconds[cell] = {name: median(seconds) for name, seconds in taken.items()}


def wipe(run: Run, copies: Sequence[Copy]) -> None:
    """Wipe the targets of `copies`, so that what lies there afterwards came now."""
    into = np.frombuffer(run.target.view, np.uint8)
    for copy in copies:
        into[copy.target_offset : copy.target_offset + copy.num_bytes] = 0


def check(run: Run, name: str, copies: Sequence[Copy]) -> None:
    """Compare what arrived with the source's bytes; AssertionError where they differ."""
    for copy in copies:
        arrived = np.frombuffer(run.target.slice(copy.target_offset, copy.num_bytes), np.uint64)
        wanted = np.frombuffer(run.source.slice(copy.source_offset, copy.num_bytes), np.uint64)
        assert np.array_equal(arrived, wanted), f"{name} brought other bytes for {copy}"


def cpu_seconds(run: Run) -> float:
    """Return the CPU seconds used so far by this process and those it started."""
    used_s = time.process_time()
    for process in run.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used_s += times.user + times.system
    return used_s


async def measure_lag(run: Run, road: str, *, num_sleeps: int) -> None:
    """Measure how late a 1 ms sleep comes back during large pulls: the 99th percentile, in ms."""
    rng = random.Random(SEED)
    is_over = asyncio.Event()

    async def keep_pulling() -> None:
        while not is_over.is_set():
            await run.pulls[road + SUM](Cell(2 * MIB, 32).copies(rng, run.target.num_bytes))

    task = asyncio.create_task(keep_pulling())
    lags_ms = []
    for _ in range(num_sleeps):
        started_s = time.perf_counter()
        await asyncio.sleep(0.001)
        lags_ms.append(1e3 * (time.perf_counter() - started_s - 0.001))
    is_over.set()
    await task
    run.lag_ms[road] = quantiles(lags_ms, n=100)[98]


def _bytes_shown(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB" if num_bytes % MIB == 0 else f"{num_bytes // KIB} KiB"
