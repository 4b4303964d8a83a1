"""A process of simulated workers that tell their numbers, as many as a large fleet has, on loopback.

As a script it is that process: `told_fleet.py 200` says where each of them listens, as one line of JSON, and ends with
its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from cluster.fleet_metrics import HELP
from engine.scheduling.waits import QueueWaits
from messages.fleet import GetStats, Role, Stats, WorkerInfo
from messages.wire import Message
from transport.channel import ChannelServer, PeerId
from transport.secret import ClusterSecret

SECRET = ClusterSecret.from_hex("5d" * 32)
_ROADS = ("shm", "ucx", "socket", "plasma")
#: Of labels that workers put on their numbers, the values that each of these families has.
_LABELS = {
    "kvray_worker_prompt_tokens_total": [
        f'source="{one}"' for one in ("device", "peer", "host", "disk", "remote", "computed")
    ],
    "kvray_blocks_rejected_total": [f'reason="{one}"' for one in ("generation", "name", "checksum", "missing")],
    "kvray_evictions_total": [f'tier="device",reason="{one}"' for one in ("spare", "room")],
    "kvray_transfer_bytes_total": [f'road="{road}"' for road in _ROADS],
    "kvray_transfer_seconds_total": [f'road="{road}"' for road in _ROADS],
    "kvray_transfers_failed_total": [f'road="{road}"' for road in _ROADS],
    "kvray_peers": ['road="shm",carriers="memcpy"', 'road="ucx",carriers="tcp"'],
}
#: What no worker tells, but others.
_OTHERS = (
    "kvray_router",
    "kvray_cache_",
    "kvray_disk",
    "kvray_remote",
    "kvray_canary",
    "kvray_fleet",
    "kvray_requests",
)


def worker_values(number: int) -> dict[str, float]:
    """Return numbers as a worker tells them: every family that one may have, with digits that differ by worker."""
    values = QueueWaits().stats()
    for name in HELP:
        if not name.startswith(_OTHERS) and name != "kvray_queue_seconds":
            for place, labels in enumerate(_LABELS.get(name, [""])):
                values[f"{name}{{{labels}}}" if labels else name] = 1e6 / 7 + 1000.0 * number + place
    return values


@contextlib.contextmanager
def told_fleet(num_workers: int) -> Iterator[list[WorkerInfo]]:
    """Run simulated workers until the block ends."""
    with subprocess.Popen(
        [sys.executable, __file__, str(num_workers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield [_info(number, address) for number, address in enumerate(json.loads(process.stdout.readline()))]
        finally:
            process.kill()


def _role(number: int) -> Role:
    return "prefill" if number % 2 else "decode"


def _info(number: int, address: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=f"{_role(number)}-{number:08x}",
        role=_role(number),
        address=address,
        node_id=f"node-{number // 8}",
        fingerprint=b"f" * 16,
        block_size=16,
        num_blocks=10_000,
        block_bytes=2**20,
        max_model_len=131072,
        max_num_seqs=256,
        roads=_ROADS,
    )


def _teller(number: int) -> ChannelServer:
    worker_id, values = f"{_role(number)}-{number:08x}", worker_values(number)

    def answer(peer: PeerId, message: Message) -> None:
        if isinstance(message, GetStats):
            told = Stats(query_id=message.query_id, worker_id=worker_id, role=_role(number), values=values)
            server.send(peer, told)

    server = ChannelServer(SECRET, "127.0.0.1", answer, lambda _peer: None)
    return server


async def main() -> None:
    servers = [_teller(number) for number in range(int(sys.argv[1]))]
    sys.stdout.write(json.dumps([server.address for server in servers]) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main())
