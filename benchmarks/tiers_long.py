"""A long run with tiers so small that all of them evict all the time: memory, files and disk use of every process.

    python benchmarks/tiers_long.py                 ten minutes
    python benchmarks/tiers_long.py --minutes 60    an hour
    python benchmarks/tiers_long.py --quick         within 60 s, which shows little
    python benchmarks/tiers_long.py --record        also append to benchmarks/results/tiers_long.jsonl, and draw
                                                    benchmarks/results/tiers_long.svg (matplotlib)

`kvray serve` with the demo model, one prefill and one decode worker of 8 MiB each, 16 MiB of host memory, 64 MiB of
disk; eight clients ask prompts of 20 to 3,000 tokens that share beginnings, and some go away in the middle. Every few
seconds each process's resident memory and open files are noted, and the disk directory's size. Flat means: the median
of the last quarter of the run beside that of the second one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
from harness.http_client import HttpConnection
from harness.models import model_directory, vocab_size
from harness.report import RESULTS, goal, hardware, parser, record
from harness.serving import serving

NUM_CLIENTS = 8
FLAGS = [
    *("--prefill", "1", "--decode", "1", "--kv-cache-memory", "8MiB", "--host-memory", "16MiB"),
    *("--disk-capacity", "64MiB", "--max-model-len", "4096"),
]
SHARE_LEAVING = 0.05
MIB = 1 << 20


class Sample(NamedTuple):
    """What a process held at a time."""

    at_s: float
    memory_bytes: int
    num_files: int


def name_of(process: psutil.Process) -> str:
    """Name a process by what it is."""
    words = " ".join(process.cmdline())
    if "ServeReplica:" in words:
        return words.split("ServeReplica:", 1)[1].split(":")[-1].split()[0]
    for part in ("nodecache", "raylet", "gcs_server", "cluster.warden", "cluster.keeper", "cluster.cli"):
        if part in words:
            return part
    return process.name()


def disk_use(directory: Path) -> tuple[int, int]:
    """Return the bytes and the number of the files in a directory."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files), len(files)


async def ask_forever(url: str, seed: int, ends_s: float, shared: list[list[int]], vocabulary: int) -> int:
    """Ask one prompt after the other; return how many were answered."""
    rng = random.Random(seed)
    connection, num_answered = await HttpConnection.open(url), 0
    while time.monotonic() < ends_s:
        prefix = rng.choice(shared)[: rng.randrange(20, 2600)]
        prompt = prefix + [rng.randrange(5, vocabulary) for _ in range(rng.randrange(1, 400))]
        body = {"model": "bench", "prompt": prompt, "max_tokens": rng.randrange(1, 40), "stream": True}
        is_leaving = rng.random() < SHARE_LEAVING
        async for _ in connection.events("/v1/completions", body):
            if is_leaving:
                break
        if is_leaving:
            connection.close()
            connection = await HttpConnection.open(url)
        num_answered += not is_leaving
    connection.close()
    return num_answered


async def watch(pid: int, disk: Path, ends_s: float, pause_s: float) -> tuple[dict[str, list[Sample]], list[Sample]]:
    """Note what every process of the family holds, by name, and what the directory does."""
    began_s = time.monotonic()
    held: dict[str, list[Sample]] = {}
    on_disk: list[Sample] = []
    while time.monotonic() < ends_s:
        at_s = time.monotonic() - began_s
        numbers: dict[str, int] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    name = name_of(process)
                    numbers[name] = numbers.get(name, 0) + 1
                    name = f"{name} {numbers[name]}" if numbers[name] > 1 else name
                    sample = Sample(at_s, process.memory_info().rss, process.num_fds())
                    held.setdefault(name, []).append(sample)
        on_disk.append(Sample(at_s, *disk_use(disk)))
        await asyncio.sleep(pause_s)
    return held, on_disk


def growth(samples: Sequence[Sample], field: str) -> float:
    """Return by how much the last quarter is above the second one."""
    quarter = len(samples) // 4
    early = median(getattr(sample, field) for sample in samples[quarter : 2 * quarter])
    late = median(getattr(sample, field) for sample in samples[3 * quarter :])
    return float(late - early)


