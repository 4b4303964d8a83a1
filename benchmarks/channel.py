"""The channel between processes beside a plain TCP stream: round trips, messages and tokens per second.

    python benchmarks/channel.py                on asyncio and on uvloop
    python benchmarks/channel.py --quick        fewer rounds, within 60 s
    python benchmarks/channel.py --record       also append to benchmarks/results/channel.jsonl

Client and server are two processes on loopback. A round trip is a small question and its answer, one at a time. The
stream is what a decode worker sends: one TokenBatch per step, here 32 sequences with a token each, as fast as it goes.
The peer, plain TCP with length-prefixed msgspec documents over asyncio streams, neither authenticates nor encrypts.
Goals: round trip under 0.3 ms (median), at least 100,000 tokens/s through one channel.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from statistics import median, quantiles
from typing import Any, TypeVar

import uvloop
from harness.report import ROOT, goal, hardware, parser, record

from messages.fleet import GetStats, Stats
from messages.stream import TokenBatch, TokenChunk
from messages.wire import Message, decode, encode
from transport.channel import ChannelClient, ChannelServer
from transport.secret import ClusterSecret

SECRET = ClusterSecret(b"\x01" * 32)
NUM_SEQUENCES = 32
MAX_ROUND_TRIP_MS = 0.3
MIN_TOKENS_PER_S = 100_000
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

T = TypeVar("T")
Send = Callable[[Message], Awaitable[None]]
Exchange = tuple[Send, "asyncio.Queue[Message]"]


def on_loop(name: str, main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on the event loop of that name."""
    with asyncio.Runner(loop_factory=LOOPS[name]) as runner:
        return runner.run(main)


# ------------------------------------------------------------------------------------------------------- the other side


async def answer(message: Message, send: Send) -> None:
    """Answer a question: "7" with one message, "stream 7" with seven batches of tokens."""
    assert isinstance(message, GetStats)
    if not message.query_id.startswith("stream"):
        await send(Stats(query_id=message.query_id, worker_id="w", role="decode", values={"kvray_blocks": 1.0}))
        return
    chunks = [TokenChunk(request_id=f"chatcmpl-0123456789abcdef-{i}", token_ids=[i]) for i in range(NUM_SEQUENCES)]
    for number in range(int(message.query_id.split()[1])):
        await send(TokenBatch(chunks=chunks))
        if number % 100 == 99:  # a step takes longer than this: let the loop breathe
            await asyncio.sleep(0)


async def serve_channel() -> None:
    tasks = set()

    def on_message(peer: bytes, message: Message) -> None:
        async def send(answer: Message) -> None:
            while not server.send(peer, answer):
                raise ConnectionError("the measuring side is gone")

        task = asyncio.ensure_future(answer(message, send))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = ChannelServer(SECRET, "127.0.0.1", on_message, lambda _: None)
    print(server.address, flush=True)
    await asyncio.Event().wait()


async def serve_tcp() -> None:
    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(message: Message) -> None:
            await write_document(writer, message)

        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await answer(await read_document(reader), send)

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


async def read_document(reader: asyncio.StreamReader) -> Message:
    length = int.from_bytes(await reader.readexactly(4), "big")
    return decode(await reader.readexactly(length))


async def write_document(writer: asyncio.StreamWriter, message: Message) -> None:
    document = encode(message)
    writer.write(len(document).to_bytes(4, "big") + document)
    await writer.drain()


# --------------------------------------------------------------------------------------------------- the measuring side


@contextlib.asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[Exchange]:
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    client = ChannelClient(SECRET, address, inbox.put_nowait, lambda reason: sys.exit(f"channel lost: {reason}"))

    async def send(message: Message) -> None:
        client.send(message)

    yield send, inbox
    client.close()


@contextlib.asynccontextmanager
async def tcp_to(port: str) -> AsyncIterator[Exchange]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    inbox: asyncio.Queue[Message] = asyncio.Queue()

    async def receive() -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                inbox.put_nowait(await read_document(reader))

    task = asyncio.create_task(receive())
    yield lambda message: write_document(writer, message), inbox
    task.cancel()
    writer.close()


ROADS = {"channel": (serve_channel, channel_to), "tcp": (serve_tcp, tcp_to)}


async def measure(road: str, address: str, *, num_rounds: int, num_batches: int) -> dict[str, float]:
    async with ROADS[road][1](address) as (send, inbox):
        seconds = []
        for number in range(num_rounds + 100):
            started = time.perf_counter()
            await send(GetStats(query_id=str(number)))
            await inbox.get()
            seconds.append(time.perf_counter() - started)
        seconds = seconds[100:]
        rates = []
        for _ in range(3):
            started = time.perf_counter()
            await send(GetStats(query_id=f"stream {num_batches}"))
            for _ in range(num_batches):
                await inbox.get()
            rates.append(num_batches / (time.perf_counter() - started))
    return {
        "round_trip_p50_ms": 1e3 * median(seconds),
        "round_trip_p99_ms": 1e3 * quantiles(seconds, n=100)[98],
        "messages_per_s": median(rates),
        "tokens_per_s": NUM_SEQUENCES * median(rates),
    }


@contextlib.contextmanager
def server_process(road: str, loop: str) -> Any:
    """Run a server in a process of its own until the block ends; gives its address."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", road, "--loop", loop],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    options = parser(__doc__, "channel", quick="fewer rounds")
    options.add_argument("--serve", choices=list(ROADS), help=argparse.SUPPRESS)
    options.add_argument("--loop", choices=list(LOOPS), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.serve:
        on_loop(args.loop, ROADS[args.serve][0]())
        return
    num_rounds, num_batches = (2000, 2000) if args.quick else (20_000, 9_000)
    results = {}
    print(f"{hardware()}\n{'':20}{'p50 ms':>9}{'p99 ms':>9}{'messages/s':>13}{'tokens/s':>13}")
    for loop in LOOPS:
        for road in ROADS:
            with server_process(road, loop) as address:
                figures = on_loop(loop, measure(road, address, num_rounds=num_rounds, num_batches=num_batches))
            results[f"{road} on {loop}"] = figures
            p50, p99, messages, tokens = figures.values()
            print(f"{road + ' on ' + loop:20}{p50:9.3f}{p99:9.3f}{messages:13,.0f}{tokens:13,.0f}", flush=True)
    if args.record:
        record("channel", results)
    for loop in LOOPS:
        figures = results[f"channel on {loop}"]
        p50, tokens = figures["round_trip_p50_ms"], figures["tokens_per_s"]
        print(goal(f"round trip on {loop}", p50, under=MAX_ROUND_TRIP_MS, unit=" ms"))
        print(goal(f"tokens/s on {loop}", tokens, at_least=MIN_TOKENS_PER_S))


if __name__ == "__main__":
    main()
