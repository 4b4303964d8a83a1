"""Blocks from one process's GPU memory into another's over UCX, beside copies within one process, on one GPU.

    python benchmarks/gpu/transfer.py                    every cell
    python benchmarks/gpu/transfer.py --quick            four cells, within 60 s
    python benchmarks/gpu/transfer.py --record           also append to benchmarks/results/transfer_gpu.jsonl

Needs one NVIDIA GPU, torch with CUDA, and ucxx (the extra kvray[ucx-cu12] or kvray[ucx-cu13]); without them nothing is
measured, and that is no error. Two processes have a pool each, one tensor; blocks go from random places of the one to
random places of the other. In the same run, taking turns: the same blocks copied within this process, one by one, and
as many bytes in one copy. Medians count; GB/s are bytes moved, each of which is read and written. The bytes are
compared once per cell. `checksums` is what decode adds: the checksum of all blocks that came, after the pull.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TextIO

import torch
import uvloop

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness

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

from engine.memory.device_checksum import device_checksums
from engine.memory.device_memory import DeviceMemory
from messages.errors import ConfigError
from transport.protocol import Copy
from transport.roads import PROBE_BYTES
from transport.secret import ClusterSecret
from transport.ucx.road import UcxTransport

DEVICE = "cuda:0"
POOL_BYTES = 512 * MIB
CELLS = tuple(Cell(size, num) for size in (64 * KIB, 512 * KIB, 2 * MIB) for num in (1, 16, 256))
QUICK_CELLS = (Cell(64 * KIB, 1), Cell(512 * KIB, 16), Cell(512 * KIB, 256), Cell(2 * MIB, 256))
SMALL = CELLS[0]
MIN_OF_COPIES = 0.5
MAX_SMALL_MS = 1.0
MAX_SUM_PERCENT = 10.0

#: cell -> contender -> median seconds; "checksums" is none, but what follows "ucx"
Times = dict[Cell, dict[str, float]]


def device_pool(seed: int) -> torch.Tensor:
    """Make a pool `[POOL_BYTES]` uint8; the same bytes in every process that asks with the same seed."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, generator=rng).to(DEVICE)


def open_ucx() -> UcxTransport:
    """Open the road "ucx" for device memory: its threads get the device's context by touching the device.

    Raises:
        ConfigError: UCX cannot be set up.
    """
    return UcxTransport(HOST, port_range=PORT_RANGE, prepare_thread=lambda: torch.zeros(1, device=DEVICE))


def scratch() -> DeviceMemory:
    """Make the memory that `transport.roads.Roads` probes into."""
    return DeviceMemory(torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=DEVICE))


async def own_pool(spec: PeerSpec, answers: TextIO) -> None:
    """Be the other process: own a pool of device memory until the standard input ends."""
    memory = DeviceMemory(device_pool(spec.seed))
    torch.cuda.synchronize()
    owner = Owner(ClusterSecret.from_hex(spec.secret), [open_ucx()], memory, scratch())
    await answer_and_wait(PeerHello(pid=os.getpid(), address=owner.address, rivals={}), answers)
    owner.close()


# --------------------------------------------------------------------------------------------------- the measuring side


