"""What a streamed token costs an ingress: processor time of its process alone, while the whole service streams.

Both services are up, and take turns: whoever streams has the machine. And what a long text costs it: memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import httpx
import psutil

from harness.http_client import HttpConnection
from harness.prompts import draw_prompts
from harness.serving import Served

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 128
TEXT_BYTES = (768 << 10, 8 << 20)  #: what `/tokenize` takes by default, and what it does not
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
    schedules = [path for pid in _ingresses(served) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(schedule.read_text().split()[0]) for schedule in schedules) / 1e9


def tokenizing_mib(served: Served) -> float:
    """Have texts tokenized, or refused; return the MiB by which an ingress grows at its peak, the most of them."""
    grown_kib = 0
    for num_bytes in TEXT_BYTES:
        before = {pid: _memory_kib(pid, "VmRSS") for pid in _ingresses(served)}
        for pid in before:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # its peak is what it has now
        body = {
            "model": "bench",
            "prompt": ("It was a quiet morning, and nobody spoke. " * (num_bytes // 32))[:num_bytes],
        }
        status = httpx.post(f"{served.url}/tokenize", json=body, timeout=60).status_code
        assert status in (200, 413), f"/tokenize of {num_bytes} bytes: got status {status}"
        grown_kib = max(grown_kib, *(_memory_kib(pid, "VmHWM") - kib for pid, kib in before.items()))
    return grown_kib / 1024


def _memory_kib(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _ingresses(served: Served) -> Iterator[int]:
    """Yield the ids of the processes that are ingresses."""
    for process in psutil.Process(served.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and "Ingress" in words[0]:
            yield process.pid
