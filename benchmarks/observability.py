"""What it costs to be watched: the time of a scrape of a large fleet, and processor time of each token.

    python benchmarks/observability.py             scrape, then the demo model served with and without, some minutes
    python benchmarks/observability.py --quick     the scrape alone, within 60 s
    python benchmarks/observability.py --record    also append to benchmarks/results/observability.jsonl

Scrape: one ingress's `/metrics` with 200 simulated workers in a process of their own, each of which tells what a worker
tells; its numbers are asked for anew each time. Seconds of the clock from the question to the page, and the processor
time that the ingress's event loop is held for by it.

Processor time: two services on the demo model, one of them with `observability.level: off`, take turns in streaming the
same load; that of all of a service's own processes (ingresses, router, workers, node cache), of each token. The one
that is watched is scraped every 5 s. What differs between the two runs in ingresses and router, where a busy machine's
noise in computing steps hides nothing of it: the goal takes the difference of their medians, as a share of the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import psutil
from harness.http_client import HttpConnection, completion
from harness.models import model_directory, vocab_size
from harness.prompts import draw_prompts
from harness.report import goal, hardware, parser, record
from harness.serving import Served, serving
from harness.told_fleet import SECRET, told_fleet

from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.openai.metrics import HttpMetrics
from transport.channel import ChannelConfig

NUM_WORKERS = 200
MAX_SCRAPE_MS = 50.0
MAX_COST_PERCENT = 2.0
SCRAPE_EVERY_S = 5.0
NUM_STREAMS = 16
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128
NUM_ROUNDS_OF_A_TURN = 4  #: of streams, one after the other
PATH = "/v1/completions"
_OWN_PROCESSES = ("ServeReplica:kvray", "nodecache")
_FRONT_PROCESSES = (":Ingress", ":Router")  #: of those


async def scrape_figures(repeats: int) -> dict[str, Any]:
    """Scrape an ingress of a large fleet so many times."""
    with told_fleet(NUM_WORKERS) as infos:
        metrics = HttpMetrics("ingress-1")
        options = DispatchOptions(
            ingress_id="ingress-1", secret=SECRET, channel=ChannelConfig(), request_timeout_s=60.0, max_ttft_s=20.0
        )
        dispatcher = Dispatcher(options, metrics.values)
        for role in ("decode", "prefill"):
            dispatcher.set_workers(role, [info for info in infos if info.role == role])
        text = metrics.text(await dispatcher.metrics())  # connects
        clock_ms, cpu_ms = [], []
        for _ in range(repeats):
            await asyncio.sleep(1.1)  # until what workers told is too old to be told again
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            text = metrics.text(await dispatcher.metrics())
            clock_ms.append(1e3 * (time.perf_counter() - begin_s))
            cpu_ms.append(1e3 * (time.process_time() - begin_cpu_s))
        dispatcher.close()
    num_samples = sum(not line.startswith(b"#") for line in text.splitlines())
    assert text.count(b"kvray_steps_total{") == NUM_WORKERS, "every worker is on the page"
    return {"clock_ms": clock_ms, "cpu_ms": cpu_ms, "samples": num_samples, "bytes": len(text)}


class Spent(NamedTuple):
    """Processor time, in the order of seconds or of microseconds a token."""

    whole: float  #: of all of a service's own processes
    front: float  #: of its ingresses and its router


def spent_s(served: Served) -> Spent:
    """Return the processor time so far of a service's processes, to the nanosecond."""
    whole_ns = front_ns = 0
    for process in psutil.Process(served.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            if any(word in command for word in _OWN_PROCESSES):
                tasks = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
                process_ns = sum(int(task.read_text().split()[0]) for task in tasks)
                whole_ns += process_ns
                front_ns += process_ns * any(word in command for word in _FRONT_PROCESSES)
    return Spent(whole_ns / 1e9, front_ns / 1e9)


async def stream(served: Served, seed: int) -> None:
    """Stream a turn's load."""
    vocabulary = vocab_size(model_directory("demo"))
    connections = [await HttpConnection.open(served.url) for _ in range(NUM_STREAMS)]
    for number in range(NUM_ROUNDS_OF_A_TURN):
        prompts = draw_prompts(seed * NUM_ROUNDS_OF_A_TURN + number, NUM_STREAMS, PROMPT_TOKENS, vocabulary)

        async def ask(connection: HttpConnection, prompt: list[int]) -> None:
            async for _ in connection.events(PATH, completion(prompt, OUTPUT_TOKENS)):
                pass

        await asyncio.gather(*(ask(one, prompt) for one, prompt in zip(connections, prompts, strict=True)))
    for connection in connections:
        connection.close()


async def scrape_forever(url: str) -> None:
    """Scrape as Prometheus does."""
    async with httpx.AsyncClient() as http:
        while True:
            (await http.get(f"{url}/metrics", timeout=10)).raise_for_status()
            await asyncio.sleep(SCRAPE_EVERY_S)


async def turn(served: Served, seed: int, *, is_watched: bool) -> Spent:
    """Stream a turn's load; return the microseconds of processor time of each token."""
    scraping = asyncio.create_task(scrape_forever(served.url)) if is_watched else None
    begin = spent_s(served)
    await stream(served, seed)
    end = spent_s(served)
    if scraping is not None:
        scraping.cancel()
    num_tokens = NUM_ROUNDS_OF_A_TURN * NUM_STREAMS * OUTPUT_TOKENS
    return Spent(1e6 * (end.whole - begin.whole) / num_tokens, 1e6 * (end.front - begin.front) / num_tokens)


@contextlib.contextmanager
def serving_with(level: str) -> Iterator[Served]:
    """Serve the demo model at a level of observability."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kvray.yaml"
        file.write_text(f"observability: {{level: {level}}}\nlog: {{level: warning}}\n")
        flags = ["--config", str(file), "--served-model-name", "bench", "--host-memory", "64MiB"]
        with serving(str(model_directory("demo")), *flags) as served:
            yield served


def cost_figures(num_turns: int) -> dict[str, list[Spent]]:
    """Have both services stream in turns, one of them first, then the other; microseconds of each token."""
    found: dict[str, list[Spent]] = {"on": [], "off": []}
    with serving_with("on") as on, serving_with("off") as off:
        services = {"on": on, "off": off}
        for number in range(num_turns + 1):
            for name in list(services)[:: -1 if number % 2 else 1]:
                cost_us = asyncio.run(turn(services[name], number, is_watched=name == "on"))
                if number > 0:  # the first turn warms up
                    found[name].append(cost_us)
            if number > 0:
                on_us, off_us = found["on"][-1], found["off"][-1]
                print(
                    f"  turn {number}: on {on_us.whole:.1f} us, of them {on_us.front:.2f} at ingress and router; "
                    f"off {off_us.whole:.1f}, {off_us.front:.2f}",
                    flush=True,
                )
    return found


def options() -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, "observability", quick="the scrape alone")
    made.add_argument("--turns", type=int, default=12, help="of each service")
    return made.parse_args()


def main() -> None:
    args = options()
    print(hardware())
    scrape = asyncio.run(scrape_figures(5 if args.quick else 15))
    print(
        f"scrape of {NUM_WORKERS} workers, {scrape['samples']} samples, {scrape['bytes'] / 2**20:.1f} MiB: "
        f"{median(scrape['clock_ms']):.1f} ms ({min(scrape['clock_ms']):.1f} to {max(scrape['clock_ms']):.1f}), "
        f"of the ingress's processor time {median(scrape['cpu_ms']):.1f} ms"
    )
    cost: dict[str, list[Spent]] = {"on": [], "off": []} if args.quick else cost_figures(args.turns)
    percent = None
    if cost["on"]:
        on, off = (Spent(*map(median, zip(*cost[name], strict=True))) for name in ("on", "off"))
        percent = 100 * (on.front - off.front) / off.whole
        pairs = sorted(
            100 * (one.front - other.front) / off.whole for one, other in zip(cost["on"], cost["off"], strict=True)
        )
        print(
            f"processor time of a token: on {on.whole:.1f} us, off {off.whole:.1f} us; at ingress and router "
            f"{on.front:.2f} and {off.front:.2f} us: {percent:+.2f} % of the whole "
            f"(turns {pairs[0]:+.1f} to {pairs[-1]:+.1f} %)"
        )
    if args.record:
        record("observability", {"scrape": scrape, "token_us": cost})
    print()
    print(goal(f"scrape of {NUM_WORKERS} workers", median(scrape["clock_ms"]), under=MAX_SCRAPE_MS, unit=" ms"))
    print(goal("observability, of a token's processor time", percent, under=MAX_COST_PERCENT, unit=" %"))


if __name__ == "__main__":
    main()
