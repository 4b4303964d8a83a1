"""What tiers cost when nobody needs them: processor time of a worker per token, with and without host tier and disk.

    python benchmarks/tiers_idle.py            three pairs, about four minutes
    python benchmarks/tiers_idle.py --quick    one pair, within 60 s
    python benchmarks/tiers_idle.py --record   also append to benchmarks/results/tiers_idle.jsonl

`kvray serve` with the demo model and one decode worker that has room for all, started anew for each half of a pair, in
turns; eight streams of 512 tokens after short prompts, three times. What counts is the worker's processor time per
token, of all its threads; medians of the pairs' ratios. All blocks go down once, which is part of it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from pathlib import Path
from statistics import median

from harness.http_client import HttpConnection
from harness.models import model_directory, vocab_size
from harness.report import goal, hardware, parser, record
from harness.serving import Served, serving

NUM_STREAMS = 8
NUM_TOKENS = 512
NUM_ROUNDS = 3


async def stream(url: str, prompt: list[int]) -> None:
    """Have a prompt answered."""
    connection = await HttpConnection.open(url)
    body = {"model": "bench", "prompt": prompt, "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True}
    async for _ in connection.events("/v1/completions", body):
        pass
    connection.close()


async def generate(url: str, seed: int) -> None:
    """Run all streams at once."""
    rng, vocabulary = random.Random(seed), vocab_size(model_directory("demo"))
    prompts = [[rng.randrange(5, vocabulary) for _ in range(64)] for _ in range(NUM_STREAMS)]
    await asyncio.gather(*(stream(url, prompt) for prompt in prompts))


def cpu_s(served: Served) -> float:
    """Return the processor time of the decode worker so far."""
    (worker,) = [worker for worker in served.status()["workers"] if worker["role"] == "decode"]
    return float(worker["values"]["kvray_process_cpu_seconds_total"])


def measure(flags: list[str]) -> float:
    """Return processor time per token, in ms."""
    model = str(model_directory("demo"))
    common = ["--served-model-name", "bench", "--prefill", "0", "--decode", "1", "--kv-cache-memory", "256MiB"]
    with serving(model, *common, *flags) as served:
        asyncio.run(generate(served.url, 0))
        before_s = cpu_s(served)
        for number in range(NUM_ROUNDS):
            asyncio.run(generate(served.url, 1 + number))
        return 1e3 * (cpu_s(served) - before_s) / (NUM_ROUNDS * NUM_STREAMS * NUM_TOKENS)


def main() -> None:
    args = parser(__doc__, "tiers_idle", quick="one pair").parse_args()
    print(hardware())
    pairs: list[tuple[float, float]] = []
    for number in range(1 if args.quick else 3):
        disk = Path(tempfile.mkdtemp(prefix="kvray-disk-"))
        ways = {"off": [], "on": ["--host-memory", "256MiB", "--disk-dir", str(disk)]}
        taken = {name: measure(ways[name]) for name in sorted(ways, reverse=bool(number % 2))}
        shutil.rmtree(disk, ignore_errors=True)
        pairs.append((taken["off"], taken["on"]))
        print(f"  off {taken['off']:.3f} ms, on {taken['on']:.3f} ms of processor time per token", flush=True)
    if args.record:
        record("tiers_idle", [{"off_ms": off, "on_ms": on} for off, on in pairs])
    added = 100 * (median(on / off for off, on in pairs) - 1)
    print("\n" + goal("processor time per token that idle tiers add", added, under=2.0, unit=" %"))


if __name__ == "__main__":
    main()
