"""What an EngineWorker tells whoever connects: snapshots and numbered events, loads, regions, numbers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import asynccontextmanager

import pytest

from engine.scheduling.plan import EmitTokens, Instruction, SequenceAdded, SequenceSpec
from engine.worker import EngineWorker
from kvcache.locations import each_location
from kvcache.names import split_names
from messages.errors import InvariantError
from messages.fleet import (
    GetStats,
    KvEvents,
    LoadReport,
    NodeCacheFound,
    SpareBlocks,
    Stats,
    Subscribe,
    TakeBlocks,
)
from messages.handoff import BlocksRequest, DescribeRegions, KvHandoff, RegionsDescribed, ReleaseLease
from messages.request import CancelRequest, Copy, SamplingParams
from messages.wire import Message
from tests.workers import CHANNEL, SECRET, until, worker_options
from transport.channel import ChannelClient

BLOCK_BYTES = 16384  #: of the tiny model

pytestmark = pytest.mark.usefixtures("one_thread")


class Role:
    """Takes note of what it is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.senders: list[bytes] = []
        self.lost: list[bytes] = []
        self.ended: list[str] = []

    def on_message(self, sender: bytes, message: Message) -> None:
        self.senders.append(sender)
        self.messages.append(message)

    def on_sender_lost(self, sender: bytes) -> None:
        self.lost.append(sender)

    def on_instructions(self, instructions: Sequence[Instruction]) -> None:
        self.ended += [item.seq_id for item in instructions if isinstance(item, EmitTokens) and item.finish_reason]

    def stats(self) -> dict[str, float]:
        return {"kvray_streams": 7.0}


class Caller:
    """Someone who connected, and what came."""

    def __init__(self, address: str) -> None:
        self.got: list[Message] = []
        self.client = ChannelClient(SECRET, address, self.got.append, lambda _: None, config=CHANNEL)

    def of(self, kind: type) -> list:
        return [message for message in self.got if isinstance(message, kind)]

    async def subscribe(self) -> None:
        num_snapshots = sum(message.cleared for message in self.of(KvEvents))
        self.client.send(Subscribe())
        await until(lambda: sum(message.cleared for message in self.of(KvEvents)) > num_snapshots)


