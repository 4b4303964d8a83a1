"""Every road between two processes of one host, beside memcpy, a raw socket, Arrow Flight and Ray, in the same run.

    python benchmarks/transport.py                        every cell, every road, about five minutes
    python benchmarks/transport.py --quick                four cells, without plasma and ray, within 60 s
    python benchmarks/transport.py --record               also append to benchmarks/results/transport.jsonl
    python benchmarks/transport.py --only shm socket      these and what they are measured against
    python benchmarks/transport.py --before DIRECTORY     shm of this checkout and another, in turn

A cell is a block size and a number of blocks, pulled from random places of another process's pool into random places
of the own one. Each contender draws its own places and takes its turn in each round, in random order; medians count,
and a ratio is one of medians. Roads run as in workers (harness.transport_peer), each with and without verification: the
checksum of each block as it arrives, as engine.puller takes it; shm computes it in the pass that copies, always. Rivals
(harness.transport_rivals) verify nothing. Before it counts, every contender pulled the whole pool once, and once more
in each cell; those bytes are compared.

CPU seconds are those of all processes taking part. The loop's lag is how late a 1 ms sleep comes back while verified
pulls of 32 x 2 MiB follow each other. Goals, each in the worst of its cells, of 16 blocks or more of 512 KiB or more:
shm at 0.80 of memcpy, and verified at 0.97 of the other checkout's that is not, and 1.3 times as fast as its verified
one; of 2 MiB: socket at 0.95 and ucx over tcp at 0.85 of the raw socket; whatever the number of blocks, checksums add
less than 10 % to a road's time. And: one block of 64 KiB within 1 ms on every direct road; the
loop never waits longer than 20 ms for a pull (99th percentile).
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import uvloop
from harness.report import ROOT, goal, hardware, parser, record
from harness.transport_before import build
from harness.transport_cells import KIB, LARGE_BYTES, MIB, SEED, SUM, Cell, Pull, Run, first_pulls, measure, measure_lag
from harness.transport_peer import STALL_S, Peer, PeerHello, PeerSpec, connected, open_all, peer_process
from harness.transport_pool import filled
from harness.transport_rivals import FlightRival, MemcpyRival, Rival, TcpRival

from transport.checksum import checksum, checksum_path
from transport.memory import Memory
from transport.protocol import Copy
from transport.roads import PROBE_BYTES
from transport.secret import ClusterSecret

ROADS = ("shm", "ucx", "socket", "plasma")
DIRECT_ROADS = ("shm", "ucx", "socket")
RIVALS = ("memcpy", "tcp", "flight", "ray")
OF_RAY = {"plasma", "ray"}
MIN_SHM_OF_MEMCPY = 0.80
MIN_VERIFIED_OF_BEFORE = {"before": 0.97, "before" + SUM: 1.3}
MIN_SOCKET_OF_TCP = 0.95
MIN_UCX_OF_TCP = 0.85
MAX_SMALL_MS = 1.0
MAX_SUM_PERCENT = 10.0
MAX_LAG_MS = 20.0

CELLS = tuple(Cell(size, num) for size in (16 * KIB, 64 * KIB, 512 * KIB, 2 * MIB) for num in (1, 16, 256))
QUICK_CELLS = (Cell(64 * KIB, 1), Cell(512 * KIB, 16), Cell(512 * KIB, 256), Cell(2 * MIB, 16))

# -------------------------------------------------------------------------------------------------------- contenders


def road_pulls(peer: Peer, road: str, target: Memory) -> dict[str, Pull]:
    """Make the pulls over a road, without and with verification, by contender."""
    transport, region = peer.transports[road], peer.regions[road]
    into = np.frombuffer(target.view, np.uint8)

    async def plain(copies: Sequence[Copy]) -> None:
        await transport.pull(peer.link, region, copies, target, STALL_S)

    async def verified(copies: Sequence[Copy]) -> None:
        found: dict[int, int] = {}

        def take(position: int, told: int | None = None, /) -> None:
            _, offset, length = copies[position]
            found[position] = checksum(into[offset : offset + length]) if told is None else told

        await transport.pull(peer.link, region, copies, target, STALL_S, take)
        assert len(found) == len(copies), f"{road} told {len(found)} of {len(copies)} blocks"

    return {road: plain, road + SUM: verified}


def rival_pull(rival: Rival) -> Pull:
    """Make a rival's pull, which runs on the loop's thread: nobody else has anything to do there."""

    async def pull(copies: Sequence[Copy]) -> None:
        rival.pull(copies)

    return pull


# ---------------------------------------------------------------------------------------------------------- the run


def roads_of(run: Run) -> list[str]:
    """Return the roads that take part."""
    return [road for road in ROADS if road in run.pulls]


def open_rivals(run: Run, hello: PeerHello, wanted: set[str], ray_address: str | None) -> dict[str, Rival]:
    """Open the rivals that are wanted."""
    rivals: dict[str, Rival] = {"memcpy": MemcpyRival(run.source, run.target)}
    for name, rival_class in {"tcp": TcpRival, "flight": FlightRival}.items():
        if name in hello.rivals:
            rivals[name] = rival_class(hello.rivals[name], run.target)
    if "ray" in wanted and ray_address is not None:
        from harness.transport_ray import RayRival

        rivals["ray"] = RayRival(run.target.num_bytes, SEED, run.target)
    return rivals


async def run_all(wanted: set[str], *, quick: bool, ray_address: str | None, before: Path | None) -> Run:
    """Measure every cell, and print its row when it is known."""
    cells = QUICK_CELLS if quick else CELLS
    pool_bytes = max(max(cell.num_bytes for cell in cells), 256 * MIB)
    secret = ClusterSecret.generate()
    run = Run(Memory.allocate(pool_bytes), filled(pool_bytes, SEED))
    spec = PeerSpec(
        secret=secret.hex(),
        pool_bytes=pool_bytes,
        seed=SEED,
        roads=tuple(road for road in ROADS if road in wanted),
        rivals=tuple(rival for rival in ("tcp", "flight") if rival in wanted),
        ray_address=ray_address,
    )
    async with contextlib.AsyncExitStack() as stack:
        hello = await stack.enter_async_context(peer_process(spec))
        rivals = open_rivals(run, hello, wanted, ray_address)
        for rival in rivals.values():
            stack.callback(rival.close)
        # Before the channel is there, which would be lost while Ray starts an actor on this thread.
        await first_pulls(run, {name: rival_pull(rival) for name, rival in rivals.items()})
        transports, run.left_out = open_all(spec.roads, secret)
        peer = await connected(secret, hello.address, transports, run.target, Memory.allocate(PROBE_BYTES))
        stack.callback(peer.close)
        for road in spec.roads:
            if road in peer.transports:
                await first_pulls(run, road_pulls(peer, road, run.target))
            else:
                run.left_out.setdefault(road, "the other process does not offer it")
        if before is not None:
            for name, directory in {"now": ROOT, "before": before}.items():
                await first_pulls(run, await stack.enter_async_context(build(name, directory, pool_bytes)))
        run.processes = psutil.Process().children(recursive=True)
        for name, reason in run.left_out.items():
            print(f"{name} is left out: {reason}")
        carriers = ", ".join(f"{road} by {peer.transports[road].carriers(peer.link)}" for road in roads_of(run))
        print(f"{hardware()}; {carriers}; checksums by {checksum_path()}")
        print(f"GB/s, medians{'':3}{''.join(f'{name:>11}' for name in run.pulls)}")
        for cell in cells:
            await measure(run, cell, budget_s=8.0 if quick else 12.0, min_rounds=4 if quick else 8)
            rates = "".join(f"{run.gb_per_s(cell, name):11.2f}" for name in run.pulls)
            print(f"{cell!s:>16}{rates}", flush=True)
        for road in roads_of(run):
            await measure_lag(run, road, num_sleeps=200 if quick else 1000)
        assert not peer.link.is_lost, "the channel did not last"
    return run


def report(run: Run) -> None:
    """Print the tables after the first: times of one block, ratios, checksums, CPU, lag."""

    def row(title: str, shown: Iterator[str]) -> None:
        print(f"{title:>16}{''.join(f'{text:>11}' for text in shown)}")

    def ratios(peer: str) -> None:
        for cell in run.seconds:
            if cell.num_blocks > 1 and peer in run.pulls:
                row(f"{cell}", (f"{run.ratio(cell, name, peer):.2f}" for name in run.pulls))

    for cell in run.seconds:
        if cell.num_blocks == 1:
            row(f"ms, {cell}", (f"{1e3 * run.seconds[cell][name]:.3f}" for name in run.pulls))
    print("of memcpy")
    ratios("memcpy")
    print("of the raw socket")
    ratios("tcp")
    row("CPU s/GB", (f"{1e9 * run.cpu_s[name] / run.cpu_bytes[name]:.2f}" for name in run.pulls))
    for road in roads_of(run):
        costs = ", ".join(f"{cell}: {run.sum_percent(cell, road):.0f}" for cell in run.seconds)
        print(f"checksums add to {road}, percent: {costs}")
    lags = ", ".join(f"{road} {lag_ms:.1f}" for road, lag_ms in run.lag_ms.items())
    print(f"event loop lag while pulling, 99th percentile, ms: {lags}")


def results(run: Run) -> dict[str, object]:
    """Gather the figures that are recorded."""
    return {
        "ms": {str(cell): {name: 1e3 * s for name, s in by_name.items()} for cell, by_name in run.seconds.items()},
        "gb_per_s": {str(cell): {name: run.gb_per_s(cell, name) for name in run.pulls} for cell in run.seconds},
        "cpu_s_per_gb": {name: 1e9 * run.cpu_s[name] / run.cpu_bytes[name] for name in run.pulls},
        "loop_lag_p99_ms": run.lag_ms,
        "left_out": run.left_out,
    }


def goals(run: Run) -> Iterator[str]:
    """Yield a line for each goal; its figure is that of the worst cell, which its name tells."""
    large = [cell for cell in run.seconds if cell.is_large]
    largest = [cell for cell in large if cell.block_bytes == 2 * MIB]

    def worst_ratio(name: str, peer: str, cells: list[Cell]) -> tuple[float | None, str]:
        found = [(ratio, str(cell)) for cell in cells if (ratio := run.ratio(cell, name, peer)) is not None]
        return min(found, default=(None, "no cell"))

    for name, words in (("shm", "not verified"), ("shm" + SUM, "verified")):
        ratio, where = worst_ratio(name, "memcpy", large)
        yield goal(f"shm of memcpy, {words}, worst at {where}", ratio, at_least=MIN_SHM_OF_MEMCPY)
    for name, at_least in MIN_VERIFIED_OF_BEFORE.items():
        ratio, where = worst_ratio("now" + SUM, name, large)
        yield goal(f"shm now, verified, of {name}, worst at {where}", ratio, at_least=at_least)
    for road, at_least in (("socket", MIN_SOCKET_OF_TCP), ("ucx", MIN_UCX_OF_TCP)):
        ratio, where = worst_ratio(road, "tcp", largest)
        yield goal(f"{road} of a raw socket, worst at {where}", ratio, at_least=at_least)
    for road in DIRECT_ROADS:
        seconds = run.seconds[Cell(64 * KIB, 1)].get(road)
        figure = None if seconds is None else 1e3 * seconds
        yield goal(f"1 x 64 KiB over {road}", figure, under=MAX_SMALL_MS, unit=" ms")
    for road in ROADS:
        costs = [(run.sum_percent(cell, road), str(cell)) for cell in run.seconds if cell.block_bytes >= LARGE_BYTES]
        percent, where = max(((cost, cell) for cost, cell in costs if cost is not None), default=(None, "no cell"))
        yield goal(f"checksums over {road}, worst at {where}", percent, under=MAX_SUM_PERCENT, unit=" %")
    for road in ROADS:
        yield goal(f"event loop lag while pulling over {road}", run.lag_ms.get(road), under=MAX_LAG_MS, unit=" ms")


def main() -> None:
    options = parser(__doc__, "transport", quick="four cells, without plasma and ray")
    options.add_argument("--only", nargs="+", choices=(*ROADS, *RIVALS), help="contenders, beside memcpy and tcp")
    options.add_argument("--before", type=Path, metavar="DIRECTORY", help="another checkout, for goals that compare")
    args = options.parse_args()
    wanted = set(args.only or (*ROADS, *RIVALS)) | {"memcpy", "tcp"}
    if args.quick and not args.only:
        print("left out in the quick form: plasma, ray")
        wanted -= OF_RAY
    # `timeout` and the like end a benchmark by SIGTERM, which would leave processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        ray_address = None
        if wanted & OF_RAY:
            from harness.transport_ray import own_ray

            ray_address = stack.enter_context(own_ray(2 << 30))
        run = uvloop.run(run_all(wanted, quick=args.quick, ray_address=ray_address, before=args.before))
    report(run)
    if args.record:
        record("transport", results(run))
    for line in goals(run):
        print(line)


if __name__ == "__main__":
    main()
