"""A process with many peers on loopback: what each takes of it, where it connects to them and where they connect to it.

As a script it is the process that they connect to: it says its address, then, for each line that comes in, how many
peers it has, its memory in bytes, and its processor time in seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import psutil

from messages.fleet import GetStats, Stats
from messages.wire import Message
from transport.channel import ChannelClient, ChannelServer, PeerId
from transport.secret import ClusterSecret

_SECRET = ClusterSecret.from_hex("5c" * 32)
_IDLE_S = 3.0
_AT_ONCE = 100  #: peers that are connected to at a time: each handshake takes a millisecond of either end


def peers_figures(num_peers: int) -> dict[str, float]:
    """Connect to one process so many times; return what a peer takes at each end, and what is left when all are gone.

    Raises:
        AssertionError: one could not be connected to, or did not answer.
    """
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            return asyncio.run(_connect(process, num_peers))
        finally:
            process.kill()


async def _connect(process: subprocess.Popen[str], num_peers: int) -> dict[str, float]:
    assert process.stdout is not None
    address = json.loads(process.stdout.readline())["address"]
    me = psutil.Process()
    answered, lost = set[int](), list[str]()

    def client(number: int) -> ChannelClient:
        def take(_message: Message) -> None:
            answered.add(number)

        made = ChannelClient(_SECRET, address, take, lost.append)
        made.send(GetStats(query_id=str(number)))
        return made

    def all_are_told() -> bool:
        return len(answered) + len(lost) >= len(clients)

    clients = [client(0)]  # what is made once is made
    await _until(lambda: answered or lost)
    before, there_before, num_files = me.memory_info().rss, _ask(process), me.num_fds()
    begin_s = time.monotonic()
    while len(clients) <= num_peers:
        end = min(len(clients) + _AT_ONCE, num_peers + 1)
        clients += [client(number) for number in range(len(clients), end)]
        await _until(all_are_told)
    connecting_s = time.monotonic() - begin_s
    assert not lost, lost[0]
    cpu_s, idle_from_s = time.process_time(), time.monotonic()
    await asyncio.sleep(_IDLE_S)
    there = _ask(process)
    idle_s = time.monotonic() - idle_from_s
    figures = {
        "connected to, KiB each": (me.memory_info().rss - before) / num_peers / 1024,
        "connecting, KiB each": (there["rss"] - there_before["rss"]) / num_peers / 1024,
        "ms to connect, each": 1e3 * connecting_s / num_peers,
        "descriptors, each": (me.num_fds() - num_files) / num_peers,
        "share of a core for heartbeats": (time.process_time() - cpu_s) / idle_s,
    }
    assert there["num_peers"] == num_peers + 1
    for one in clients[1:]:
        one.close()
    end_s = time.monotonic() + 10
    await _until(lambda: me.num_fds() <= num_files or time.monotonic() > end_s)
    figures["descriptors left"] = me.num_fds() - num_files
    clients[0].close()
    return figures


async def _until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - nobody tells of descriptors
        await asyncio.sleep(0.001)


def _ask(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    found: dict[str, float] = json.loads(process.stdout.readline())
    return found


async def main() -> None:
    def answer(peer: PeerId, message: Message) -> None:
        if isinstance(message, GetStats):
            server.send(peer, Stats(query_id=message.query_id, worker_id="w", role="decode", values={}))

    server = ChannelServer(_SECRET, "127.0.0.1", answer, lambda _peer: None)
    sys.stdout.write(json.dumps({"address": server.address}) + "\n")
    sys.stdout.flush()
    me = psutil.Process(os.getpid())
    while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        told = {"num_peers": len(server.peers), "rss": me.memory_info().rss, "cpu_s": time.process_time()}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
