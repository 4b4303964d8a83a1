"""A prefill and a decode worker in processes of their own on two hosts, joined by a slow cable; all that can fail does.

Whatever happens, every request ends soon, with the tokens that plain transformers gives, and no block stays pinned.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import time

import pytest

from tests.harness import ROOT, harness_workers
from tests.hosts import two_hosts
from tests.workers import BLOCK_BYTES, SECRET, Ingress, worker_options
from transport.channel import ChannelConfig
from transport.opening import RoadOptions

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

FAULTY = ROOT / "tests" / "faulty_worker.py"
STALL_S = 1.0
LEASE_S = 2.0
CHANNEL = ChannelConfig(heartbeat_s=0.2, lost_after_s=2.0)
#: No progress, the heartbeat's silence, computing instead, and a busy machine.
BOUND_S = 15.0
PROMPT_TOKENS = 700  #: 44 blocks
RATE = "4mbit"  #: of the cable: the pull of a prompt takes more than a second


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as pair:
        yield pair


@pytest.fixture(params=["ucx", pytest.param("socket", marks=pytest.mark.long)])
def road(request):
    if request.param == "ucx":
        pytest.importorskip("ucxx", reason="ucxx is not installed: no UCX road")
    return request.param


class Cluster:
    """Both processes, an ingress at the decode worker, and what was asked so far."""

    def __init__(self, prefill, decode, hosts, reference, restart) -> None:
        self.prefill, self.decode, self.hosts, self.reference = prefill, decode, hosts, reference
        self.restart_prefill = restart
        self.ingress = Ingress(decode.info, prefill.info)
        self._rng = random.Random(7)
        self.num_asked = 0

    def prompt(self, num_tokens: int = PROMPT_TOKENS) -> list[int]:
        return [self._rng.randrange(5, 250) for _ in range(num_tokens)]

    def ask(self, prompt: list[int], max_tokens: int = 12):
        self.num_asked += 1
        return self.ingress.send(f"r{self.num_asked}", prompt, max_tokens=max_tokens)

    async def check(self, *prompts: list[int], max_tokens: int = 12) -> None:
        """Ask all at once; every answer is right and comes in time."""
        answers = [self.ask(prompt, max_tokens) for prompt in prompts]
        got = await self.ingress.finish(*answers, timeout_s=BOUND_S)
        # in a thread: the channel's heartbeat goes on
        expected = await asyncio.to_thread(lambda: [self.reference.greedy(prompt, max_tokens) for prompt in prompts])
        assert got == expected

    async def pulling(self) -> None:
        """Until bytes are on their way: the cable is slow, so this is the middle of a pull."""
        for _ in range(500):
            stats = await self.ingress.stats()
            if stats["kvray_pulls_running"] > 0:
                await asyncio.sleep(0.15)
                return
            await asyncio.sleep(0.01)
        pytest.fail("no pull began")

    def slow_down(self) -> None:
        """The cable, so that a pull has a middle."""
        self.hosts[0].set_rate(RATE)

    def speed_up(self) -> None:
        self.hosts[0].set_rate(None)

    async def comes_back(self) -> None:
        """The road is taken again, after its back-off and a probe."""
        before = await self.pulled_bytes()
        ends_s = time.monotonic() + BOUND_S
        while await self.pulled_bytes() == before:
            assert time.monotonic() < ends_s, "the road did not come back"
            await self.check(self.prompt())
            await asyncio.sleep(0.3)

    async def idle(self) -> None:
        """Both workers hold nothing any more."""
        sides = [self.ingress, Ingress(self.prefill.info, None)]
        ends_s = time.monotonic() + BOUND_S
        held: list[float] = [1.0]
        while any(held):
            assert time.monotonic() < ends_s, f"blocks pinned or quarantined: {held}"
            await asyncio.sleep(0.1)
            numbers = [await side.stats() for side in sides]
            held = [n[key] for n in numbers for key in ("kvray_blocks_pinned", "kvray_blocks_quarantined")]
        sides[1].client.close()

    async def pulled_bytes(self) -> float:
        stats = await self.ingress.stats()
        return sum(value for name, value in stats.items() if name.startswith("kvray_transfer_bytes_total"))

    async def rejected(self) -> float:
        stats = await self.ingress.stats()
        return sum(value for name, value in stats.items() if name.startswith("kvray_blocks_rejected_total"))


@contextlib.asynccontextmanager
async def cluster(model_dir, hosts, road, reference, *, prefill_fault: str = ""):
    running_worker = harness_workers().running_worker
    a, b = hosts
    options = {
        "stall_s": STALL_S,
        "lease_s": LEASE_S,
        "roads": RoadOptions(names=(road,)),
        "max_model_len": 1024,
        "channel": CHANNEL,
    }
    prefill_options = worker_options(model_dir, **options)
    script = {"script": (str(FAULTY), prefill_fault)} if prefill_fault else {}
    with contextlib.ExitStack() as stack:

        def start_prefill():
            return stack.enter_context(
                running_worker("prefill", prefill_options, SECRET, host=a.address, prefix=a.prefix, **script)
            )

        def start_decode():
            decode_options = worker_options(model_dir, **options, kv_cache_bytes=70 * BLOCK_BYTES)
            return stack.enter_context(
                running_worker("decode", decode_options, SECRET, host=b.address, prefix=b.prefix)
            )

        prefill, decode = await asyncio.gather(asyncio.to_thread(start_prefill), asyncio.to_thread(start_decode))
        made = Cluster(prefill, decode, hosts, reference, start_prefill)
        try:
            if not prefill_fault:
                await made.check(made.prompt(64))  # roads are probed
                await asyncio.sleep(0.5)
            yield made
            await made.idle()
        finally:
            made.ingress.client.close()
            with contextlib.suppress(subprocess.CalledProcessError):
                a.set_rate(None)


async def test_whatever_is_lost_in_the_middle_of_a_pull_every_answer_is_right(model_dir, hosts, road, reference):
    """One cluster, and one thing after the other: starting it takes longer than all of them."""
    async with cluster(model_dir, hosts, road, reference) as made:
        await many_at_once_into_few_blocks(made)
        await a_client_leaves(made)
        await the_prefill_worker_stops_and_goes_on(made)
        await the_cable_is_out_and_in_again(made)
        await the_prefill_worker_is_killed_and_restarted(made)


async def many_at_once_into_few_blocks(made: Cluster) -> None:
    before = await made.pulled_bytes()
    await made.check(*(made.prompt() for _ in range(6)))
    assert await made.pulled_bytes() > before
    assert await made.rejected() == 0


async def a_client_leaves(made: Cluster) -> None:
    made.slow_down()
    made.ask(made.prompt())
    await made.pulling()
    made.ingress.cancel(f"r{made.num_asked}")
    made.speed_up()
    await made.idle()
    await made.comes_back()  # what was left in the middle may have been taken for a stall


async def the_prefill_worker_stops_and_goes_on(made: Cluster) -> None:
    made.slow_down()
    checking = asyncio.create_task(made.check(made.prompt(), made.prompt()))
    await made.pulling()
    made.prefill.process.send_signal(signal.SIGSTOP)
    await checking
    made.speed_up()
    # It goes on, and sends what it had begun: into blocks that are others' by now.
    prompts = [made.prompt() for _ in range(4)]
    checking = asyncio.create_task(made.check(*prompts, max_tokens=60))
    await asyncio.sleep(0.1)
    made.prefill.process.send_signal(signal.SIGCONT)
    await checking
    await made.comes_back()


async def the_cable_is_out_and_in_again(made: Cluster) -> None:
    made.slow_down()
    checking = asyncio.create_task(made.check(made.prompt(), made.prompt()))
    await made.pulling()
    made.hosts[1].set_link("down")
    try:
        await checking
        await made.check(made.prompt())
    finally:
        made.hosts[1].set_link("up")
    made.speed_up()
    await made.comes_back()


async def the_prefill_worker_is_killed_and_restarted(made: Cluster) -> None:
    made.slow_down()
    checking = asyncio.create_task(made.check(made.prompt(), made.prompt()))
    await made.pulling()
    made.prefill.process.send_signal(signal.SIGKILL)
    await checking
    made.speed_up()
    made.prefill = await asyncio.to_thread(made.restart_prefill)
    made.ingress.prefill = made.prefill.info
    await made.comes_back()


@pytest.mark.parametrize(
    ("road", "fault"),
    [
        pytest.param("ucx", "damage", marks=pytest.mark.long),
        ("ucx", "truncate"),
        pytest.param("socket", "damage", marks=pytest.mark.long),
    ],
)
async def test_a_payload_that_is_not_what_was_published_is_not_used(model_dir, hosts, road, fault, reference):
    """A truncated stream of the socket road is a closed one: tests/transport/socket/test_socket.py."""
    if road == "ucx":
        pytest.importorskip("ucxx", reason="ucxx is not installed: no UCX road")
    async with cluster(model_dir, hosts, road, reference, prefill_fault=fault) as made:
        for _ in range(3):
            await made.check(made.prompt(), made.prompt())
            await asyncio.sleep(0.5)
        assert await made.rejected() > 0
