"""Time to first token where the prefill worker holds a prompt's prefix, pulls it from another worker, or computes it.

    python benchmarks/peer_pull.py                    the demo model and 120 M parameters, 8 k tokens
    python benchmarks/peer_pull.py --quick            the demo model, few repeats, within 60 s
    python benchmarks/peer_pull.py --record           also append to benchmarks/results/peer_pull.jsonl

Two prefill workers and a decode worker in processes of their own, without Ray and HTTP, asked on their channel. Of each
prompt, random and new, the first prefill worker is made to hold the prefix, the rest is a suffix of some tokens. In
turns a prompt is placed with the worker that holds its prefix, and with the other one, which holds nothing and is told
who does; a third one, whose prefix nobody holds, is computed by the other. The decode worker never holds anything of
them.
Goal: at 8 k tokens the worker that pulls takes at most 1.5 times as long to the first token as the one that holds.
"""

from __future__ import annotations

import asyncio
from statistics import median
from typing import Any

from harness.direct import DirectClient
from harness.models import model_directory, vocab_size
from harness.prompts import draw_prompts
from harness.report import goal, hardware, parser, record
from harness.workers import running_worker

from engine.core import EngineOptions
from engine.worker import WorkerOptions
from messages.request import Copy, HeldRun
from transport.channel import ChannelConfig
from transport.opening import RoadOptions
from transport.secret import ClusterSecret

BLOCK_SIZE = 16
SUFFIX_TOKENS = 128
AFTERMATH_S = 0.1  #: of a request: release, report


def options_of(model: str) -> WorkerOptions:
    return WorkerOptions(
        model_dir=str(model_directory(model)),
        dtype="bfloat16",
        device="cpu",
        max_model_len=None,
        num_threads=1,
        engine=EngineOptions(kv_cache_bytes=1 << 30, max_num_seqs=8, block_size=BLOCK_SIZE),
        use_kernels=True,
        channel=ChannelConfig(),
        lease_s=60.0,
        stall_s=10.0,
        roads=RoadOptions(names=("shm",)),
    )


async def compare(model: str, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Measure the three in turns; the medians in ms."""
    secret, options = ClusterSecret.generate(), options_of(model)
    vocabulary = vocab_size(model_directory(model))
    num_held_tokens = (num_tokens - SUFFIX_TOKENS) // BLOCK_SIZE * BLOCK_SIZE
    with (
        running_worker("prefill", options, secret) as holder,
        running_worker("prefill", options, secret) as other,
        running_worker("decode", options, secret) as decode,
    ):
        client, keeping = DirectClient(secret, decode.info.address), DirectClient(secret, holder.info.address)
        held = (HeldRun(0, num_held_tokens // BLOCK_SIZE, (Copy(holder.info.address, "device"),)),)
        ways = {
            "holds": (holder.info.address, held),
            "pulls": (other.info.address, held),
            "computes": (other.info.address, ()),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(repeats + 2):  # the first two connect, try roads, learn prices
            prompts = draw_prompts(turn, len(ways), num_tokens, vocabulary)
            for prompt, (way, (address, known)) in zip(prompts, ways.items(), strict=True):
                if known:
                    await keeping.hold(prompt[:num_held_tokens])
                    await asyncio.sleep(AFTERMATH_S)
                first_s = await client.first_token_s(prompt, address, held=known)
                assert client.sources is not None
                num_peer = client.sources.peer
                assert num_peer == (num_held_tokens if known else 0) or turn < 2, f"{way}: {client.sources}"
                if turn >= 2:
                    seconds[way].append(first_s)
                await asyncio.sleep(AFTERMATH_S)
        client.close()
        keeping.close()
    ratios = [pulls / holds for pulls, holds in zip(seconds["pulls"], seconds["holds"], strict=True)]
    return {
        "model": model,
        "num_tokens": num_tokens,
        "suffix_tokens": SUFFIX_TOKENS,
        "repeats": repeats,
        **{f"{way}_ms": 1000 * median(values) for way, values in seconds.items()},
        "ratio": median(ratios),
        "ratios": sorted(ratios),
    }


def main() -> None:
    asked = parser(__doc__, "peer_pull", quick="the demo model, few repeats")
    asked.add_argument("--models", nargs="+", default=["demo", "120M"])
    options = asked.parse_args()
    cells = [("demo", 8000, 3)] if options.quick else [("demo", 8000, 9), ("120M", 8000, 3)]
    print(hardware())
    print(f"{'model, tokens':20}{'holds ms':>10}{'pulls ms':>10}{'computes ms':>13}{'pulls / holds':>15}")
    results = []
    for model, num_tokens, repeats in cells:
        if model not in options.models:
            continue
        result = asyncio.run(compare(model, num_tokens, repeats))
        results.append(result)
        print(
            f"{model + ' ' + str(num_tokens):20}{result['holds_ms']:10.1f}{result['pulls_ms']:10.1f}"
            f"{result['computes_ms']:13.1f}{result['ratio']:15.2f}",
            flush=True,
        )
    if options.record:
        record("peer_pull", results)
    for result in results:
        name = f"a prefill worker that pulls, {result['model']} at {result['num_tokens']} tokens, of one that holds"
        print(goal(name, result["ratio"], under=1.5))


if __name__ == "__main__":
    main()