class Contenders:
    """Three ways to fill the target pool; what is done when they return is done on the device, too."""

    def __init__(self, peer: Peer, source: torch.Tensor, target: torch.Tensor, memory: DeviceMemory) -> None:
        """Fill `target` from `source`, which has the bytes of the peer's pool; roads know `target` as `memory`."""
        self._peer = peer
        self._source = source
        self.target = target
        self._memory = memory
        self.pulls: dict[str, Callable[[Sequence[Copy]], Awaitable[None]]] = {
            "one copy": self.copy_at_once,
            "copies": self.copy_blocks,
            "ucx": self.pull,
        }

    async def pull(self, copies: Sequence[Copy]) -> None:
        """Pull as a worker does, over the road "ucx"."""
        peer = self._peer
        await peer.transports["ucx"].pull(peer.link, peer.regions["ucx"], copies, self._memory, STALL_S)

    async def copy_blocks(self, copies: Sequence[Copy]) -> None:
        """Copy the same blocks within this process, one by one."""
        for source, target, length in copies:
            self.target[target : target + length].copy_(self._source[source : source + length])
        torch.cuda.synchronize()

    async def copy_at_once(self, copies: Sequence[Copy]) -> None:
        """Copy as many bytes in one piece, as fast as the device can."""
        num_bytes = sum(copy.num_bytes for copy in copies)
        self.target[:num_bytes].copy_(self._source[:num_bytes])
        torch.cuda.synchronize()

    def checksums(self, cell: Cell, copies: Sequence[Copy]) -> list[int]:
        """Compute the checksums of what came, as `engine.memory.checksums.BlockChecksums` does."""
        rows = self.target.view(-1, cell.block_bytes)  # [num_places, block_bytes]
        places = [copy.target_offset // cell.block_bytes for copy in copies]
        return device_checksums(rows, places)

    async def check(self, copies: Sequence[Copy]) -> None:
        """Pull into wiped places and compare."""
        for _, target, length in copies:
            self.target[target : target + length].zero_()
        torch.cuda.synchronize()
        await self.pull(copies)
        for source, target, length in copies:
            is_same = torch.equal(self.target[target : target + length], self._source[source : source + length])
            assert is_same, f"other bytes came from {source} to {target}"


async def measure(contenders: Contenders, cell: Cell, *, budget_s: float) -> dict[str, float]:
    """Measure the median seconds of each contender, after one round that does not count."""
    rng = random.Random(SEED)
    await contenders.check(cell.copies(rng, POOL_BYTES))
    taken: dict[str, list[float]] = {name: [] for name in (*contenders.pulls, "checksums")}
    ends_s = time.perf_counter() + budget_s
    while len(taken["ucx"]) < 10 or time.perf_counter() < ends_s:
        for name, pull in contenders.pulls.items():
            copies = cell.copies(rng, POOL_BYTES)
            started_s = time.perf_counter()
            await pull(copies)
            taken[name].append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        contenders.checksums(cell, copies)  # of what came over ucx; the answer is on the host, so the device is done
        taken["checksums"].append(time.perf_counter() - started_s)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


async def run_all(cells: Sequence[Cell], *, budget_s: float) -> tuple[Times, dict[str, object]]:
    """Measure all cells: the median times by cell, and what else is worth knowing."""
    secret = ClusterSecret.generate()
    transport = open_ucx()
    source = device_pool(SEED)
    target = torch.zeros_like(source)
    memory = DeviceMemory(target)
    torch.cuda.synchronize()
    spec = PeerSpec(secret=secret.hex(), pool_bytes=POOL_BYTES, seed=SEED, roads=("ucx",))
    times: Times = {}
    async with peer_process(spec, __file__, "--own-pool") as hello:
        peer = await connected(secret, hello.address, [transport], memory, scratch())
        try:
            if "ucx" not in peer.transports:
                raise ConfigError("UCX does not move the memory of this GPU")
            contenders = Contenders(peer, source, target, memory)
            first_s = []
            for _ in range(3):
                started_s = time.perf_counter()
                await contenders.pull(SMALL.copies(random.Random(SEED), POOL_BYTES))
                first_s.append(time.perf_counter() - started_s)
            facts = {
                "gpu": torch.cuda.get_device_name(DEVICE),
                "carriers": transport.carriers(peer.link),
                "first_pulls_ms": [1e3 * seconds for seconds in first_s],
            }
            print(f"{facts['gpu']}; {hardware()}; carried by {facts['carriers'] or 'nobody knows what'}")
            print(f"first pulls of {SMALL}, the first connects, ms: {', '.join(f'{1e3 * s:.2f}' for s in first_s)}")
            heads = ("one copy", "copies", "ucx", "of copies", "ucx ms", "sums ms")
            print(f"GB/s, medians{'':4}{''.join(f'{head:>11}' for head in heads)}")
            for cell in cells:
                times[cell] = await measure(contenders, cell, budget_s=budget_s)
                print_row(cell, times[cell])
        finally:
            peer.close()
    return times, facts


def print_row(cell: Cell, seconds: dict[str, float]) -> None:
    rates = [cell.num_bytes / seconds[name] / 1e9 for name in ("one copy", "copies", "ucx")]
    others = (seconds["copies"] / seconds["ucx"], 1e3 * seconds["ucx"], 1e3 * seconds["checksums"])
    shown = "".join(f"{figure:11.2f}" for figure in rates) + "".join(f"{figure:11.3f}" for figure in others)
    print(f"{cell!s:>17}{shown}", flush=True)


def goals(times: Times) -> Iterator[str]:
    """Yield a line for each goal; its figure is that of the worst cell."""

    def worst(ratios: dict[str, float], pick: Callable[..., str]) -> tuple[float | None, str]:
        return (None, "no cell") if not ratios else (ratios[where := pick(ratios, key=ratios.__getitem__)], where)

    of_copies = {str(cell): one["copies"] / one["ucx"] for cell, one in times.items() if cell.is_large}
    percent = {
        str(cell): 100 * one["checksums"] / one["ucx"] for cell, one in times.items() if cell.block_bytes >= LARGE_BYTES
    }
    ratio, where = worst(of_copies, min)
    yield goal(f"ucx of copies on the device, worst at {where}", ratio, at_least=MIN_OF_COPIES)
    small_ms = 1e3 * times[SMALL]["ucx"] if SMALL in times else None
    yield goal(f"{SMALL} from GPU to GPU", small_ms, under=MAX_SMALL_MS, unit=" ms")
    cost, where = worst(percent, max)
    yield goal(f"checksums of the pull, worst at {where}", cost, under=MAX_SUM_PERCENT, unit=" %")


def what_lacks() -> str:
    """Tell why nothing can be measured here; "" where it can."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if importlib.util.find_spec("ucxx") is None:
        return "no ucxx (pip install kvray[ucx-cu12])"
    return ""


def main() -> None:
    options = parser(__doc__, "transfer_gpu", quick="four cells")
    options.add_argument("--own-pool", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.own_pool:
        uvloop.run(own_pool(*told()))
        return
    times: Times = {}
    lack = what_lacks()
    if not lack:
        try:
            cells, budget_s = (QUICK_CELLS, 3.0) if args.quick else (CELLS, 10.0)
            times, facts = uvloop.run(run_all(cells, budget_s=budget_s))
        except ConfigError as error:
            lack = error.message
    if lack:
        print(f"{lack}: nothing measured")
    elif args.record:
        milliseconds = {str(cell): {name: 1e3 * s for name, s in one.items()} for cell, one in times.items()}
        record("transfer_gpu", {"ms": milliseconds, **facts})
    for line in goals(times):
        print(line)


if __name__ == "__main__":
    main()