def quarters(samples: Sequence[Sample]) -> list[Sample]:
    """Return one sample of each quarter's middle: what is drawn has them all."""
    return [samples[len(samples) * part // 8] for part in (1, 3, 5, 7)]


def draw(held: dict[str, list[Sample]], on_disk: list[Sample], path: Path) -> None:
    """Draw memory, open files and disk use over time."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(3, 1, figsize=(8, 9), layout="constrained", sharex=True)
    for name, samples in sorted(held.items()):
        minutes = [sample.at_s / 60 for sample in samples]
        rows[0].plot(minutes, [sample.memory_bytes / MIB for sample in samples], label=name)
        rows[1].plot(minutes, [sample.num_files for sample in samples])
    rows[2].plot([sample.at_s / 60 for sample in on_disk], [sample.memory_bytes / MIB for sample in on_disk])
    for axes, label in zip(rows, ("resident MiB", "open files", "disk directory, MiB"), strict=True):
        axes.set(ylabel=label, ylim=(0, None))
    rows[2].set(xlabel="minutes")
    rows[0].legend(fontsize=6, ncol=3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


async def run(url: str, pid: int, disk: Path, seconds: float) -> tuple[int, dict[str, list[Sample]], list[Sample]]:
    """Ask and watch."""
    vocabulary = vocab_size(model_directory("demo"))
    rng = random.Random(3)
    shared = [[rng.randrange(5, vocabulary) for _ in range(2600)] for _ in range(60)]
    ends_s = time.monotonic() + seconds
    watching = asyncio.create_task(watch(pid, disk, ends_s, max(0.5, seconds / 200)))
    answered = await asyncio.gather(
        *(ask_forever(url, seed, ends_s, shared, vocabulary) for seed in range(NUM_CLIENTS))
    )
    return sum(answered), *await watching


def main() -> None:
    options = parser(__doc__, "tiers_long", quick="a run too short to show much")
    options.add_argument("--minutes", type=float, default=10.0)
    args = options.parse_args()
    print(hardware())
    disk = Path(tempfile.mkdtemp(prefix="kvray-disk-"))
    try:
        model = str(model_directory("demo"))
        flags = ["--served-model-name", "bench", *FLAGS, "--disk-dir", str(disk)]
        with serving(model, *flags) as served:
            seconds = 25.0 if args.quick else 60 * args.minutes
            num_answered, held, on_disk = asyncio.run(run(served.url, served.pid, disk, seconds))
            served.wait_until_idle()
            caches = served.status()["caches"]
    finally:
        shutil.rmtree(disk, ignore_errors=True)
    print(f"{num_answered} requests in {seconds:.0f} s")
    lasting = {name: samples for name, samples in held.items() if len(samples) >= 0.9 * len(on_disk)}
    for name, samples in sorted(lasting.items()):
        print(
            f"  {name:24s} {samples[-1].memory_bytes / MIB:7.1f} MiB ({growth(samples, 'memory_bytes') / MIB:+.1f})"
            f"  {samples[-1].num_files:4d} files ({growth(samples, 'num_files'):+.0f})"
        )
    print(f"  disk directory           {on_disk[-1].memory_bytes / MIB:7.1f} MiB, {on_disk[-1].num_files} files")
    values = caches[0]["values"]
    evicted = values["kvray_blocks_evicted_total"], values.get("kvray_disk_evicted_blocks_total", 0.0)
    print(f"  evicted: {evicted[0]:,.0f} blocks of the host tier, {evicted[1]:,.0f} of the disk")
    if args.record:
        every = {**{name: quarters(samples) for name, samples in lasting.items()}, "disk directory": quarters(on_disk)}
        record("tiers_long", {"seconds": seconds, "num_answered": num_answered, "evicted": evicted, "held": every})
        draw(lasting, on_disk, RESULTS / "tiers_long.svg")
    of_memory = max(growth(samples, "memory_bytes") / samples[-1].memory_bytes for samples in lasting.values())
    of_files = max(growth(samples, "num_files") for samples in lasting.values())
    print()
    print(goal("resident memory, growth after warm-up, worst process", 100 * of_memory, under=5.0, unit=" %"))
    print(goal("open files, growth after warm-up, worst process", of_files, under=1.0))
    print(goal("disk directory, largest", max(s.memory_bytes for s in on_disk) / MIB, under=64.01, unit=" MiB"))


if __name__ == "__main__":
    main()
