"""What comes of KV that others have: over faulty roads, from owners that reuse it, die, or have it no more."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import msgspec
import pytest

from engine.scheduling.backlog import Backlog
from engine.scheduling.coming import Coming
from kvcache.locations import each_location, pack_locations
from messages.handoff import KvHandoff
from messages.price import ComputePrice, MovePrice
from messages.request import Copy, HeldRun
from tests.harness import harness_workers
from tests.workers import (
    BLOCK_BYTES,
    SECRET,
    Ingress,
    Steps,
    borrower_of,
    engine_of,
    peers_of,
    prompts,
    running_decode,
    running_pair,
    until,
    worker_options,
)
from transport.loopback import Corrupt, Fail, LoopbackNetwork, LoopbackTransport, Reorder, Stall, WriteLate
from transport.protocol import Transport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def rejected(pair, reason: str) -> float:
    return peers_of(pair.decode).stats()[f'kvray_blocks_rejected_total{{reason="{reason}"}}']


async def test_blocks_that_their_owner_reused_are_computed_and_counted(model_dir, reference, monkeypatch):
    (prompt,) = prompts(8, 200)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        source = engine_of(pair.prefill)
        roads = pair.decode._worker.roads
        pull = roads.pull
        generations = source.memory.view[: source.layout.num_blocks * 8].cast("Q")
        copied = []

        async def reuse_then_pull(link, copies, target, *told):
            if target is engine_of(pair.decode).memory and not copied:  # the owner moves on before the bytes travel
                copied.extend(copies[::2])
                for copy in copied:
                    source.memory.view[copy.source_offset] ^= 0xFF
                    block_id = (copy.source_offset - source.layout.data_offset) // source.layout.block_bytes
                    generations[block_id] += 1
            return await pull(link, copies, target, *told)

        monkeypatch.setattr(roads, "pull", reuse_then_pull)
        (got,) = await pair.ingress.finish(pair.ingress.send("r", prompt))
        assert rejected(pair, "generation") == len(copied) > 0
        assert rejected(pair, "checksum") == 0
        generations.release()
    assert got == reference.greedy(prompt, 16)


class FakeRoads:
    """Loopback roads for a pair of workers; `decode` are those whose faults hit the decode worker's pulls."""

    def __init__(self, *names: str) -> None:
        self.network = {name: LoopbackNetwork() for name in names}
        self.made: list[list[LoopbackTransport]] = []

    def __call__(self) -> list[Transport]:
        self.made.append([LoopbackTransport(network, road=name) for name, network in self.network.items()])
        return list(self.made[-1])

    @property
    def decode(self) -> dict[str, LoopbackTransport]:
        return {transport.road: transport for transport in self.made[1]}


async def warmed_up(pair, reference) -> None:
    """One request, so that roads are probed and the next pull is a request's."""
    (prompt,) = prompts(99, 64)
    assert await pair.ingress.finish(pair.ingress.send("warm", prompt)) == [reference.greedy(prompt, 16)]
    await asyncio.sleep(0.1)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fail(num_copies=2), "transfer"),
        (Stall(), "transfer"),
        (Corrupt(offset=100), "checksum"),
        (Reorder(seed=1), None),
        (Stall(0.1), None),
        (WriteLate(delay_s=0.3), "transfer"),
    ],
    ids=str,
)
@pytest.mark.parametrize("roads", [("a",), ("a", "b")], ids=["one road", "two roads"])
async def test_whatever_a_road_does_the_tokens_are_right_and_nothing_stays(model_dir, reference, fault, reason, roads):
    asked = prompts(20, 300, 150)
    fake = FakeRoads(*roads)
    options = worker_options(model_dir, stall_s=0.4)
    async with running_pair(options, options, fake) as pair:
        await warmed_up(pair, reference)
        for transport in fake.decode.values():
            transport.faults.append(fault)
        answers = [pair.ingress.send(f"r{i}", prompt) for i, prompt in enumerate(asked)]
        got = await pair.ingress.finish(*answers)
        if reason is not None and (len(roads) == 1 or reason == "checksum"):
            assert rejected(pair, reason) > 0
        await pair.idle()
    assert got == [reference.greedy(prompt, 16) for prompt in asked]


@pytest.mark.alone
async def test_late_bytes_land_in_nobodys_block(model_dir, reference):
    """A road that cannot abort writes after the pull was given up; the pool is so small that all blocks are in use."""
    asked = prompts(21, *([180] * 16))
    fake = FakeRoads("a")
    options = worker_options(model_dir, stall_s=0.1, kv_cache_bytes=60 * BLOCK_BYTES, max_model_len=512)
    async with running_pair(worker_options(model_dir), options, fake) as pair:
        await warmed_up(pair, reference)
        fake.decode["a"].faults.extend([WriteLate(delay_s=0.25)] * 3)
        answers = [pair.ingress.send(f"r{i}", prompt, max_tokens=40) for i, prompt in enumerate(asked)]
        got = await pair.ingress.finish(*answers, timeout_s=60)
        assert engine_of(pair.decode).pool.stats.num_quarantined_blocks > 0
    assert got == [reference.greedy(prompt, 40) for prompt in asked]


