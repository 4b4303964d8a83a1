"""Ten times what the fleet can do: who is refused, how long the others wait, and what becomes of short requests.

    python benchmarks/overload.py                      the demo model: 30 s of overload under a limit of 10 s
    python benchmarks/overload.py --quick              6 s under a limit of 2 s
    python benchmarks/overload.py --record             also append to benchmarks/results/overload.jsonl

`kvray serve` with one prefill and one decode worker, and this client on the same machine. First 16 clients, each with
one request at a time, tell the rate that can be sustained: prompts of random token ids never seen before, streamed.
Then such requests come at ten times that rate, whether answers come or not, and beside them a short one four times a
second. The peer is the same server without a limit, for a third of the time: it works all of it off.
Goals: TTFT p99 of those served under the limit; TTFT p99 of short ones under 2 s; no short one refused.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.http_client import HttpConnection
from harness.models import model_directory, vocab_size
from harness.prompts import draw_prompts
from harness.report import goal, hardware, parser, record
from harness.serving import Served, serving

FACTOR = 10
LONG_TOKENS, LONG_OUTPUT_TOKENS = 2000, 16
SHORT_TOKENS, SHORT_OUTPUT_TOKENS = 32, 4
SHORT_EVERY_S = 0.25
NUM_CLOSED = 16
MAX_SHORT_S = 2.0
NO_LIMIT_S = 1e7
PATH = "/v1/completions"


@dataclass
class Outcomes:
    """How the requests of one kind ended."""

    ttft_s: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)  #: by status, or by what broke

    def row(self) -> dict[str, Any]:
        """Return the figures by name."""
        num = len(self.ttft_s) + self.refused.total()
        return {
            "requests": num,
            "refused": dict(self.refused),
            "refused_share": self.refused.total() / max(1, num),
            "ttft_p50_s": quantile(self.ttft_s, 0.5),
            "ttft_p99_s": quantile(self.ttft_s, 0.99),
        }


def quantile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def ask(url: str, prompt: list[int], max_tokens: int, outcomes: Outcomes) -> None:
    started_s = time.perf_counter()
    first_s: float | None = None
    connection: HttpConnection | None = None
    body = {"model": "bench", "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    try:
        connection = await HttpConnection.open(url)
        async for _ in connection.events(PATH, body):
            first_s = first_s or time.perf_counter() - started_s
    except (OSError, asyncio.IncompleteReadError) as error:
        words = str(error).split()
        outcomes.refused[words[1] if str(error).startswith("http/") else type(error).__name__] += 1
    else:
        assert first_s is not None
        outcomes.ttft_s.append(first_s)
    finally:
        if connection is not None:
            connection.close()


async def sustainable_per_s(url: str, size: int, seconds: float) -> float:
    """Return the requests per second of clients that have one request each at a time."""
    prompts = iter(draw_prompts(1, 20_000, LONG_TOKENS, size))
    outcomes = Outcomes()
    ends_s = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < ends_s:
            await ask(url, next(prompts), LONG_OUTPUT_TOKENS, outcomes)

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(NUM_CLOSED)))
    return len(outcomes.ttft_s) / (time.perf_counter() - started_s)


async def overload(url: str, size: int, rate_per_s: float, seconds: float) -> dict[str, Any]:
    long, short = Outcomes(), Outcomes()
    num_long = int(rate_per_s * seconds)
    tasks: list[asyncio.Task[None]] = []

    async def come(prompts: list[list[int]], every_s: float, max_tokens: int, outcomes: Outcomes) -> None:
        started_s = time.perf_counter()
        for index, prompt in enumerate(prompts):
            await asyncio.sleep(max(0.0, started_s + index * every_s - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(url, prompt, max_tokens, outcomes)))

    await asyncio.gather(
        come(draw_prompts(2, num_long, LONG_TOKENS, size), 1 / rate_per_s, LONG_OUTPUT_TOKENS, long),
        come(
            draw_prompts(3, int(seconds / SHORT_EVERY_S), SHORT_TOKENS, size), SHORT_EVERY_S, SHORT_OUTPUT_TOKENS, short
        ),
    )
    await asyncio.gather(*tasks)
    return {"long": long.row(), "short": short.row()}


async def measure(served: Served, size: int, seconds: float, rate_per_s: float | None) -> dict[str, Any]:
    warm_s = await sustainable_per_s(served.url, size, 2.0)
    sustained = rate_per_s or await sustainable_per_s(served.url, size, seconds / 3)
    found = await overload(served.url, size, FACTOR * sustained, seconds)
    return {"warm_up_per_s": warm_s, "sustained_per_s": sustained, **found}


def serve_and_measure(
    directory: Path, limit_s: float, seconds: float, rate_per_s: float | None = None
) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(f"http: {{max_ttft_s: {limit_s}}}\n")
        config.flush()
        with serving(str(directory), "--served-model-name", "bench", "--config", config.name) as served:
            return asyncio.run(measure(served, vocab_size(directory), seconds, rate_per_s))


def show(name: str, results: dict[str, Any]) -> None:
    print(f"\n{name}: {FACTOR} times {results['sustained_per_s']:.1f} requests/s")
    for kind in ("long", "short"):
        row = results[kind]
        print(
            f"  {kind:6}{row['requests']:6} requests, {100 * row['refused_share']:.0f} % refused {row['refused']}, "
            f"TTFT p50 {row['ttft_p50_s'] or 0:.2f} s, p99 {row['ttft_p99_s'] or 0:.2f} s"
        )


def main() -> None:
    options = parser(__doc__, "overload", quick="6 s of overload under a limit of 2 s")
    options.add_argument("--model", default="demo", help="demo, 120M, 500M, a directory")
    args = options.parse_args()
    limit_s, seconds = (2.0, 6.0) if args.quick else (10.0, 30.0)
    directory = model_directory(args.model)
    print(hardware())
    limited = serve_and_measure(directory, limit_s, seconds)
    show(f"limit of {limit_s:g} s", limited)
    unlimited = serve_and_measure(directory, NO_LIMIT_S, seconds / 3, limited["sustained_per_s"])
    show("no limit", unlimited)
    if args.record:
        record("overload", {"limited": limited, "unlimited": unlimited}, limit_s=limit_s)
    print()
    print(goal("TTFT p99 of those served, within the limit", limited["long"]["ttft_p99_s"], under=limit_s, unit=" s"))
    print(goal("TTFT p99 of short requests", limited["short"]["ttft_p99_s"], under=MAX_SHORT_S, unit=" s"))
    print(goal("short requests refused", limited["short"]["refused_share"], under=0.001))


if __name__ == "__main__":
    main()
