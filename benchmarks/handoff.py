"""What handing a prompt's KV from prefill to decode adds, from the end of the last prefill chunk to the second token.

    python benchmarks/handoff.py                    the demo model at 1 k and 7.9 k tokens, 120 M parameters at 8 k
    python benchmarks/handoff.py --quick            the demo model, few repeats, within 60 s
    python benchmarks/handoff.py --roads socket     another road than shm (several: one after the other)
    python benchmarks/handoff.py --record           also append to benchmarks/results/handoff.jsonl

One prefill and one decode worker in processes of their own, without Ray and HTTP, asked on their channel; prompts are
random and new each time, decoding is greedy. In turns, the decode worker computes the prompt itself, or asks the
prefill worker. The first prefill chunk is the same work on both, so is the step that gives the second token; in
between lies what is measured: publishing, telling, pulling and verifying what was not pulled before the last chunk
ended. Steps say on the machine's monotonic clock when they ended. One inter-token latency (ITL) is the median gap
between later tokens.
Goal: the handoff adds less than half an ITL at 8 k tokens.
"""

from __future__ import annotations

import asyncio
import itertools
from statistics import median
from typing import Any

from harness.direct import DirectClient
from harness.models import model_directory, vocab_size
from harness.prompts import draw_prompts
from harness.report import goal, hardware, parser, record
from harness.workers import WorkerProcess, running_worker

from engine.core import EngineOptions
from engine.worker import WorkerOptions
from transport.channel import ChannelConfig
from transport.opening import RoadOptions
from transport.secret import ClusterSecret

NUM_TOKENS_OUT = 10
AFTERMATH_S = 0.1  #: of a request: release, report


def options_of(model: str, roads: tuple[str, ...]) -> WorkerOptions:
    return WorkerOptions(
        model_dir=str(model_directory(model)),
        dtype="float32",
        device="cpu",
        max_model_len=None,
        num_threads=1,
        engine=EngineOptions(kv_cache_bytes=1 << 30, max_num_seqs=8),
        use_kernels=True,
        channel=ChannelConfig(),
        lease_s=60.0,
        stall_s=10.0,
        roads=RoadOptions(names=roads),
    )


async def measure(
    client: DirectClient, prompt: list[int], prefill: WorkerProcess | None, decode: WorkerProcess
) -> tuple[float, list[float]]:
    """Measure seconds from the end of the last prefill chunk to the second token, and the gaps between later ones."""
    address = None if prefill is None else prefill.info.address
    times_s = await client.token_times_s(prompt, address, max_tokens=NUM_TOKENS_OUT)
    await asyncio.sleep(AFTERMATH_S)
    ended_s = (prefill or decode).last_said("prompt_ended_s")
    gaps = [later - sooner for sooner, later in itertools.pairwise(times_s[1:])]
    return times_s[1] - ended_s, gaps


async def compare(model: str, num_tokens: int, roads: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Measure both ways in turns; the medians in ms."""
    secret = ClusterSecret.generate()
    options = options_of(model, roads)
    vocabulary = vocab_size(model_directory(model))
    with (
        running_worker("prefill", options, secret, is_traced=True) as prefill,
        running_worker("decode", options, secret, is_traced=True) as decode,
    ):
        client = DirectClient(secret, decode.info.address)
        for prompt in draw_prompts(1, 2, 600, vocabulary):  # connects, probes roads
            await measure(client, prompt, prefill, decode)
            await asyncio.sleep(0.5)
        apart, alone, itl = [], [], []
        ours, others = (draw_prompts(seed, repeats, num_tokens, vocabulary) for seed in (2, 3))
        for prompt, other in zip(ours, others, strict=True):
            seconds, gaps = await measure(client, prompt, prefill, decode)
            apart.append(seconds)
            itl += gaps
            seconds, gaps = await measure(client, other, None, decode)
            alone.append(seconds)
            itl += gaps
        client.close()
    return {
        "model": model,
        "num_tokens": num_tokens,
        "roads": roads,
        "repeats": repeats,
        "apart_ms": 1000 * median(apart),
        "alone_ms": 1000 * median(alone),
        "added_ms": 1000 * (median(apart) - median(alone)),
        "itl_ms": 1000 * median(itl),
        "apart_each_ms": [1000 * value for value in apart],
        "alone_each_ms": [1000 * value for value in alone],
    }


def main() -> None:
    asked = parser(__doc__, "handoff", quick="the demo model, few repeats")
    asked.add_argument("--roads", nargs="+", default=["shm"], help="roads to measure, one after the other")
    asked.add_argument("--models", nargs="+", default=["demo", "120M"])
    options = asked.parse_args()
    cells = [("demo", 1024, 9), ("demo", 7900, 7), ("120M", 8000, 3)]
    if options.quick:
        cells = [("demo", 1024, 5), ("demo", 7900, 3)]
    print(hardware())
    print(f"{'model, tokens, road':28}{'apart ms':>10}{'alone ms':>10}{'added ms':>10}{'ITL ms':>10}")
    results = []
    for road in options.roads:
        for model, num_tokens, repeats in cells:
            if model not in options.models:
                continue
            result = asyncio.run(compare(model, num_tokens, (road,), repeats))
            results.append(result)
            name = f"{model} {num_tokens} {road}"
            figures = [result[key] for key in ("apart_ms", "alone_ms", "added_ms", "itl_ms")]
            print(f"{name:28}" + "".join(f"{figure:10.1f}" for figure in figures), flush=True)
    if options.record:
        record("handoff", results)
    for result in results:
        if result["num_tokens"] > 4096:
            name = f"handoff adds, {result['model']} at {result['num_tokens']} tokens over {result['roads'][0]}"
            print(goal(f"{name}, in ITLs", result["added_ms"] / result["itl_ms"], under=0.5))


if __name__ == "__main__":
    main()