async def test_a_block_damaged_on_one_road_comes_whole_over_the_other(model_dir, reference):
    (prompt,) = prompts(22, 300)
    fake = FakeRoads("a", "b")
    options = worker_options(model_dir)
    async with running_pair(options, options, fake) as pair:
        await warmed_up(pair, reference)
        for transport in fake.decode.values():
            transport.faults.append(Corrupt(offset=50_000))
        transport = max(fake.decode.values(), key=lambda transport: transport.num_pulls)
        answer = pair.ingress.send("r", prompt)
        # the second road's fault is taken away as soon as the first one struck
        while all(transport.faults for transport in fake.decode.values()):  # noqa: ASYNC110 - the fake has no event
            await asyncio.sleep(0)
        for transport in fake.decode.values():
            transport.faults.clear()
        (got,) = await pair.ingress.finish(answer)
        assert rejected(pair, "checksum") == 1
        assert engine_of(pair.decode).scheduler.stats()["num_remote_fallbacks"] == 0
    assert got == reference.greedy(prompt, 16)


async def test_without_any_road_prompts_are_computed_where_they_are_decoded(model_dir, reference):
    (prompt,) = prompts(23, 100)
    options = worker_options(model_dir)
    async with running_pair(options, options, lambda: []) as pair:
        assert await pair.ingress.finish(pair.ingress.send("r", prompt)) == [reference.greedy(prompt, 16)]
        assert pair.prefill.stats()["kvray_prefill_prompts_total"] == 0


async def test_a_peer_whose_blocks_have_another_size_is_not_pulled_from(model_dir, reference):
    (prompt,) = prompts(24, 100)
    small = worker_options(model_dir, block_size=8)
    async with running_pair(small, worker_options(model_dir)) as pair:
        for request_id in ("asked", "not asked any more"):
            got = await pair.ingress.finish(pair.ingress.send(request_id, prompt))
            assert got == [reference.greedy(prompt, 16)]
            engine_of(pair.decode).pool.clear()
        assert peers_of(pair.decode).statuses()[0].road == ""
        assert pair.prefill.stats()["kvray_prefill_prompts_total"] == 1


async def test_a_location_outside_the_peers_pool_is_refused_and_the_next_request_is_pulled(
    model_dir, reference, monkeypatch
):
    asked = prompts(25, 100, 100)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        is_lying = True
        send = pair.prefill._worker.send

        def lying_send(peer, message):
            if is_lying and isinstance(message, KvHandoff) and message.blocks:
                first, *others = each_location(message.blocks)
                wrong = msgspec.structs.replace(first, block_id=1 << 30)
                message = msgspec.structs.replace(message, blocks=pack_locations([wrong, *others]))
            send(peer, message)

        monkeypatch.setattr(pair.prefill._worker, "send", lying_send)
        first = await pair.ingress.finish(pair.ingress.send("r1", asked[0]))
        assert rejected(pair, "refused") > 0
        is_lying = False
        second = await pair.ingress.finish(pair.ingress.send("r2", asked[1]))
        assert pair.decode._worker.roads.stats()['kvray_transfer_bytes_total{road="shm"}'] > 0
    assert [*first, *second] == [reference.greedy(prompt, 16) for prompt in asked]


@pytest.mark.alone
async def test_a_lease_outlives_a_slow_pull_that_makes_progress(model_dir, reference):
    """Blocks come one by one over a road, for longer than the lease."""
    (prompt,) = prompts(26, 400)
    fake = FakeRoads("a")
    options = worker_options(model_dir, lease_s=0.6)
    async with running_pair(options, options, fake) as pair:
        await warmed_up(pair, reference)
        road = fake.decode["a"]
        pull = road.pull

        async def slowly(link, source, copies, target, stall_s, on_arrived=None):
            for position, copy in enumerate(copies):
                await asyncio.sleep(0.08)
                await pull(
                    link,
                    source,
                    [copy],
                    target,
                    stall_s,
                    lambda _, checksum=None, at=position: on_arrived(at, checksum),
                )

        road.pull = slowly
        assert await pair.ingress.finish(pair.ingress.send("r", prompt)) == [reference.greedy(prompt, 16)]
        assert pair.prefill.stats()["kvray_leases_expired_total"] == 0
        assert rejected(pair, "generation") == rejected(pair, "checksum") == 0


# ------------------------------------------------------------------------------------------------------ blocks by name


def held_at(address: str, num_blocks: int) -> tuple[HeldRun, ...]:
    return (HeldRun(0, num_blocks, (Copy(address, "device"),)),)


