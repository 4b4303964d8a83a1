"""What tiers cost when nobody needs them: processor time per token, with and without host tier and disk.

    python benchmarks/tiers_idle.py            32 groups of rounds, about three minutes
    python benchmarks/tiers_idle.py --quick    three groups, within 60 s where nothing else runs: too few to judge
    python benchmarks/tiers_idle.py --record   also append to benchmarks/results/tiers_idle.jsonl

Two `kvray serve` beside each other, with the demo model and one decode worker, one with tiers and one without. A round
is eight streams of 512 tokens after short prompts, all new, whose blocks go down once; a round's time is all that was
taken since the same server's round before it ended. Rounds go off, on, on, off: what a token costs changes by a
tenth with what ran just before, and by a fifth with what else the machine does. What counts is the worker's processor
time per token, of all its threads: the median of the groups' ratios. Pages are mapped in rounds that do not count;
after a few that do pool and arena are full, as they are in servers that run for long.

So that tokens cost the same in every round, streams begin together, in one request, or there are more and smaller
steps; and the worker computes on one thread, which waits for no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, quantiles

import psutil
from harness.http_client import HttpConnection
from harness.models import model_directory, vocab_size
from harness.report import goal, hardware, parser, record
from harness.serving import Served, serving

NUM_STREAMS = 8
NUM_TOKENS = 512
NUM_GROUPS, NUM_QUICK_GROUPS = 32, 3
GROUP = ("off", "on", "on", "off")
NUM_WARM_UPS = 2
FLAGS = [
    *("--served-model-name", "bench", "--prefill", "0", "--decode", "1", "--threads", "1"),
    *("--kv-cache-memory", "256MiB"),  # 36 MiB are written in a round
]
TIERS = ["--host-memory", "256MiB", "--disk-dir"]
#: Words in a process's command line, and what it is here.
PARTS = {
    "kvray:Decode": "worker",
    "kvray:Ingress": "ingress",
    "kvray:Router": "router",
    "nodecache": "node cache",
    "ray::CacheActor": "node cache",
}
REST = "all else"


async def generate(url: str, seed: int) -> None:
    """Have all streams of a round generated."""
    rng, vocabulary = random.Random(seed), vocab_size(model_directory("demo"))
    prompts = [[rng.randrange(5, vocabulary) for _ in range(64)] for _ in range(NUM_STREAMS)]
    body = {"model": "bench", "prompt": prompts, "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True}
    connection = await HttpConnection.open(url)
    async for _ in connection.events("/v1/completions", body):
        pass
    connection.close()


def processor_s(served: Served) -> dict[str, float]:
    """Return the processor time, in seconds, that each part of a `kvray serve` took so far."""
    taken: defaultdict[str, float] = defaultdict(float)
    for process in [psutil.Process(served.pid), *psutil.Process(served.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):  # it ended
            words = " ".join(process.cmdline())
            part = next((name for word, name in PARTS.items() if word in words), REST)
            taken[part] += time.clock_gettime(~process.pid << 3 | 2)  # what clock_getcpuclockid(3) gives
    return taken


class Side:
    """A `kvray serve`, and what its rounds took."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.rounds: list[dict[str, float]] = []  #: us of processor time per token, by part
        self._taken = processor_s(served)

    def run_round(self, seed: int) -> None:
        """Generate, and note what each part took since the last round."""
        asyncio.run(generate(self.served.url, seed))
        before, self._taken = self._taken, processor_s(self.served)
        num_tokens = NUM_STREAMS * NUM_TOKENS
        self.rounds.append({part: 1e6 * (s - before.get(part, 0.0)) / num_tokens for part, s in self._taken.items()})

    def mean(self, part: str, begin: int = NUM_WARM_UPS) -> float:
        """Return what a part took, on the mean of the rounds from `begin` on."""
        return fmean(one.get(part, 0.0) for one in self.rounds[begin:])


def measure(num_groups: int, disk: Path) -> tuple[dict[str, Side], list[float]]:
    """Return both sides, and of each group of rounds what the worker took with tiers, as a share of without."""
    model = str(model_directory("demo"))
    ratios: list[float] = []
    with serving(model, *FLAGS) as without, serving(model, *FLAGS, *TIERS, str(disk)) as with_tiers:
        sides = {"off": Side(without), "on": Side(with_tiers)}
        for number in range(NUM_WARM_UPS + num_groups):
            is_warm_up = number < NUM_WARM_UPS
            for turn, name in enumerate(GROUP[: len(sides)] if is_warm_up else GROUP):
                sides[name].run_round(len(GROUP) * number + turn)
            if not is_warm_up:
                off, on = (sides[name].mean("worker", -2) for name in ("off", "on"))
                ratios.append(on / off)
                print(
                    f"  worker: off {off:.1f}, on {on:.1f} us of processor time per token: {ratios[-1]:.3f}", flush=True
                )
    return sides, ratios


def main() -> None:
    args = parser(__doc__, "tiers_idle", quick=f"{NUM_QUICK_GROUPS} groups").parse_args()
    print(hardware())
    disk = Path(tempfile.mkdtemp(prefix="kvray-disk-"))
    try:
        sides, ratios = measure(NUM_QUICK_GROUPS if args.quick else NUM_GROUPS, disk)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
    for part in [*dict.fromkeys(PARTS.values()), REST]:
        print(f"  {part}: off {sides['off'].mean(part):.1f}, on {sides['on'].mean(part):.1f} us per token")
    lower, middle, upper = quantiles(ratios, n=4)
    print(f"  worker, on by off: median {middle:.3f}, quartiles {lower:.3f} and {upper:.3f}")
    if args.record:
        record("tiers_idle", {name: side.rounds for name, side in sides.items()}, ratios=ratios)
    added = None if args.quick else 100 * (middle - 1)
    print("\n" + goal("processor time per token that idle tiers add", added, under=2.0, unit=" %"))


if __name__ == "__main__":
    main()
