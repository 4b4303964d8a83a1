"""What a streamed token costs an ingress: processor time of its process alone, while the whole service streams.

Both services are up, and take turns: whoever streams has the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import psutil

from harness.http_client import HttpConnection
from harness.prompts import draw_prompts
from harness.serving import Served

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 128
PATHS = ("/v1/completions", "/v1/chat/completions")


async def tokens_per_core_s(
    services: Mapping[str, Served], num_streams: int, vocab_size: int, *, repeats: int
) -> dict[str, float]:
    """Return, for each of `services`, how many tokens a second one core streams: the median round.

    Plain streams as clients ask for them, by turns text completions and chats; the first round of each warms it up.
    """
    rates: dict[str, list[float]] = {name: [] for name in services}
    for number in range(repeats + 1):
        for name, served in services.items():
            connections = [await HttpConnection.open(served.url) for _ in range(num_streams)]
            prompts = draw_prompts(10_000 * num_streams + number, num_streams, PROMPT_TOKENS, vocab_size)
            begin_s = _cpu_s(served)
            await asyncio.gather(
                *(_stream(one, number, prompt) for one, prompt in zip(connections, prompts, strict=True))
            )
            if number > 0:
                rates[name].append(num_streams * OUTPUT_TOKENS / (_cpu_s(served) - begin_s))
            for connection in connections:
                connection.close()
    return {name: median(found) for name, found in rates.items()}


async def _stream(connection: HttpConnection, number: int, prompt: Sequence[int]) -> None:
    path = PATHS[number % len(PATHS)]
    asked = {"prompt": prompt} if path == PATHS[0] else {"messages": [{"role": "user", "content": f"Say {prompt}"}]}
    fields = {
        "model": "bench",
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    num_tokens = 0
    async for event in connection.events(path, fields | asked):
        num_tokens = (event.get("usage") or {}).get("completion_tokens", 0)
    assert num_tokens == OUTPUT_TOKENS


def _cpu_s(served: Served) -> float:
    """Return the processor time of all ingresses so far, to the nanosecond: `times()` counts hundredths of a second."""
    total_ns = 0
    for process in psutil.Process(served.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and "Ingress" in words[0]:
            for schedule in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                total_ns += int(schedule.read_text().split()[0])
    return total_ns / 1e9