def price_loading(worker, block_s: float) -> None:
    """Let a block from whoever can be pulled from seem to cost that."""
    scheduler = engine_of(worker).scheduler
    price_of = scheduler._sourcing.price_of
    price = MovePrice(source="", road="", fixed_s=0.0, byte_s=block_s / BLOCK_BYTES, handoff_s=0.0)
    scheduler.set_prices(lambda copy: None if price_of(copy) is None else price)


class PricedBacklog(Backlog):
    """Of a larger model: a millisecond a token, and steps that cost nothing by themselves."""

    price = ComputePrice(token_s=1e-3)


async def test_a_prefix_comes_from_another_decode_worker_that_is_named_and_when_it_is_killed_it_is_computed(
    model_dir, reference
):
    shared, *tails = prompts(30, 320, 40, 40)
    first, second = [shared + tail for tail in tails]
    expected = [reference.greedy(prompt, 16) for prompt in (first, second)]
    options = worker_options(model_dir)
    async with running_decode(options) as (borrower, ingress):
        price_loading(borrower, 0.0)
        with ExitStack() as stack:
            start = harness_workers().running_worker
            holder = await asyncio.to_thread(lambda: stack.enter_context(start("decode", options, SECRET)))
            asked = Ingress(holder.info, None)
            await asked.finish(asked.send("first", shared))
            held = held_at(asked.address, 20)
            pulled = ingress.send("pulled", first, held=held)
            assert await ingress.finish(pulled) == expected[:1]
            assert (pulled.sources.peer, pulled.sources.computed) == (320, 40)
            stats = await asked.stats()
            assert (stats["kvray_blocks_lent_total"], stats["kvray_blocks_pinned"]) == (20, 0)
            asked.client.close()
            holder.process.kill()
            engine_of(borrower).pool.clear()
            computed = ingress.send("computed", second, held=held)
            assert await ingress.finish(computed) == expected[1:]
            assert (computed.sources.peer, computed.sources.computed) == (0, 360)


async def test_what_a_holder_that_is_lost_before_it_answers_was_asked_for_is_computed(
    model_dir, reference, monkeypatch
):
    shared, tail = prompts(31, 320, 40)
    options = worker_options(model_dir)
    async with running_decode(options) as (holder, asked), running_decode(options) as (borrower, ingress):
        price_loading(borrower, 0.0)
        await asked.finish(asked.send("first", shared))
        questions = []
        monkeypatch.setattr(holder._worker._lender, "take", lambda *question: questions.append(question) or True)
        answer = ingress.send("r", shared + tail, held=held_at(asked.address, 20))
        await until(lambda: questions)
        await holder.close()
        assert await ingress.finish(answer) == [reference.greedy(shared + tail, 16)]
        assert (answer.sources.peer, answer.sources.computed) == (0, 360)
        assert not borrower_of(borrower).can_pull(asked.address)


async def test_what_a_holder_has_no_more_is_computed_and_what_is_left_is_pulled(model_dir, reference):
    shared, tail = prompts(32, 320, 40)
    options = worker_options(model_dir)
    async with running_decode(options) as (holder, asked), running_decode(options) as (borrower, ingress):
        price_loading(borrower, 0.0)
        await asked.finish(asked.send("first", shared[:200]))
        answer = ingress.send("r", shared + tail, held=held_at(asked.address, 20))  # 8 blocks more than there are
        assert await ingress.finish(answer) == [reference.greedy(shared + tail, 16)]
        assert (answer.sources.peer, answer.sources.computed) == (192, 168)
        await until(lambda: not engine_of(holder).pool.num_used)


async def test_a_head_that_is_computed_while_the_tail_is_pulled_gives_the_same_tokens(model_dir, reference):
    shared, tail = prompts(33, 640, 40)
    options = worker_options(model_dir, max_num_batched_tokens=64)
    async with running_decode(options) as (_, asked), running_decode(options) as (borrower, ingress):
        await asked.finish(asked.send("first", shared))
        scheduler = engine_of(borrower).scheduler
        scheduler._sourcing._backlog = PricedBacklog(scheduler._ledger, scheduler.cost)
        price_loading(borrower, 0.016)  # about what computing it is said to cost
        steps = Steps(borrower)
        steps.hold("r", after=1)  # the roads are tried meanwhile, and blocks come
        answer = ingress.send("r", shared + tail, held=held_at(asked.address, 40))
        await until(lambda: steps.is_holding)
        pull = scheduler._ledger.sequences["r"].pull
        await until(
            lambda: pull is None or pull.blocks.has(Coming.ARRIVED)
        )  # all of it came during the first step, or some does now
        steps.go_on()
        assert await ingress.finish(answer) == [reference.greedy(shared + tail, 16)]
        assert 0 < answer.sources.peer < 640
        assert answer.sources.peer + answer.sources.computed == 680
