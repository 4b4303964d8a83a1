"""What HTTP, routing and handoff add to the bare engine: time to first token alone, tokens/s at 32 streams.

With another checkout beside, also what a streamed token costs the ingress, as a ratio of what it costs there.

    python benchmarks/http_overhead.py                      the demo model, then a random one of 120 M parameters
    python benchmarks/http_overhead.py --quick              the demo model, few repeats, within 60 s
    python benchmarks/http_overhead.py --models 500M        others: demo, 120M, 500M, a directory
    python benchmarks/http_overhead.py --before DIRECTORY   a checkout of another commit, for the cost of a token
    python benchmarks/http_overhead.py --record             also append to benchmarks/results/http_overhead.jsonl

`kvray serve` with one prefill and one decode worker, beside the engine in a process of its own with as many threads as
one worker has. They take turns: whoever is measured has the machine, the other is idle; within the served path,
workers, proxy, ingress, router and this client share it. Prompts are random token ids never seen before; decoding is
greedy and has to give the same tokens on both sides.

Alone: one prompt of 512 tokens at a time; medians of
    bare engine      the engine
    health           GET /health: client, Serve's proxy, ingress, and back
    channel          a question to the decode worker on its own channel, and back
    decode           the decode worker, asked on its channel, computes the prompt itself
    prefill, decode  it asks the prefill worker, and pulls
    http             POST /v1/completions with stream, on a bare asyncio connection
    openai           the same with the openai client
The router hands over only where that pays. Where it did not, the difference between the two stages on the channel is
added to what counts for the goal.
Goals: http less bare under 3 ms; tokens/s of 32 streams at least 0.95 of the bare engine with 32 sequences; three times
the tokens/s per core of the ingress before, at 32 and at 256 streams of the demo model; `/tokenize` of 8 MiB takes, or
is refused with, less than 300 MiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from harness.bare_engine import BareEngine
from harness.direct import DirectClient
from harness.http_client import HttpConnection, completion
from harness.ingress_cost import tokenizing_mib, tokens_per_core_s
from harness.models import model_directory, vocab_size
from harness.prompts import draw_prompts
from harness.report import goal, hardware, parser, record
from harness.serving import Served, serving
from openai import AsyncOpenAI

MAX_ADDED_MS = 3.0
MIN_OF_BARE = 0.95
MIN_OF_BEFORE = 3.0
MAX_TOKENIZING_MIB = 300.0
SINGLE_TOKENS = 512
NUM_STREAMS = 32
COST_STREAMS = (32, 256)
STREAM_PROMPT_TOKENS = 256
STREAM_OUTPUT_TOKENS = 128
KV_CACHE_MIB = 512
NUM_WORKERS = 2
PATH = "/v1/completions"
WARM_UP = 3
AFTERMATH_S = 0.02  #: of a request: release, report, index
SEEDS_PER_STAGE = 100_000


class Alone:
    """Measures the stages of one prompt at a time, on connections that are open already."""

    def __init__(self, served: Served, bare: BareEngine, connection: HttpConnection, size: int) -> None:
        self._bare = bare
        self._connection = connection
        self._size = size
        self._direct = DirectClient(served.secret, served.addresses("decode")[0])
        self._prefill_address = served.addresses("prefill")[0]
        self._openai = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none")
        self.stages: dict[str, Callable[[int], Awaitable[float]]] = {
            "bare engine": self._with_engine,
            "health": self._health,
            "channel": lambda _: self._direct.round_trip_s(),
            "decode": lambda seed: self._direct.first_token_s(self._prompt(seed), None),
            "prefill, decode": lambda seed: self._direct.first_token_s(self._prompt(seed), self._prefill_address),
            "http": self._http,
            "openai": self._with_openai,
        }

    async def close(self) -> None:
        """Close all connections."""
        self._direct.close()
        await self._openai.close()

    def _prompt(self, seed: int) -> list[int]:
        return draw_prompts(seed, 1, SINGLE_TOKENS, self._size)[0]

    async def _with_engine(self, seed: int) -> float:
        run = await asyncio.to_thread(self._bare.run, seed, 1, SINGLE_TOKENS, self._size, max_tokens=2)
        return run.first_token_s

    async def _health(self, _: int) -> float:
        begin_s = time.perf_counter()
        await self._connection.get("/health")
        return time.perf_counter() - begin_s

    async def _http(self, seed: int) -> float:
        body = completion(self._prompt(seed), 2)
        begin_s = time.perf_counter()
        times = [time.perf_counter() - begin_s async for _ in self._connection.events(PATH, body)]
        return times[0]

    async def _with_openai(self, seed: int) -> float:
        prompt = self._prompt(seed)
        begin_s = time.perf_counter()
        stream = await self._openai.completions.create(
            model="bench",
            prompt=prompt,
            max_tokens=2,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        times = [time.perf_counter() - begin_s async for _ in stream]
        return times[0]


async def stream_tokens(connection: HttpConnection, prompt: list[int]) -> list[int]:
    """Read one stream to its end; its token ids."""
    tokens: list[int] = []
    async for event in connection.events(PATH, completion(prompt, STREAM_OUTPUT_TOKENS)):
        for choice in event["choices"]:
            tokens += choice["token_ids"]
    return tokens


async def one_round(connections: list[HttpConnection], seed: int, size: int) -> tuple[list[list[int]], float]:
    """Run all streams at once; their tokens, and how many came per second."""
    prompts = draw_prompts(seed, NUM_STREAMS, STREAM_PROMPT_TOKENS, size)
    begin_s = time.perf_counter()
    outputs = await asyncio.gather(*(stream_tokens(*pair) for pair in zip(connections, prompts, strict=True)))
    return outputs, NUM_STREAMS * STREAM_OUTPUT_TOKENS / (time.perf_counter() - begin_s)


async def measure_alone(served: Served, bare: BareEngine, size: int, repeats: int) -> dict[str, Any]:
    """Measure the medians of all stages, in turns, and how often prefill computed what came by HTTP."""
    connection = await HttpConnection.open(served.url)
    alone = Alone(served, bare, connection, size)
    seconds: dict[str, list[float]] = {name: [] for name in alone.stages}
    prefill = DirectClient(served.secret, served.addresses("prefill")[0])
    num_prefilled = 0.0
    for number in range(-WARM_UP, repeats):
        for stage, (name, measure) in enumerate(alone.stages.items()):
            before = await num_prefills(prefill)
            taken = await measure(SEEDS_PER_STAGE * (stage + 1) + number)
            await asyncio.sleep(AFTERMATH_S)
            if number >= 0:
                seconds[name].append(taken)
                if name == "http":
                    num_prefilled += await num_prefills(prefill) - before
    await alone.close()
    prefill.close()
    connection.close()
    stages_ms = {name: 1e3 * median(taken) for name, taken in seconds.items()}
    return {"stages_ms": stages_ms, "prefilled_share": num_prefilled / repeats}


async def num_prefills(prefill: DirectClient) -> float:
    """Count the prompts that the prefill worker was asked for so far."""
    return (await prefill.values())["kvray_prefill_prompts_total"]


async def measure_streams(served: Served, bare: BareEngine, size: int, repeats: int) -> dict[str, Any]:
    """Measure rounds of many streams, in turns; the first warms up and shows whether both give the same tokens."""
    connections = [await HttpConnection.open(served.url) for _ in range(NUM_STREAMS)]
    rates: list[float] = []
    bare_rates: list[float] = []
    cores: dict[str, float] = {}
    is_same = True
    for seed in range(repeats + 1):
        before, begin_s = cpu_seconds(served), time.perf_counter()
        outputs, rate = await one_round(connections, seed, size)
        elapsed_s = time.perf_counter() - begin_s
        after = cpu_seconds(served)
        shape = (NUM_STREAMS, STREAM_PROMPT_TOKENS, size)
        alone = await asyncio.to_thread(bare.run, seed, *shape, max_tokens=STREAM_OUTPUT_TOKENS)
        is_same &= outputs == alone.outputs
        if seed > 0:
            rates.append(rate)
            bare_rates.append(NUM_STREAMS * STREAM_OUTPUT_TOKENS / alone.elapsed_s)
            for name, cpu_s in after.items():
                share = (cpu_s - before.get(name, 0.0)) / elapsed_s
                cores[name] = cores.get(name, 0.0) + share / repeats
    for connection in connections:
        connection.close()
    return {
        "tokens_per_s": median(rates),
        "bare_tokens_per_s": median(bare_rates),
        "is_same": is_same,
        "cores": dict(sorted(cores.items(), key=lambda item: -item[1])),
    }


def cpu_seconds(served: Served) -> dict[str, float]:
    """Return the CPU time of every process of the serving side by kind, and of this client."""
    found = {"client": time.process_time()}
    for process in psutil.Process(served.pid).children(recursive=True):
        try:
            words, times = process.cmdline(), process.cpu_times()
        except psutil.Error:
            continue
        name = words[0].replace("ray::", "").split(".")[0].split(":")[-1] if words else process.name()
        name = Path(name).name
        found[name] = found.get(name, 0.0) + times.user + times.system
    return found


def measure(name: str, environment: dict[str, str], *, is_quick: bool) -> dict[str, Any]:
    """Measure both contenders on one model."""
    directory = model_directory(name)
    size = vocab_size(directory)
    num_threads = max(1, (os.cpu_count() or 1) // NUM_WORKERS)
    num_singles, num_rounds = (15, 1) if is_quick else (60, 3)
    options = ["--served-model-name", "bench", "--kv-cache-memory", f"{KV_CACHE_MIB}MiB", "--threads", str(num_threads)]
    with (
        BareEngine(directory, num_threads=num_threads, kv_cache_bytes=KV_CACHE_MIB << 20) as bare,
        serving(str(directory), *options, environment=environment) as served,
    ):
        results = asyncio.run(measure_alone(served, bare, size, num_singles))
        results |= asyncio.run(measure_streams(served, bare, size, num_rounds))
        results["tokenizing_mib"] = tokenizing_mib(served)
    stages_ms, share = results["stages_ms"], results["prefilled_share"]
    handoff_ms = max(0.0, stages_ms["prefill, decode"] - stages_ms["decode"])
    results["added_ms"] = stages_ms["http"] - stages_ms["bare engine"] + (1 - share) * handoff_ms
    return results | {"threads": num_threads}


def measure_cost(before: Path | None, environment: dict[str, str], *, is_quick: bool) -> dict[int, dict[str, float]]:
    """Measure tokens/s per core of the ingress, here and before, by how many streams there are."""
    directory = str(model_directory("demo"))
    options = [directory, "--served-model-name", "bench", "--kv-cache-memory", f"{KV_CACHE_MIB}MiB", "--threads", "1"]
    with contextlib.ExitStack() as stack:
        services = {"now": stack.enter_context(serving(*options, environment=environment))}
        if before is not None:
            services["before"] = stack.enter_context(serving(*options, environment=environment, checkout=before))
        size = vocab_size(Path(directory))
        repeats = 2 if is_quick else 6
        return {
            num_streams: asyncio.run(tokens_per_core_s(services, num_streams, size, repeats=repeats))
            for num_streams in COST_STREAMS
        }


def show_cost(cost: dict[int, dict[str, float]]) -> None:
    print("\nthe ingress: tokens/s per core, and milliseconds of processor time a token")
    for num_streams, rates in cost.items():
        shown = "; ".join(f"{name} {rate:,.0f}, {1e3 / rate:.4f} ms" for name, rate in rates.items())
        print(f"  {num_streams} streams: {shown}")


def cost_goals(cost: dict[int, dict[str, float]]) -> list[str]:
    return [
        goal(
            f"ingress: tokens/s per core at {num_streams} streams over those before",
            rates["now"] / rates["before"] if "before" in rates else None,
            at_least=MIN_OF_BEFORE,
        )
        for num_streams, rates in cost.items()
    ]


def show(name: str, results: dict[str, Any]) -> None:
    stages_ms = results["stages_ms"]
    print(f"\n{name}: time to first token of {SINGLE_TOKENS} tokens alone, {results['threads']} thread(s) per worker")
    print(f"  {'':18}{'ms':>9}{'added':>9}")
    for stage, taken_ms in stages_ms.items():
        is_answer = stage not in ("bare engine", "health", "channel")
        added = f"{taken_ms - stages_ms['bare engine']:9.2f}" if is_answer else ""
        print(f"  {stage:18}{taken_ms:9.2f}{added}")
    print(f"  of the HTTP requests, the prefill worker computed {100 * results['prefilled_share']:.0f} %")
    rate, bare_rate = results["tokens_per_s"], results["bare_tokens_per_s"]
    print(f"  {NUM_STREAMS} streams: {rate:,.0f} tokens/s; bare engine {bare_rate:,.0f}; {rate / bare_rate:.2f} of it")
    print(
        "  cores busy meanwhile: " + ", ".join(f"{process} {share:.2f}" for process, share in results["cores"].items())
    )


def goals(name: str, results: dict[str, Any]) -> list[str]:
    share = results["tokens_per_s"] / results["bare_tokens_per_s"]
    return [
        goal(f"{name}: TTFT added by HTTP, routing and handoff", results["added_ms"], under=MAX_ADDED_MS, unit=" ms"),
        goal(f"{name}: tokens/s of {NUM_STREAMS} streams over the bare engine's", share, at_least=MIN_OF_BARE),
        goal(f"{name}: the same tokens as the bare engine", float(results["is_same"]), at_least=1),
        goal(
            f"{name}: memory for /tokenize of 8 MiB", results["tokenizing_mib"], under=MAX_TOKENIZING_MIB, unit=" MiB"
        ),
    ]


def main() -> None:
    options = parser(__doc__, "http_overhead", quick="the demo model, few repeats")
    options.add_argument("--before", type=Path, metavar="DIRECTORY", help="a checkout of another commit")
    options.add_argument("--models", help="comma-separated: demo, 120M, 500M, a directory")
    options.add_argument("--environment", nargs="*", default=[], metavar="NAME=VALUE", help="for `kvray serve`")
    args = options.parse_args()
    environment = dict(entry.split("=", 1) for entry in args.environment)
    print(hardware())
    lines = []
    results = {}
    for name in (args.models or ("demo" if args.quick else "demo,120M")).split(","):
        results[name] = measure(name, environment, is_quick=args.quick)
        show(name, results[name])
        lines += goals(name, results[name])
    if args.before is not None or not args.quick:
        results["cost"] = measure_cost(args.before, environment, is_quick=args.quick)
        show_cost(results["cost"])
    lines += cost_goals(results.get("cost") or {num_streams: {} for num_streams in COST_STREAMS})
    if args.record:
        record("http_overhead", results)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