class Setting:
    def __init__(self, worker: EngineWorker, role: Role, info) -> None:
        self.worker, self.role, self.info = worker, role, info
        self.callers: list[Caller] = []

    def caller(self) -> Caller:
        self.callers.append(Caller(self.info.address))
        return self.callers[-1]

    async def run(self, seq_id: str, first_token: int) -> None:
        """Compute a prompt of three blocks."""
        prompt = list(range(first_token, first_token + 48))
        params = SamplingParams(max_tokens=1, temperature=0.0)
        spec = SequenceSpec(seq_id=seq_id, token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
        self.worker.post(SequenceAdded(spec))
        await until(lambda: seq_id in self.role.ended)

    def held(self) -> set[bytes]:
        return set(self.worker.engine.pool.snapshot())


@asynccontextmanager
async def running(model_dir, **options):
    crashes: list[BaseException] = []
    worker = EngineWorker("decode", "w", "127.0.0.1", worker_options(model_dir, **options), SECRET, crashes.append)
    role = Role()
    made = Setting(worker, role, await worker.start(role))
    yield made
    for caller in made.callers:
        caller.client.close()
    await worker.close()
    assert not crashes


@pytest.fixture
async def setting(model_dir):
    async with running(model_dir) as made:
        yield made


def told(messages: Sequence[KvEvents]) -> set[bytes]:
    """The names that a follower of these, in order and from a snapshot on, takes to be held."""
    names: set[bytes] = set()
    for message in messages:
        names = set() if message.cleared else names
        names |= set(split_names(message.stored))
        names -= set(split_names(message.removed))
    return names


async def test_a_subscriber_gets_what_is_held_then_each_change_under_the_next_number(setting):
    await setting.run("a", 10)
    early, late = setting.caller(), setting.caller()
    await early.subscribe()
    assert told(early.of(KvEvents)) == setting.held() != set()
    await setting.run("b", 100)
    await late.subscribe()
    await setting.run("c", 190)
    await until(lambda: told(early.of(KvEvents)) == told(late.of(KvEvents)) == setting.held())
    assert [message.seq for message in early.of(KvEvents)] == [0, 1, 2]
    assert [message.seq for message in late.of(KvEvents)] == [0, 1]


async def test_whoever_subscribes_anew_begins_anew(setting):
    caller = setting.caller()
    await caller.subscribe()
    await setting.run("a", 10)
    await until(lambda: len(caller.of(KvEvents)) == 2)
    await caller.subscribe()
    await setting.run("b", 100)
    await until(lambda: told(caller.of(KvEvents)[2:]) == setting.held())
    assert [message.seq for message in caller.of(KvEvents)] == [0, 1, 0, 1]


async def test_a_subscriber_hears_of_the_load_at_once_and_when_it_changes(setting):
    caller = setting.caller()
    await caller.subscribe()
    await until(lambda: caller.of(LoadReport))
    await setting.run("a", 10)  # over within the pause between two reports, perhaps
    await until(lambda: any(report.ended_ids for report in caller.of(LoadReport)))
    reports = caller.of(LoadReport)
    assert reports[-1].free_blocks == setting.info.num_blocks
    assert [report.seq for report in reports if not report.is_whole] == list(
        range(reports[0].seq + 1, reports[-1].seq + 1)
    )
    assert [request_id for report in reports for request_id in report.request_ids] == ["a"]
    assert [request_id for report in reports for request_id in report.ended_ids] == ["a"]


async def test_whoever_asks_where_the_blocks_lie_is_told(setting):
    caller = setting.caller()
    caller.client.send(DescribeRegions())
    await until(lambda: caller.got)
    [described] = caller.got
    assert isinstance(described, RegionsDescribed)
    assert [region.road for region in described.regions] == list(setting.info.roads) == ["shm"]
    assert (described.num_blocks, described.has_generations) == (setting.info.num_blocks, True)


async def test_numbers_are_those_of_the_engine_the_role_and_the_peers(setting):
    caller = setting.caller()
    caller.client.send(GetStats(query_id="q"))
    await until(lambda: caller.got)
    [stats] = caller.got
    assert isinstance(stats, Stats)
    assert (stats.query_id, stats.worker_id, stats.values["kvray_streams"]) == ("q", "w", 7.0)
    assert stats.values["kvray_blocks"] == setting.info.num_blocks
    assert stats.values["kvray_pulls_running"] == stats.values["kvray_pulls_failed_total"] == 0.0


async def test_whoever_asks_for_blocks_by_name_is_lent_what_is_held_until_it_lets_go(setting):
    await setting.run("a", 10)
    caller, pool = setting.caller(), setting.worker.engine.pool
    held = sorted(setting.held())
    names = [held[0], b"nobody's block..", *held[1:]]
    caller.client.send(BlocksRequest(request_id="q", first_index=2, names=b"".join(names)))
    await until(lambda: caller.got)
    [handoff] = caller.got
    assert isinstance(handoff, KvHandoff)
    assert (handoff.request_id, handoff.is_last) == ("q", True)
    assert [block.name for block in each_location(handoff.blocks)] == held
    assert [block.index for block in each_location(handoff.blocks)] == [2, *range(4, 3 + len(held))]
    block_ids = [block.block_id for block in each_location(handoff.blocks)]
    assert [block.checksum for block in each_location(handoff.blocks)] == setting.worker.engine.checksums.compute(
        block_ids
    )
    assert pool.num_used == len(held) == 3
    caller.client.send(ReleaseLease(request_id="q"))
    await until(lambda: not pool.num_used)
    caller.client.send(BlocksRequest(request_id="q", first_index=0, names=held[0]))
    await until(lambda: pool.num_used)
    caller.client.close()
    await until(lambda: not pool.num_used)
    assert setting.role.messages == []


async def test_a_subscriber_hears_that_there_is_no_node_cache(setting):
    caller = setting.caller()
    await caller.subscribe()
    await until(lambda: caller.of(NodeCacheFound))
    assert caller.of(NodeCacheFound) == [NodeCacheFound(worker_id="w", info=None)]


async def test_what_others_keep_is_marked_until_whoever_says_so_begins_anew(setting):
    pool = setting.worker.engine.pool
    await setting.run("a", 10)
    caller, held = setting.caller(), sorted(setting.held())
    num_dispensable = pool.num_dispensable
    await caller.subscribe()
    caller.client.send(SpareBlocks(spare=b"".join(held[:2]) + b"nobody's block.."))
    await until(lambda: pool.num_dispensable == num_dispensable + 2)
    caller.client.send(SpareBlocks(kept=held[0]))
    await until(lambda: pool.num_dispensable == num_dispensable + 1)
    await caller.subscribe()
    assert pool.num_dispensable == num_dispensable


@pytest.mark.slow
async def test_what_another_holds_is_taken_in_and_let_go_of_there(model_dir):
    async with running(model_dir) as owner, running(model_dir) as taker:
        await owner.run("a", 10)
        names = sorted(owner.held())
        taker.caller().client.send(TakeBlocks(address=owner.info.address, names=b"".join(names), age_s=0.0))
        await until(lambda: taker.held() == owner.held())
        assert taker.worker.engine.scheduler.num_blocks_taken_in == 3
        await until(lambda: not owner.worker.engine.pool.num_used)
        assert not taker.worker.engine.pool.num_used
        await taker.run("b", 10)  # the same prompt: two blocks of it need not be computed
        assert taker.worker.engine.scheduler.stats()["num_prompt_tokens_device"] == 32


async def test_what_is_to_be_taken_from_whoever_is_not_there_is_not(setting):
    address = "tcp://127.0.0.1:1"  # nobody listens there
    setting.caller().client.send(TakeBlocks(address=address, names=bytes(32), age_s=0.0))
    await until(lambda: not setting.worker.borrower.can_pull(address))
    assert setting.worker.engine.scheduler._ledger.intakes.ids() == ()
    assert (setting.held(), setting.worker.engine.pool.num_used) == (set(), 0)


async def test_an_owner_that_was_lost_a_moment_ago_is_not_asked_for_blocks(setting):
    copy = Copy("tcp://127.0.0.1:1", "device")  # nobody listens there
    price_of = setting.worker.engine.scheduler._sourcing.price_of
    assert price_of(copy) is not None
    setting.worker.borrower.peers.connect(copy.address)
    await until(lambda: price_of(copy) is None)


async def test_the_role_gets_what_is_not_the_workers_own_and_hears_who_is_gone(setting):
    caller = setting.caller()
    await caller.subscribe()
    caller.client.send(CancelRequest(request_id="r"))
    await until(lambda: setting.role.messages)
    assert setting.role.messages == [CancelRequest(request_id="r")]
    caller.client.close()
    await until(lambda: setting.role.lost)
    assert setting.role.lost == setting.role.senders
    await setting.run("a", 10)  # nobody is told any more
    assert list(setting.worker._subscribers) == []


# ------------------------------------------------------------------------------------------------------------- faults


class Panic(BaseException):
    """As native libraries raise it."""


@pytest.fixture
async def crashing(model_dir):
    """A worker whose role raises what it is told to, a caller, and what `on_crash` got."""
    crashes: list[BaseException] = []
    worker, role = EngineWorker("decode", "w", "127.0.0.1", worker_options(model_dir), SECRET, crashes.append), Role()
    info = await worker.start(role)
    caller = Caller(info.address)
    yield worker, role, caller, crashes
    caller.client.close()
    await worker.close()


def raising(error: BaseException):
    def call(*_args: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("error", [InvariantError("the books differ"), Panic("at src/lib.rs:7")])
async def test_what_a_message_makes_raise_ends_the_worker(crashing, error):
    _, role, caller, crashes = crashing
    role.on_message = raising(error)
    caller.client.send(CancelRequest(request_id="r"))
    await until(lambda: crashes)
    assert crashes == [error]


async def test_what_a_lost_sender_makes_raise_ends_the_worker(crashing):
    _, role, caller, crashes = crashing
    caller.client.send(CancelRequest(request_id="r"))
    await until(lambda: role.messages)
    role.on_sender_lost = raising(InvariantError("the books differ"))
    caller.client.close()
    await until(lambda: crashes)


@pytest.mark.parametrize("error", [InvariantError("the books differ"), Panic("at src/lib.rs:7")])
async def test_what_a_task_raises_ends_the_worker(crashing, error):
    worker, _, _, crashes = crashing

    async def fail() -> None:
        await asyncio.sleep(0)
        raise error

    worker.spawn(fail())
    worker.spawn(fail())
    await until(lambda: crashes)
    await asyncio.sleep(0.01)
    assert crashes == [error]


async def test_what_an_instruction_makes_raise_ends_the_worker(crashing):
    worker, role, _, crashes = crashing
    role.on_instructions = raising(InvariantError("not an instruction of this role"))
    spec = SequenceSpec(seq_id="s", token_ids=[5, 6], num_prompt_tokens=2, params=SamplingParams(max_tokens=2))
    worker.post(SequenceAdded(spec))
    await until(lambda: crashes)


async def test_what_a_step_raises_ends_the_worker(crashing, monkeypatch):
    worker, _, _, crashes = crashing
    monkeypatch.setattr(worker.driver, "_launch", raising(Panic("at src/lib.rs:7")))
    spec = SequenceSpec(seq_id="s", token_ids=[5, 6], num_prompt_tokens=2, params=SamplingParams(max_tokens=2))
    worker.post(SequenceAdded(spec))
    await until(lambda: crashes)


async def test_a_step_that_hangs_ends_the_worker(crashing, monkeypatch):
    worker, _, _, crashes = crashing
    may_end = threading.Event()
    launch = worker.driver._launch
    monkeypatch.setattr(worker.driver, "_launch", lambda plan: launch(plan) if may_end.wait(20) else None)
    monkeypatch.setattr("engine.scheduling.step_cost._HANGS_FLOOR_S", 0.1)
    monkeypatch.setattr("engine.scheduling.step_cost._HANGS_FACTOR", 0.0)
    spec = SequenceSpec(seq_id="s", token_ids=[5, 6], num_prompt_tokens=2, params=SamplingParams(max_tokens=1))
    worker.post(SequenceAdded(spec))
    await until(lambda: crashes)
    (error,) = crashes
    assert "in it are: s prefill [0, 2)" in error.message
    may_end.set()
