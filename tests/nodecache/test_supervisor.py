"""The node cache as a process of its own: killed, stopped, refused, adopted by its successor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import transport.memory
from kvcache.locations import num_locations
from messages.errors import ConfigError
from messages.fleet import WorkerInfo
from nodecache.process import Start, Started
from nodecache.supervisor import Supervisor
from tests.nodecache.blocks import content_of, names_of
from tests.nodecache.client import CacheClient, CacheLostError
from tests.nodecache.test_process import BLOCK_BYTES, options_of
from transport.secret import ClusterSecret

ROOT = Path(__file__).parents[2]


class World:
    """A supervised node cache, and who serves there now."""

    def __init__(self, num_blocks: int, **limits) -> None:
        self.secret = ClusterSecret.generate()
        self.infos: list[WorkerInfo] = []
        self.is_up = asyncio.Condition()
        self.supervisor = Supervisor(options_of(num_blocks, **limits), self.secret, self._on_up)
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, on_step=lambda: None) -> CacheClient:
        """Connect to the process that serves, or to the next one."""
        while True:
            async with self.is_up:
                await self.is_up.wait_for(lambda: self.supervisor.info is not None)
            client = CacheClient(self.secret, self.infos[-1].address, BLOCK_BYTES, on_step)
            try:
                await client.open()
            except CacheLostError:
                client.close()
            else:
                return client

    async def wait_for(self, num_processes: int) -> None:
        async with asyncio.timeout(60), self.is_up:
            await self.is_up.wait_for(lambda: len(self.infos) >= num_processes)

    def _on_up(self, info: WorkerInfo) -> None:
        self.infos.append(info)
        self._tasks.append(asyncio.get_running_loop().create_task(self._tell()))

    async def _tell(self) -> None:
        async with self.is_up:
            self.is_up.notify_all()


@pytest.fixture
async def world():
    async with contextlib.AsyncExitStack() as stack:

        async def make(num_blocks=64, **limits):
            made = World(num_blocks, **limits)
            stack.push_async_callback(made.supervisor.close)
            await made.supervisor.start()
            return made

        yield make


@pytest.mark.slow
async def test_a_killed_process_is_followed_by_one_that_has_its_blocks(world):
    made = await world()
    client = await made.open()
    names = names_of(range(16))
    assert await client.write(names) == names
    granted = await client.room(names_of(range(100, 110)))
    await client.offers("held", names)
    os.kill(made.supervisor.pid, signal.SIGKILL)
    await client.lost.wait()
    await made.wait_for(2)
    heir = await made.open()
    assert made.infos[0].worker_id != made.infos[1].worker_id
    values = await heir.stats()
    assert values["kvray_cache_blocks_adopted"] == 16
    assert values["kvray_blocks_quarantined"] == num_locations(granted.blocks) == 10
    assert values["kvray_blocks_pinned"] == 0
    assert await heir.fetch(names) == {name: content_of(name, BLOCK_BYTES) for name in names}
    assert not client.arena.is_current()  # who had mapped it before finds out
    for opened in (client, heir):
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [6, pytest.param(20, marks=pytest.mark.long)])
async def test_killed_many_times_under_load_no_wrong_byte_counts_and_nothing_committed_is_lost(world, num_kills):
    """Two writers and readers, SIGKILL between any two of their steps; the arena has room for all they write."""
    made = await world(4096, quarantine_s=0.5)
    rng = random.Random(20261128)
    fuse = [rng.randrange(200, 2000)]
    confirmed: set[bytes] = set()
    num_wrong = num_right = 0

    def on_step() -> None:
        fuse[0] -= 1
        if fuse[0] <= 0 and made.supervisor.info is not None:
            fuse[0] = rng.randrange(200, 2000)
            os.kill(made.supervisor.pid, signal.SIGKILL)

    async def work(which: str) -> None:
        nonlocal num_wrong, num_right
        number = 0
        while len(made.infos) <= num_kills:
            client = await made.open(on_step)
            with contextlib.suppress(CacheLostError):
                while not client.lost.is_set():
                    fresh = names_of(range(number, number + 8), which)
                    number = (number + 8) % 800
                    confirmed.update(await client.write(fresh, number))
                    some = rng.sample(sorted(confirmed), min(20, len(confirmed)))
                    arrived = await client.fetch([*some, *fresh])
                    for name, data in arrived.items():
                        num_wrong += data != content_of(name, BLOCK_BYTES)
                        num_right += 1
                    assert confirmed.issuperset(some)
                    assert client.lost.is_set() or arrived.keys() >= set(some)
            client.close()

    await asyncio.gather(work("one"), work("two"))
    client = await made.open()
    arrived = await client.fetch(sorted(confirmed))
    assert arrived == {name: content_of(name, BLOCK_BYTES) for name in confirmed}
    assert num_wrong == 0
    assert num_right > 50 * num_kills
    assert len(made.infos) > num_kills
    assert (await client.stats())["kvray_blocks_pinned"] == 0
    client.close()


@pytest.mark.slow
async def test_a_process_that_stands_still_is_replaced(world):
    made = await world()
    client = await made.open()
    names = names_of(range(16))
    await client.write(names)
    pid = made.supervisor.pid
    os.kill(pid, signal.SIGSTOP)
    await made.wait_for(2)
    assert made.supervisor.pid != pid
    assert made.supervisor.num_restarts == 1
    heir = await made.open()
    assert await heir.fetch(names) == {name: content_of(name, BLOCK_BYTES) for name in names}
    for opened in (client, heir):
        opened.close()


async def test_an_arena_that_is_too_large_is_a_config_error_that_says_how_much_there_is(monkeypatch):
    monkeypatch.setattr(transport.memory, "available_bytes", lambda: 1 << 20)
    supervisor = Supervisor(options_of(1024), ClusterSecret.generate())
    with pytest.raises(ConfigError, match="1,048,576 bytes are available"):
        await supervisor.start()
    assert supervisor.pid is None


@pytest.mark.slow
async def test_what_the_process_cannot_start_with_is_a_config_error_here():
    options = msgspec.structs.replace(options_of(16), host="1.2.3.4")
    supervisor = Supervisor(options, ClusterSecret.generate())
    with pytest.raises(ConfigError, match=r"1\.2\.3\.4"):
        await supervisor.start()
    assert supervisor.pid is None


@pytest.mark.slow
async def test_closed_in_order_it_leaves_nothing(world):
    made = await world()
    pid = made.supervisor.pid
    await made.supervisor.close()
    assert made.supervisor.info is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


_SUPERVISING = """
import asyncio, msgspec, sys
from nodecache.process import Start
from nodecache.supervisor import Supervisor
from transport.secret import ClusterSecret
async def main():
    start = msgspec.json.decode(sys.stdin.readline(), type=Start)
    supervisor = Supervisor(start.options, ClusterSecret.from_hex(start.secret))
    await supervisor.start()
    print(supervisor.pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


@pytest.mark.slow
def test_it_ends_with_its_supervisor_and_shows_its_secret_to_nobody():
    secret = ClusterSecret.generate().hex()
    start = Start(options=options_of(16), secret=secret, arena_fd=0)
    supervising = subprocess.Popen(
        [sys.executable, "-c", _SUPERVISING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    supervising.stdin.write(msgspec.json.encode(start) + b"\n")
    supervising.stdin.flush()
    pid = int(supervising.stdout.readline())
    shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert secret.encode() not in shown
    ended = os.pidfd_open(pid)
    supervising.kill()
    supervising.communicate()
    assert _has_ended(ended, 20)


def _has_ended(pidfd: int, timeout_s: float) -> bool:
    import select

    return bool(select.select([pidfd], [], [], timeout_s)[0])


@pytest.mark.slow
def test_the_process_alone_says_what_it_was_started_wrongly_with(tmp_path):
    with (tmp_path / "no arena").open("wb") as file:
        start = Start(options=options_of(16), secret=ClusterSecret.generate().hex(), arena_fd=file.fileno())
        done = subprocess.run(
            [sys.executable, "-m", "nodecache"],
            input=msgspec.json.encode(start) + b"\n",
            stdout=subprocess.PIPE,
            pass_fds=[file.fileno()],
            cwd=ROOT,
            check=False,
        )
    started = msgspec.json.decode(done.stdout, type=Started)
    assert done.returncode == 2
    assert started.error is not None
    assert "is not the memory wanted" in started.error.message
