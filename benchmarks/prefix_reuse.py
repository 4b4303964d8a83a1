"""Time to first token of a prompt that is new, that the prefill worker holds, that the decode worker holds.

    python benchmarks/prefix_reuse.py               512, 2 k and 8 k tokens, the demo model
    python benchmarks/prefix_reuse.py --quick       512 and 2 k tokens, few repeats, within 60 s
    python benchmarks/prefix_reuse.py --models 120M
    python benchmarks/prefix_reuse.py --record      also append to benchmarks/results/prefix_reuse.jsonl

`kvray serve` with one prefill and one decode worker, asked by HTTP, one request at a time, medians. Prompts are random
token ids, in one of three states:
    cold     nobody has seen it
    decode   asked once more: its blocks are in the decode worker's pool
    prefill  only the prefill worker holds it
For the last state the benchmark first asks the decode worker on its own channel to have the prompt prefilled, whatever
the router would think of it, then to compute short prompts itself, which fill its pool and push the prompt out. The
request that is measured is routed like any other.
`kvray.prompt_sources` of each answer says where the tokens came from, and has to agree: all but the last block or two
from the state's place, else the request does not count, and is shown as one of the others.
Goals: a prompt held by decode, and one held by prefill, is faster than a cold one at every length.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from harness.direct import DirectClient
from harness.http_client import HttpConnection
from harness.models import model_directory, vocab_size
from harness.prompts import draw_prompts
from harness.report import goal, hardware, parser, record
from harness.serving import Served, serving

from engine.model.linear import can_pack

PATH = "/v1/completions"
LENGTHS = (512, 2048, 7936)  # the last one, with its output, is what 8 k positions hold
FILLER_TOKENS = 240
POOL_TOKENS = 12_288  #: the longest prompt, and room to push it out soon
NUM_FILL_STREAMS = 16
FILL = 1.25  #: pools' worth of filler
STATES = ("cold", "decode", "prefill")
AFTERMATH_S = 0.05  #: of a request: release, events to the router


@dataclass(slots=True)
class Taken:
    """One state's repeats."""

    seconds: list[float] = field(default_factory=list)
    num_others: int = 0  #: whose tokens came from elsewhere


async def ask(connection: HttpConnection, prompt: list[int]) -> tuple[float, dict[str, int]]:
    """Send a prompt; return the seconds to its first token, and where its tokens came from."""
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "return_prompt_sources": True,
    }
    first_s, sources = 0.0, None
    begin_s = time.perf_counter()
    async for event in connection.events(PATH, body):
        first_s = first_s or time.perf_counter() - begin_s
        sources = event.get("kvray", {}).get("prompt_sources", sources)
    await asyncio.sleep(AFTERMATH_S)
    assert sources is not None, "the answer does not say where its tokens came from"
    return first_s, sources


async def fill(served: Served, prompts: list[list[int]]) -> None:
    """Have the decode worker compute these prompts itself, so that what it held makes room."""

    async def work() -> None:
        direct = DirectClient(served.secret, served.addresses("decode")[0])
        while prompts:
            await direct.first_token_s(prompts.pop(), None)
        direct.close()

    await asyncio.gather(*(work() for _ in range(NUM_FILL_STREAMS)))
    await asyncio.sleep(AFTERMATH_S)


def state_of(sources: dict[str, int], num_tokens: int, block_size: int) -> str:
    """The state that a prompt was in, as the answer tells it."""
    enough = num_tokens - 2 * block_size  # the last token is always computed, and with it perhaps its block
    held = {"decode": sources["device"], "prefill": sources["peer"], "cold": sources["computed"]}
    return next((state for state, tokens in held.items() if tokens >= enough), "mixed")


