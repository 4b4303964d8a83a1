"""Compute or load: what the planner chooses, beside computing all and loading all, over prompt length and disk speed.

    python benchmarks/compute_or_load.py            three lengths, seven speeds, about five minutes
    python benchmarks/compute_or_load.py --quick    one length, three speeds, within 60 s
    python benchmarks/compute_or_load.py --record   also append to benchmarks/results/compute_or_load.jsonl, and draw
                                                    benchmarks/results/compute_or_load.svg (matplotlib)

A decode worker and a node cache in processes of their own; each prompt's KV lies on the node cache's disk and nowhere
else, whose reads are throttled to a speed (harness.throttled_cache). A speed is told by how long it takes to load what
the worker computes in one second, as it was measured at first. Each round asks three new prompts in random order: one
computed, one loaded (harness.planned_worker forces the planner), one as planned; ratios are of one round, medians
count, with their quartiles. Prices are learned from a few rounds that do not count, as a worker learns them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import msgspec
import numpy as np
from harness.direct import DirectClient
from harness.models import model_directory, vocab_size
from harness.report import RESULTS, ROOT, goal, hardware, parser, record
from harness.workers import running_worker

from engine.core import EngineOptions
from engine.memory.kv_pool import LAYOUT_VERSION
from engine.worker import WorkerOptions
from kvcache.names import block_names, pack_tokens, split_names
from messages.fleet import WorkerInfo
from messages.request import Copy, HeldRun
from nodecache.disk.layout import Model
from nodecache.disk.store import DiskStore
from nodecache.process import CacheSettings, cache_options
from nodecache.store import StoredBlock
from transport.channel import ChannelConfig
from transport.checksum import checksum
from transport.opening import RoadOptions
from transport.secret import ClusterSecret

SCRIPTS = Path(__file__).resolve().parent / "harness"
MIB = 1 << 20
LENGTHS = (1024, 4096, 7680)  #: tokens
SPEEDS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0)  #: seconds of loading for a second of computing
NUM_LEARNING = 4
DISK_BYTES = 8 << 30
DEADLINE_S = 60.0
#: Where loading takes between this and its inverse of computing, a mixture is to help.
MIXED = 0.5


@dataclass(slots=True)
class Cell:
    """One length at one speed."""

    num_tokens: int
    speed: float
    compute_ms: float
    load_ms: float
    planned_ms: float
    of_better: tuple[float, float, float]  #: planned over the better of the two, round by round: quartiles


def options_of(model: str) -> WorkerOptions:
    """Describe a worker with a pool in which a few prompts fit."""
    return WorkerOptions(
        model_dir=str(model_directory(model)),
        dtype="float32",
        device="cpu",
        max_model_len=None,
        num_threads=1,
        engine=EngineOptions(kv_cache_bytes=64 * MIB, max_num_seqs=8),
        use_kernels=True,
        channel=ChannelConfig(),
        lease_s=60.0,
        stall_s=10.0,
        roads=RoadOptions(names=("shm",)),
    )


@contextlib.asynccontextmanager
async def throttled_cache(
    info: WorkerInfo, directory: Path, bytes_per_s: float, secret: ClusterSecret
) -> AsyncIterator[str]:
    """Run a node cache over `directory`; the answer is its address. Nothing blocks while it comes up."""
    options = cache_options(
        CacheSettings(host_memory_bytes=64 * MIB, disk_dir=str(directory), disk_capacity_bytes=DISK_BYTES),
        fingerprint=info.fingerprint,
        layout_version=LAYOUT_VERSION,
        block_bytes=info.block_bytes,
        lease_s=60.0,
        block_size=info.block_size,
        host="127.0.0.1",
        channel=ChannelConfig(),
        roads=RoadOptions(names=("shm",)),
        stall_s=10.0,
        log_level="error",
    )
    job = {"options": msgspec.to_builtins(options), "secret": secret.hex(), "bytes_per_s": bytes_per_s}
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, SCRIPTS / "throttled_cache.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        line = await asyncio.to_thread(process.stdout.readline)
        yield msgspec.convert(json.loads(line), WorkerInfo).address
    finally:
        process.stdin.close()
        await asyncio.to_thread(process.wait, 20)


class Prompts:
    """Random prompts whose KV lies on disk: any bytes will do, as nobody looks at the tokens."""

    def __init__(self, info: WorkerInfo, directory: Path, vocabulary: int) -> None:
        self._info = info
        self._vocabulary = vocabulary
        self._random = random.Random(11)
        model = Model(info.fingerprint, LAYOUT_VERSION, info.block_bytes)
        self._store = DiskStore(directory, model, DISK_BYTES, checksum)
        values = np.random.default_rng(1).normal(size=info.block_bytes // 4).astype(np.float32)
        self._block = memoryview(values).cast("B")
        self._checksum = checksum(self._block)

    def draw(self, num_tokens: int) -> list[int]:
        """Make one, and write its blocks."""
        prompt = [self._random.randrange(5, self._vocabulary) for _ in range(num_tokens)]
        size = self._info.block_size
        names = split_names(block_names(self._info.fingerprint, b"", pack_tokens(prompt), size))
        blocks = [StoredBlock(name, size, self._checksum) for name in names]
        for begin in range(0, len(blocks), 64):
            some = blocks[begin : begin + 64]
            self._store.write(some, [self._block] * len(some), DEADLINE_S)
        return prompt

    def draw_many(self, num_tokens: int, num_prompts: int) -> list[list[int]]:
        """Make some."""
        return [self.draw(num_tokens) for _ in range(num_prompts)]

    def close(self) -> None:
        """Let another process have the directory."""
        self._store.sync(DEADLINE_S)
        self._store.close()


async def measure_cell(
    client: DirectClient, address: str, prompts: list[list[int]], block_size: int, speed: float
) -> Cell:
    """Ask prompts three at a time, each in another way."""
    num_tokens = len(prompts[0])
    held = (HeldRun(0, num_tokens // block_size, (Copy(address, "disk"),)),)
    rounds: list[dict[str, float]] = []
    order = random.Random(5)
    for number in range(len(prompts) // 3):
        ways = ["compute", "load", "planned"]
        order.shuffle(ways)
        taken: dict[str, float] = {}
        for way, prompt in zip(ways, prompts[3 * number : 3 * number + 3], strict=True):
            taken[way] = await client.first_token_s(prompt, None, held=held, kind=way)
        if number >= NUM_LEARNING:
            rounds.append(taken)
    ratios = [each["planned"] / min(each["compute"], each["load"]) for each in rounds]
    low, middle, high = quantiles(ratios, n=4)
    compute_ms, load_ms, planned_ms = (
        1e3 * median(each[way] for each in rounds) for way in ("compute", "load", "planned")
    )
    return Cell(num_tokens, speed, compute_ms, load_ms, planned_ms, (low, middle, high))


async def measure(model: str, lengths: tuple[int, ...], speeds: tuple[float, ...], num_rounds: int) -> list[Cell]:
    """Measure every cell, and print its row."""
    secret = ClusterSecret.generate()
    vocabulary = vocab_size(model_directory(model))
    cells: list[Cell] = []
    root = Path(tempfile.mkdtemp(prefix="kvray-disk-", dir=ROOT))
    script = (str(SCRIPTS / "planned_worker.py"),)
    print(f"{'tokens':>7}{'load/compute':>14}{'compute ms':>12}{'load ms':>10}{'planned ms':>12}  of the better")
    try:
        with running_worker("decode", options_of(model), secret, script=script) as worker:
            client = DirectClient(secret, worker.info.address)
            for num_tokens in lengths:
                directory = root / str(num_tokens)
                prompts = Prompts(worker.info, directory, vocabulary)
                each = 3 * (num_rounds + NUM_LEARNING)
                # In a thread: a client that says nothing for seconds is taken for lost.
                drawn = [await asyncio.to_thread(prompts.draw_many, num_tokens, each) for _ in speeds]
                alone = await asyncio.to_thread(prompts.draw_many, num_tokens, 5)
                await asyncio.to_thread(prompts.close)
                compute_s = median([await client.first_token_s(p, None, kind="compute") for p in alone])
                num_bytes = num_tokens // worker.info.block_size * worker.info.block_bytes
                for speed, some in zip(speeds, drawn, strict=True):
                    bytes_per_s = num_bytes / compute_s / speed
                    async with throttled_cache(worker.info, directory, bytes_per_s, secret) as address:
                        cell = await measure_cell(client, address, some, worker.info.block_size, speed)
                    cells.append(cell)
                    low, middle, high = cell.of_better
                    print(
                        f"{num_tokens:7}{speed:14.3g}{cell.compute_ms:12.1f}{cell.load_ms:10.1f}{cell.planned_ms:12.1f}"
                        f"  {middle:.2f} ({low:.2f} to {high:.2f})",
                        flush=True,
                    )
                await asyncio.to_thread(shutil.rmtree, directory)
            client.close()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return cells


def draw(cells: list[Cell], path: Path) -> None:
    """Draw a curve for each length: planned over the better of the two, by how fast loading is."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for num_tokens in sorted({cell.num_tokens for cell in cells}):
        some = [cell for cell in cells if cell.num_tokens == num_tokens]
        ratios = [cell.load_ms / cell.compute_ms for cell in some]
        low, middle, high = zip(*(cell.of_better for cell in some), strict=True)
        axes.plot(ratios, middle, marker="o", label=f"{num_tokens:,} tokens")
        axes.fill_between(ratios, low, high, alpha=0.15)
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="seconds to load / seconds to compute", ylabel="planned / better of the two")
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def main() -> None:
    options = parser(__doc__, "compute_or_load", quick="one length, three speeds")
    options.add_argument("--model", default="demo")
    args = options.parse_args()
    print(hardware())
    lengths, speeds, num_rounds = ((2048,), (0.25, 1.0, 4.0), 5) if args.quick else (LENGTHS, SPEEDS, 9)
    cells = asyncio.run(measure(args.model, lengths, speeds, num_rounds))
    if args.record:
        record("compute_or_load", [asdict(cell) for cell in cells])
        draw(cells, RESULTS / "compute_or_load.svg")
    worst = max(cells, key=lambda cell: cell.of_better[1])
    mixed = [cell for cell in cells if MIXED <= cell.load_ms / cell.compute_ms <= 1 / MIXED]
    least = max((cell.of_better[1] for cell in mixed), default=None)
    print()
    print(goal("planned, of the better of computing and loading, worst cell", worst.of_better[1], under=1.05))
    print(goal("the same where a mixture helps, worst cell", least, under=0.85))


if __name__ == "__main__":
    main()
