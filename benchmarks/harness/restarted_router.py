"""A router that comes to workers which hold a lot: until it is in step, and the longest turn of its loop meanwhile.

As a script it is the process that plays the workers, over real channels.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))  # after it: files there are named like rooms

import msgspec

from harness.turn_loop import TurnLoop
from kvcache.subscribers import Subscribers
from kvrouter.worker import RouterWorker
from messages.fleet import LoadReport, Subscribe, WorkerInfo
from messages.wire import Message
from transport.channel import ChannelServer
from transport.secret import ClusterSecret

_SECRET = ClusterSecret.from_hex("5c" * 32)
_NAME_BYTES = 16
_SHARED = 10  #: one in so many names is held by all
_GIVE_UP_S = 60.0


class PlayedWorker:
    """Answers Subscribe as a worker does."""

    def __init__(self, number: int, shared: bytes, num_blocks: int) -> None:
        own = random.Random(number).randbytes(_NAME_BYTES * num_blocks - len(shared))
        self._snapshot = shared + own
        self._server = ChannelServer(_SECRET, "127.0.0.1", self._on_message, self._on_lost)
        self.info = WorkerInfo(
            worker_id=f"w{number}",
            role="decode",
            address=self._server.address,
            node_id=f"n{number}",
            fingerprint=b"f",
            block_size=16,
            num_blocks=num_blocks,
            block_bytes=100_000,
            max_model_len=200_000,
            max_num_seqs=256,
            roads=("shm", "ucx", "socket"),
        )
        self._subscribers = Subscribers(self.info.worker_id, self._server.send)

    def _on_message(self, sender: bytes, message: Message) -> None:
        if isinstance(message, Subscribe):
            self._subscribers.add(sender, [("device", self._snapshot)])
            report = LoadReport(
                worker_id=self.info.worker_id,
                queued_s=0.0,
                num_waiting=0,
                num_running=0,
                free_blocks=0,
                decode_step_s=0.02,
            )
            self._server.send(sender, report)

    def _on_lost(self, sender: bytes) -> None:
        self._subscribers.remove(sender)


def restart_ms(num_workers: int, num_blocks: int) -> dict[str, float]:
    """Bring a router to workers of another process; return the milliseconds until it is in step, and of a turn."""
    with _played(num_workers, num_blocks) as infos, asyncio.Runner(loop_factory=TurnLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, TurnLoop)
        in_step_s = runner.run(_until_in_step(infos, num_blocks))
        return {"in step": 1e3 * in_step_s, "longest turn": loop.longest_ms}


async def _until_in_step(infos: list[WorkerInfo], num_blocks: int) -> float:
    begin_s = time.perf_counter()
    router = RouterWorker("router", _SECRET, "127.0.0.1")
    router.set_fleet(infos)
    num_names = len(infos) * (num_blocks - num_blocks // _SHARED) + num_blocks // _SHARED
    try:
        async with asyncio.timeout(_GIVE_UP_S):
            while True:
                stats = router.router.stats()
                is_in_step = stats["kvray_router_workers_out_of_step"] == 0
                if is_in_step and stats["kvray_router_index_names"] == num_names:
                    return time.perf_counter() - begin_s
                await asyncio.sleep(0.01)
    except TimeoutError:
        return _GIVE_UP_S
    finally:
        router.close()


@contextmanager
def _played(num_workers: int, num_blocks: int) -> Iterator[list[WorkerInfo]]:
    command = [sys.executable, __file__, str(num_workers), str(num_blocks)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield msgspec.json.decode(process.stdout.readline(), type=list[WorkerInfo])
    finally:
        process.stdin.close()  # which ends it
        process.wait()


async def _play(num_workers: int, num_blocks: int) -> None:
    shared = random.Random(num_workers).randbytes(_NAME_BYTES * (num_blocks // _SHARED))
    workers = [PlayedWorker(number, shared, num_blocks) for number in range(num_workers)]
    print(json.dumps(msgspec.to_builtins([worker.info for worker in workers])), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_play(int(sys.argv[1]), int(sys.argv[2])))