async def measure(served: Served, size: int, lengths: tuple[int, ...], repeats: int) -> dict[int, dict[str, Taken]]:
    """All lengths, through all states."""
    worker = served.status()["workers"][0]
    block_size, pool_tokens = worker["block_size_tokens"], worker["num_blocks"] * worker["block_size_tokens"]
    results = {length: {state: Taken() for state in STATES} for length in lengths}
    num_fillers = int(FILL * pool_tokens) // FILLER_TOKENS
    connection = await HttpConnection.open(served.url)
    await hold_in_prefill(served, draw_prompts(0, 1, lengths[0], size)[0])
    for number in range(-1, repeats):
        for length in lengths:
            prompt, other = draw_prompts(1000 * length + number, 2, length, size)
            for state in STATES:
                if state == "prefill":
                    await hold_in_prefill(served, other)
                    await fill(served, draw_prompts(1000 * length + number + 500, num_fillers, FILLER_TOKENS, size))
                first_s, sources = await ask(connection, other if state == "prefill" else prompt)
                taken = results[length][state]
                if number < 0:
                    continue
                if state_of(sources, length, block_size) == state:
                    taken.seconds.append(first_s)
                else:
                    taken.num_others += 1
    connection.close()
    return results


async def hold_in_prefill(served: Served, prompt: list[int]) -> None:
    """Have both workers hold `prompt`."""
    direct = DirectClient(served.secret, served.addresses("decode")[0])
    await direct.first_token_s(prompt, served.addresses("prefill")[0])
    direct.close()
    await asyncio.sleep(AFTERMATH_S)


def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it; else what `--dtype auto` takes there."""
    return torch.bfloat16 if can_pack(torch.bfloat16) else torch.float32


def kv_memory(name: str, dtype: torch.dtype) -> str:
    """For a pool of POOL_TOKENS."""
    config: dict[str, Any] = json.loads((model_directory(name) / "config.json").read_text())
    per_token = 2 * dtype.itemsize * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return f"{POOL_TOKENS * per_token // 1024}KiB"


def show(name: str, results: dict[int, dict[str, Taken]]) -> None:
    print(f"\n{name}: time to first token in ms, median (repeats; + those whose tokens came from elsewhere)")
    print(f"  {'tokens':>8}" + "".join(f"{state:>20}" for state in STATES))
    for length, states in results.items():
        cells = []
        for taken in states.values():
            middle = f"{1e3 * median(taken.seconds):.1f}" if taken.seconds else "-"
            others = f"+{taken.num_others}" if taken.num_others else ""
            cells.append(f"{middle} ({len(taken.seconds)}{others})")
        print(f"  {length:8d}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def goals(name: str, results: dict[int, dict[str, Taken]]) -> list[str]:
    lines = []
    for length, states in results.items():
        for state in ("prefill", "decode"):
            cold, held = states["cold"].seconds, states[state].seconds
            ratio = median(cold) / median(held) if cold and held else None
            lines.append(goal(f"{name}, {length} tokens held by {state}: times as fast as cold", ratio, at_least=1.0))
    return lines


def main() -> None:
    options = parser(__doc__, "prefix_reuse", quick="512 and 2 k tokens, few repeats")
    options.add_argument("--models", default="demo", help="comma-separated: demo, 120M, 500M, a directory")
    args = options.parse_args()
    lengths, repeats = (LENGTHS[:2], 3) if args.quick else (LENGTHS, 9)
    dtype = fast_dtype()
    print(f"{hardware()}, {dtype}")
    lines = []
    rows = {}
    for name in args.models.split(","):
        directory = model_directory(name)
        flags = ["--served-model-name", "bench", "--kv-cache-memory", kv_memory(name, dtype)]
        flags += ["--dtype", str(dtype).removeprefix("torch.")]
        with serving(str(directory), *flags) as served:
            results = asyncio.run(measure(served, vocab_size(directory), lengths, repeats))
        show(name, results)
        lines += goals(name, results)
        rows[name] = {"dtype": str(dtype)} | {
            str(length): {
                state: {
                    "ms": 1e3 * median(taken.seconds) if taken.seconds else None,
                    "num": len(taken.seconds),
                    "num_others": taken.num_others,
                }
                for state, taken in states.items()
            }
            for length, states in results.items()
        }
    if args.record:
        record("prefix_reuse", rows)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
