"""Blocks between processes' GPU memory over the roads shm (CUDA IPC) and ucx, and between a GPU and host memory.

    python benchmarks/gpu/transfer.py                    every cell, within two minutes
    python benchmarks/gpu/transfer.py --quick            four cells, within 60 s
    python benchmarks/gpu/transfer.py --record           also append to benchmarks/results/transfer_gpu.jsonl
    python benchmarks/gpu/transfer.py --dry-run          the same code on this CPU, one process, in tiny: no figures

Needs one NVIDIA GPU and torch with CUDA; the road ucx is left out where ucxx is not installed (kvray[ucx-cu12] or
kvray[ucx-cu13]). Without a GPU nothing is measured, and that is no error. Two processes have a pool each, one tensor;
blocks go from random places of the one to random places of the other. In the same run, taking turns: the same blocks
copied within this process, one by one, and as many bytes in one copy. Medians count; GB/s are bytes moved, each read
and written. The bytes are compared once per cell. `shm` hashes what it brought; `checksums` is what is added to
ucx: the checksum of all blocks that came, after the pull. Then blocks go out to a node cache's arena and come in from
it, as offloading and restoring do it, before its pages are locked and after, beside one copy to and from locked memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TextIO

import torch
import uvloop

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where kvray is not installed

from harness.report import goal, hardware, parser, record
from harness.transport_cells import KIB, LARGE_BYTES, MIB, SEED, Cell
from harness.transport_peer import (
    HOST,
    PORT_RANGE,
    STALL_S,
    Owner,
    Peer,
    PeerHello,
    PeerSpec,
    answer_and_wait,
    connected,
    peer_process,
    told,
)

from engine.memory.copies import DeviceCopies
from engine.memory.device import CudaDevice, Device
from engine.memory.device_memory import DeviceMemory
from messages.errors import ConfigError
from transport.memory import Memory
from transport.protocol import Copies, Copy, CopyWatch, Transport
from transport.roads import PROBE_BYTES
from transport.secret import ClusterSecret
from transport.shm import ShmTransport, open_region
from transport.ucx.road import UcxTransport

GPU = "cuda:0"
POOL_BYTES, DRY_POOL_BYTES = 512 * MIB, 8 * MIB
CELLS = tuple(Cell(size, num) for size in (64 * KIB, 512 * KIB, 2 * MIB) for num in (1, 16, 256))
QUICK_CELLS = (Cell(64 * KIB, 1), Cell(512 * KIB, 16), Cell(512 * KIB, 256), Cell(2 * MIB, 256))
DRY_CELLS = (Cell(64 * KIB, 1), Cell(64 * KIB, 16))
SMALL = CELLS[0]
HOST_CELLS = (Cell(64 * KIB, 1024), Cell(2 * MIB, 128))
HOST_BATCH_BYTES = 32 * MIB
ROADS = ("shm", "ucx")
MIN_OF_COPIES = 0.5
MAX_SMALL_MS = 1.0
MAX_SUM_PERCENT = 10.0
MIN_OF_PCIE = 0.8

#: cell -> contender -> median seconds; "checksums" is none, but what follows "ucx"
Times = dict[Cell, dict[str, float]]


class Place:
    """A device, and how pools on it are made."""

    def __init__(self, *, is_dry: bool) -> None:
        """Take the GPU, or a pretended device."""
        self.is_dry = is_dry
        self.name = "cpu" if is_dry else GPU
        self.pool_bytes = DRY_POOL_BYTES if is_dry else POOL_BYTES
        self.device: Device = CudaDevice(torch.device(GPU))
        if is_dry:
            from tests.engine.fake_device import FakeDevice

            self.device = FakeDevice()

    def memory(self, pool: torch.Tensor, row_bytes: int) -> DeviceMemory:
        """Wrap a pool of blocks of `row_bytes` as workers do."""
        rows = pool.view(-1, row_bytes)
        return DeviceMemory(rows, DeviceCopies(self.device, rows))

    def filled(self, seed: int) -> torch.Tensor:
        """Make a pool `[pool_bytes]` uint8; the same bytes in every process that asks with the same seed."""
        rng = torch.Generator().manual_seed(seed)
        pool = self.device.pool(self.pool_bytes)
        return pool.copy_(torch.randint(0, 256, (self.pool_bytes,), dtype=torch.uint8, generator=rng))

    def scratch(self) -> DeviceMemory:
        """Make the memory that `transport.roads.Roads` probes into."""
        return self.memory(self.device.pool(PROBE_BYTES), PROBE_BYTES)

    def wait(self) -> None:
        """Block until the device is done with everything."""
        if not self.is_dry:
            torch.cuda.synchronize()

    def open_roads(self) -> list[Transport]:
        """Open those roads that can be taken; UCX's threads get the device's context by touching the device."""
        roads: list[Transport] = [ShmTransport()]
        if not self.is_dry and importlib.util.find_spec("ucxx") is not None:
            roads.append(UcxTransport(HOST, port_range=PORT_RANGE, prepare_thread=lambda: torch.zeros(1, device=GPU)))
        return roads


async def own_pool(spec: PeerSpec, answers: TextIO) -> None:
    """Be the other process: own a pool of device memory until the standard input ends."""
    place = Place(is_dry=False)
    memory = place.memory(place.filled(spec.seed), LARGE_BYTES)
    place.wait()
    owner = Owner(ClusterSecret.from_hex(spec.secret), place.open_roads(), memory, place.scratch())
    await answer_and_wait(PeerHello(pid=os.getpid(), address=owner.address, rivals={}), answers)
    owner.close()


# ------------------------------------------------------------------------------------------------ from device to device


class Contenders:
    """The ways to fill the target pool; what is done when they return is done on the device, too."""

    def __init__(self, place: Place, peer: Peer, source: torch.Tensor, target: torch.Tensor, cell: Cell) -> None:
        """Fill `target` from `source`, which has the bytes of the peer's pool."""
        self._place = place
        self._peer = peer
        self._source = source
        self.target = target
        rows = target.view(-1, cell.block_bytes)
        self._copies = DeviceCopies(place.device, rows)
        self._memory = DeviceMemory(rows, self._copies)
        self.pulls: dict[str, Callable[[Sequence[Copy]], Awaitable[None]]] = {
            "one copy": self.copy_at_once,
            "copies": self.copy_blocks,
            **{road: lambda copies, road=road: self.pull(road, copies) for road in ROADS if road in peer.transports},
        }

    async def pull(self, road: str, copies: Sequence[Copy]) -> None:
        """Pull as a worker does."""
        peer = self._peer
        await peer.transports[road].pull(peer.link, peer.regions[road], copies, self._memory, STALL_S)

    async def copy_blocks(self, copies: Sequence[Copy]) -> None:
        """Copy the same blocks within this process, one by one."""
        for source, target, length in copies:
            self.target[target : target + length].copy_(self._source[source : source + length])
        self._place.wait()

    async def copy_at_once(self, copies: Sequence[Copy]) -> None:
        """Copy as many bytes in one piece, as fast as the device can."""
        num_bytes = sum(copy.num_bytes for copy in copies)
        self.target[:num_bytes].copy_(self._source[:num_bytes])
        self._place.wait()

    def checksums(self, cell: Cell, copies: Sequence[Copy]) -> list[int]:
        """Compute the checksums of what came, as a worker does."""
        return self._copies.checksums([copy.target_offset // cell.block_bytes for copy in copies])

    async def check(self, copies: Sequence[Copy]) -> None:
        """Pull over each road into wiped places and compare."""
        for road in self.pulls.keys() & set(ROADS):
            for _, target, length in copies:
                self.target[target : target + length].zero_()
            self._place.wait()
            await self.pull(road, copies)
            for source, target, length in copies:
                is_same = torch.equal(self.target[target : target + length], self._source[source : source + length])
                assert is_same, f"other bytes came over {road} from {source} to {target}"


async def measure(contenders: Contenders, cell: Cell, pool_bytes: int, *, budget_s: float) -> dict[str, float]:
    """Measure the median seconds of each contender, after one round that does not count."""
    rng = random.Random(SEED)
    await contenders.check(cell.copies(rng, pool_bytes))
    taken: dict[str, list[float]] = {name: [] for name in (*contenders.pulls, "checksums")}
    ends_s = time.perf_counter() + budget_s
    while len(taken["copies"]) < 10 or time.perf_counter() < ends_s:
        for name, pull in contenders.pulls.items():
            copies = cell.copies(rng, pool_bytes)
            started_s = time.perf_counter()
            await pull(copies)
            taken[name].append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        contenders.checksums(cell, copies)  # of what came last; the answer is on the host, so the device is done
        taken["checksums"].append(time.perf_counter() - started_s)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


@contextlib.asynccontextmanager
async def _owner(place: Place, secret: ClusterSecret) -> AsyncIterator[str]:
    """Have a pool owned by another process, or by this one in a dry run; the address of its channel."""
    if place.is_dry:
        owner = Owner(secret, place.open_roads(), place.memory(place.filled(SEED), LARGE_BYTES), place.scratch())
        try:
            yield owner.address
        finally:
            owner.close()
        return
    spec = PeerSpec(secret=secret.hex(), pool_bytes=place.pool_bytes, seed=SEED, roads=ROADS)
    async with peer_process(spec, __file__, "--own-pool") as hello:
        yield hello.address


async def run_all(cells: Sequence[Cell], *, budget_s: float, is_dry: bool = False) -> tuple[Times, dict[str, object]]:
    """Measure all cells: the median times by cell, and what else is worth knowing."""
    secret = ClusterSecret.generate()
    place = Place(is_dry=is_dry)
    source, target = place.filled(SEED), place.device.pool(place.pool_bytes)
    place.wait()
    times: Times = {}
    async with _owner(place, secret) as address:
        transports = place.open_roads()
        peer = await connected(secret, address, transports, place.memory(target, LARGE_BYTES), place.scratch())
        try:
            if not peer.transports:
                raise ConfigError("no road moves the memory of this GPU to another process")
            facts: dict[str, object] = {
                "gpu": "none" if is_dry else torch.cuda.get_device_name(GPU),
                "carriers": {name: road.carriers(peer.link) for name, road in peer.transports.items()},
                "first_pulls_ms": await _first_pulls(place, Contenders(place, peer, source, target, SMALL), peer),
            }
            print(f"{facts['gpu']}; {hardware()}; first pulls of {SMALL}, ms: {facts['first_pulls_ms']}")
            heads = ("one copy", "copies", *ROADS, "shm/copies", "ucx/copies", "shm ms", "ucx ms", "sums ms")
            print(f"GB/s, medians{'':4}{''.join(f'{head:>11}' for head in heads)}")
            for cell in cells:
                contenders = Contenders(place, peer, source, target, cell)
                times[cell] = await measure(contenders, cell, place.pool_bytes, budget_s=budget_s)
                print_row(cell, times[cell])
        finally:
            peer.close()
    return times, facts


async def _first_pulls(place: Place, contenders: Contenders, peer: Peer) -> dict[str, list[float]]:
    """Time three pulls over each road, of which the first one connects, in ms."""
    taken: dict[str, list[float]] = {}
    for road in peer.transports:
        taken[road] = []
        for _ in range(3):
            started_s = time.perf_counter()
            await contenders.pull(road, SMALL.copies(random.Random(SEED), place.pool_bytes))
            taken[road].append(round(1e3 * (time.perf_counter() - started_s), 2))
    return taken


def print_row(cell: Cell, seconds: dict[str, float]) -> None:
    ways = {name: seconds.get(name) for name in ("one copy", "copies", *ROADS)}
    figures: list[float | None] = [cell.num_bytes / s / 1e9 if s else None for s in ways.values()]
    figures += [seconds["copies"] / s if (s := ways[road]) else None for road in ROADS]
    figures += [1e3 * s if (s := ways[road]) else None for road in ROADS]
    shown = "".join(f"{'-':>11}" if figure is None else f"{figure:11.3f}" for figure in figures)
    print(f"{cell!s:>17}{shown}{1e3 * seconds['checksums']:11.3f}", flush=True)


# ------------------------------------------------------------------------------------------------- from and to the host


def host_rates(place: Place, cell: Cell, *, num_rounds: int = 5) -> dict[str, float]:
    """Move the blocks of `cell` out to an arena and in from it, as workers do: median bytes per second of each way.

    "out, in, locked, unlocked": by DeviceCopies; "one copy out, in": as many bytes at once, to and from locked memory.
    """
    pool = place.filled(SEED)[: cell.num_bytes].view(-1, cell.block_bytes)
    memory, arena, shm = place.memory(pool, cell.block_bytes), Memory.allocate(cell.num_bytes), ShmTransport()
    view = open_region(shm.register(arena), is_writable=True)
    copies = DeviceCopies(place.device, pool)
    ids = random.Random(SEED).sample(range(cell.num_blocks), cell.num_blocks)
    at_once = max(1, HOST_BATCH_BYTES // cell.block_bytes)
    batches = [range(begin, min(begin + at_once, len(ids))) for begin in range(0, len(ids), at_once)]
    into = [
        Copies.of(
            [Copy(place_ * cell.block_bytes, ids[place_] * cell.block_bytes, cell.block_bytes) for place_ in some]
        )
        for some in batches
    ]

    def out() -> list[int]:
        offsets = [[place_ * cell.block_bytes for place_ in some] for some in batches]
        batched = zip(batches, offsets, strict=True)
        return [s for some, at in batched for s in copies.copy_out([ids[p] for p in some], view.view, at)]

    def back() -> list[int]:
        return [s for some in into for s in copies.copy_in(pool, view, some, CopyWatch())]

    found: dict[str, float] = {}
    for kind in ("unlocked", "locked"):
        if kind == "locked" and (thread := copies.page_locks.lock(view)) is not None:
            thread.join()
        sums = out()
        pool.zero_()
        place.wait()
        assert back() == sums, "what came back is not what went out"
        found[f"out, {kind}"] = cell.num_bytes / _median_s(out, num_rounds, place)
        found[f"in, {kind}"] = cell.num_bytes / _median_s(back, num_rounds, place)
    locked, flat = place.device.host_buffer(cell.num_bytes), pool.view(-1)
    found["one copy out"] = cell.num_bytes / _median_s(lambda: locked.copy_(flat, non_blocking=True), num_rounds, place)
    found["one copy in"] = cell.num_bytes / _median_s(lambda: flat.copy_(locked, non_blocking=True), num_rounds, place)
    copies.close()
    memory.close()
    shm.close()
    return found


def _median_s(work: Callable[[], object], num_rounds: int, place: Place) -> float:
    seconds = []
    for _ in range(num_rounds):
        place.wait()
        started_s = time.perf_counter()
        work()
        place.wait()
        seconds.append(time.perf_counter() - started_s)
    return median(seconds)


# ------------------------------------------------------------------------------------------------------------------ all


def goals(times: Times, hosts: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield a line for each goal; its figure is that of the worst cell."""

    def worst(ratios: dict[str, float], pick: Callable[..., str]) -> tuple[float | None, str]:
        return (None, "no cell") if not ratios else (ratios[where := pick(ratios, key=ratios.__getitem__)], where)

    for road in ROADS:
        of_copies = {
            str(cell): one["copies"] / one[road] for cell, one in times.items() if cell.is_large and road in one
        }
        ratio, where = worst(of_copies, min)
        yield goal(f"{road} of copies on the device, worst at {where}", ratio, at_least=MIN_OF_COPIES)
        small_ms = 1e3 * times[SMALL][road] if road in times.get(SMALL, {}) else None
        yield goal(f"{SMALL} from GPU to GPU over {road}", small_ms, under=MAX_SMALL_MS, unit=" ms")
    percent = {
        str(cell): 100 * one["checksums"] / one["ucx"]
        for cell, one in times.items()
        if cell.block_bytes >= LARGE_BYTES and "ucx" in one
    }
    cost, where = worst(percent, max)
    yield goal(f"checksums of the pull over ucx, worst at {where}", cost, under=MAX_SUM_PERCENT, unit=" %")
    for way in ("out", "in"):
        of_pcie = {name: found[f"{way}, locked"] / found[f"one copy {way}"] for name, found in hosts.items()}
        ratio, where = worst(of_pcie, min)
        yield goal(f"blocks {way}, of one copy {way}, worst at {where}", ratio, at_least=MIN_OF_PCIE)


def main() -> None:
    options = parser(__doc__, "transfer_gpu", quick="four cells")
    options.add_argument("--own-pool", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--dry-run", action="store_true", help="the same code on this CPU, in tiny")
    args = options.parse_args()
    if args.own_pool:
        uvloop.run(own_pool(*told()))
        return
    times: Times = {}
    hosts: dict[str, dict[str, float]] = {}
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU that torch can use: nothing measured")
    else:
        place = Place(is_dry=args.dry_run)
        for cell in DRY_CELLS if args.dry_run else HOST_CELLS:
            hosts[str(cell)] = host_rates(place, cell)
            shown = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in hosts[str(cell)].items())
            print(f"{cell} from and to the host, GB/s: {shown}", flush=True)
        cells, budget_s = (QUICK_CELLS, 3.0) if args.quick else (CELLS, 8.0)
        try:
            if args.dry_run:
                cells, budget_s = DRY_CELLS, 0.0
            times, facts = uvloop.run(run_all(cells, budget_s=budget_s, is_dry=args.dry_run))
        except ConfigError as error:
            if args.dry_run:
                raise
            print(f"{error.message}: no pulls measured")
            facts = {}
        if args.dry_run:
            print("dry run: every block came whole")
            return
        if args.record:
            milliseconds = {str(cell): {name: 1e3 * s for name, s in one.items()} for cell, one in times.items()}
            record("transfer_gpu", {"ms": milliseconds, "host_bytes_per_s": hosts, **facts})
    for line in goals(times, hosts):
        print(line)


if __name__ == "__main__":
    main()
