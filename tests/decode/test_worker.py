"""Decode and prefill workers together: real engines, sockets and shared memory, on one event loop."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack

import msgspec
import pytest

from cluster.openai.thought_formats import ThoughtFormat
from cluster.openai.thought_grammar import written_before
from cluster.openai.thoughts import ThoughtPlan
from decode import worker as decode_worker
from engine.scheduling.backlog import Backlog
from engine.scheduling.coming import Coming
from kvcache.locations import each_location, pack_locations
from kvcache.names import pack_tokens
from messages.handoff import KvHandoff, ReleaseLease
from messages.price import ComputePrice, MovePrice
from messages.request import CancelRequest, Choice, Copy, Grammar, HeldRun
from tests.harness import harness_workers
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.workers import (
    SECRET,
    Ingress,
    Steps,
    borrower_of,
    engine_of,
    running_decode,
    running_pair,
    taken_in,
    until,
    worker_options,
)
from text.tokenizer import Tokenizer
from transport.loopback import Corrupt, Fail, LoopbackNetwork, LoopbackTransport, Reorder, Stall, WriteLate
from transport.protocol import Transport

BLOCK_BYTES = 16384  #: of the tiny model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model_dir):
    return Reference(model_dir)


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 250) for _ in range(length)] for length in lengths]


async def test_pulled_prompts_give_the_tokens_of_plain_transformers(model_dir, reference):
    lengths = (1, 15, 16, 17, 32, 100, 257, 600)
    asked = prompts(1, *lengths)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        answers = [pair.ingress.send(f"r{i}", prompt) for i, prompt in enumerate(asked)]
        got = await pair.ingress.finish(*answers)
        for answer, length in zip(answers, lengths, strict=True):
            assert answer.sources is not None
            assert answer.sources.computed == length
        assert pair.decode._worker.roads.stats()['kvray_transfer_bytes_total{road="shm"}'] > 0
    assert got == [reference.greedy(prompt, 16) for prompt in asked]


async def test_second_turn_finds_the_answers_blocks_on_the_decode_worker(model_dir, reference):
    (first,) = prompts(2, 200)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        (answer,) = await pair.ingress.finish(pair.ingress.send("turn-1", first, max_tokens=40))
        second = [*first, *answer, *prompts(3, 30)[0]]
        turn = pair.ingress.send("turn-2", second)
        (got,) = await pair.ingress.finish(turn)
        assert turn.sources is not None
        # all but the newest token's KV lies there, in whole blocks
        assert turn.sources.device == (len(first) + len(answer) - 1) // 16 * 16
    assert got == reference.greedy(second, 16)


async def test_a_prefix_cached_by_prefill_counts_as_peer_when_decode_does_not_hold_it(model_dir, reference):
    shared, tail_a, tail_b = prompts(4, 320, 40, 40)
    prefill, decode = worker_options(model_dir), worker_options(model_dir)
    async with running_pair(prefill, decode) as pair:
        await pair.ingress.finish(pair.ingress.send("a", shared + tail_a))
        await pair.idle()
        engine_of(pair.decode).pool.clear()
        answer = pair.ingress.send("b", shared + tail_b)
        (got,) = await pair.ingress.finish(answer)
        assert answer.sources is not None
        assert (answer.sources.peer, answer.sources.computed) == (320, 40)
    assert got == reference.greedy(shared + tail_b, 16)


async def test_a_sequence_that_moved_here_pulls_its_prompt_and_goes_on_exactly(model_dir, reference):
    (prompt,) = prompts(12, 300)
    options = worker_options(model_dir)
    wanted = reference.sampled(prompt, 16, temperature=0.9, seed=5)
    async with running_pair(options, options) as pair:
        for num_generated in (1, 5, 15):
            engine_of(pair.decode).pool.clear()
            answer = pair.ingress.send(f"m{num_generated}", prompt, wanted[:num_generated], temperature=0.9, seed=5)
            (got,) = await pair.ingress.finish(answer)
            assert wanted[:num_generated] + got == wanted
            await pair.idle()
        assert pair.decode._worker.roads.stats()['kvray_transfer_bytes_total{road="shm"}'] > 0


async def test_an_output_follows_its_grammar_from_prefills_first_token_on(model_dir):
    options = worker_options(model_dir)
    tokenizer = Tokenizer.load(model_dir)
    async with running_pair(options, options) as pair:
        grammar = Grammar(kind="choice", spec='["yes and no"]')
        first, second, third = prompts(4, 100, 101, 50)
        answers = [pair.ingress.send(f"r{len(prompt)}", prompt, grammar=grammar) for prompt in (first, second)]
        bad = pair.ingress.send("bad", third, grammar=Grammar(kind="regex", spec="(["))
        found = await pair.ingress.finish(*answers)
        await until(bad.is_done.is_set)
    assert [tokenizer.decode(token_ids)[:10] for token_ids in found] == ["yes and no"] * 2
    assert bad.last is not None
    assert bad.last.error is not None
    assert "invalid regex" in bad.last.error.message


@pytest.mark.parametrize("mark", ["!?", "<|system|>"])
async def test_a_structure_begins_after_a_thought_also_of_a_sequence_that_moves(model_dir, mark):
    options = worker_options(model_dir)
    tokenizer = Tokenizer.load(model_dir)
    kind = ThoughtFormat(opens=("<think>",), closes=(mark,))
    plan = ThoughtPlan(kind=kind, begins_inside=True, may_open=False, close=mark)
    fields = {
        "grammar": Grammar(kind="choice", spec='["yes and no"]', before=written_before(plan, tokenizer, lead="")),
        # a model of random weights comes to the mark
        "logit_bias": dict.fromkeys(tokenizer.encode(mark, add_special_tokens=False), 4.0),
        "temperature": 0.9,
        "max_tokens": 60,
    }
    (prompt,) = prompts(6, 100)
    async with running_pair(options, options) as pair:
        answers = [pair.ingress.send(f"r{seed}", prompt, seed=seed, **fields) for seed in range(4)]
        found = await pair.ingress.finish(*answers)
        texts = [tokenizer.decode(token_ids, skip_special_tokens=False).partition(mark) for token_ids in found]
        assert {answer[:10] for _, _, answer in texts} == {"yes and no"}
        assert len({thought for thought, _, _ in texts}) > 1
        for num_generated in (1, 50):
            moved = pair.ingress.send(f"m{num_generated}", prompt, found[0][:num_generated], seed=0, **fields)
            (rest,) = await pair.ingress.finish(moved)
            assert found[0][:num_generated] + rest == found[0]


async def test_choices_with_one_prompt_compute_it_once(model_dir, reference):
    (prompt,) = prompts(5, 400)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        answers = [pair.ingress.send(f"c{i}", prompt, choice=i, temperature=0.9, seed=7) for i in range(4)]
        got = await pair.ingress.finish(*answers)
        computed = sum(answer.sources.computed for answer in answers if answer.sources is not None)
        assert computed < 400 + 4 * 32
    assert got == [reference.sampled(prompt, 16, temperature=0.9, seed=7, choice=i) for i in range(4)]
    assert len({tuple(tokens) for tokens in got}) > 1


async def test_choices_that_come_in_one_message_are_answered_as_if_each_had_come_alone(
    model_dir, reference, monkeypatch
):
    monkeypatch.setattr(decode_worker, "_TURN_S", 0.0)  # one begins, or ends, in a turn of the loop
    (prompt,) = prompts(5, 400)
    options = worker_options(model_dir)
    settings = {"temperature": 0.9, "seed": 7}
    async with running_pair(options, options) as pair:
        moved = reference.sampled(prompt, 16, choice=5, **settings)
        others = (*(Choice(f"c{i}", i) for i in (1, 2, 3)), Choice("c5", 5, pack_tokens(moved[:6])))
        pair.ingress.send("c0", prompt, others=(*others, Choice("gone", 6)), **settings)
        pair.ingress.cancel("gone")
        got = await pair.ingress.finish(*(pair.ingress.answers[f"c{i}"] for i in (0, 1, 2, 3, 5)))
        assert got[:4] == [reference.sampled(prompt, 16, choice=i, **settings) for i in range(4)]
        assert got[4] == moved[6:]
        await pair.idle()


async def test_many_choices_that_each_end_as_they_begin_are_answered_one_after_the_other(model_dir):
    (prompt,) = prompts(5, 40)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        others = tuple(Choice(f"c{i}", i) for i in range(1, 400))
        pair.ingress.send("c0", prompt, others=others, deadline_s=0.0)
        answers = pair.ingress.answers.values()
        await asyncio.wait_for(asyncio.gather(*(answer.is_done.wait() for answer in answers)), 20)
        assert [answer.last.error.status for answer in answers if answer.last.error is not None] == [504] * 400
        await pair.idle()


@pytest.mark.alone
async def test_a_pool_too_small_for_all_preempts_and_stays_exact(model_dir, reference):
    asked = prompts(6, *([90] * 12))
    tiny = worker_options(model_dir, kv_cache_bytes=40 * BLOCK_BYTES, max_model_len=256)
    async with running_pair(tiny, tiny) as pair:
        answers = [pair.ingress.send(f"r{i}", prompt, max_tokens=60) for i, prompt in enumerate(asked)]
        got = await pair.ingress.finish(*answers, timeout_s=60)
        assert engine_of(pair.decode).scheduler.stats()["num_preemptions"] > 0
    assert got == [reference.greedy(prompt, 60) for prompt in asked]


async def test_an_unreachable_prefill_worker_is_done_without(model_dir, reference):
    (prompt,) = prompts(7, 120)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        await pair.prefill.close()
        (got,) = await pair.ingress.finish(pair.ingress.send("r", prompt))
        assert engine_of(pair.decode).scheduler.stats()["num_remote_fallbacks"] == 1
        assert got == reference.greedy(prompt, 16)


def peers_of(worker):
    return borrower_of(worker).peers


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


async def test_a_cancelled_request_leaves_nothing_pinned_on_either_side(model_dir):
    asked = prompts(9, 600, 600, 600, 50)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        for delay_s in (0.0, 0.005, 0.03, 0.1):
            answers = [pair.ingress.send(f"{delay_s}-{i}", prompt, max_tokens=200) for i, prompt in enumerate(asked)]
            await asyncio.sleep(delay_s)
            for i in range(len(answers)):
                pair.ingress.cancel(f"{delay_s}-{i}")
            await asyncio.sleep(0.05)
            await pair.idle()


async def test_a_cancel_that_comes_while_a_token_is_computed_ends_the_sequence_with_that_step(model_dir, reference):
    asked = prompts(14, 30, 40)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        pair.ingress.prefill = None
        steps, is_cancelled = Steps(pair.decode), taken_in(pair.decode, CancelRequest)
        steps.hold("r", after=5)
        answer = pair.ingress.send("r", asked[0], max_tokens=200)
        await until(lambda: steps.is_holding)
        pair.ingress.cancel("r")
        await asyncio.wait_for(is_cancelled.wait(), 5)
        steps.go_on()
        got = await pair.ingress.finish(pair.ingress.send("q", asked[1]))
        assert steps.num_of("r") == 6
        assert answer.token_ids == reference.greedy(asked[0], 5)  # the sixth, which was under way, is not sent
        assert answer.last is None
    assert got == [reference.greedy(asked[1], 16)]


@pytest.mark.parametrize("is_pulling", [False, True], ids=["nothing to pull yet", "during a pull"])
async def test_a_cancel_that_comes_while_a_chunk_is_computed_ends_the_prefill_with_that_step(
    model_dir, reference, monkeypatch, is_pulling
):
    asked = prompts(15, 900, 40)
    options = worker_options(model_dir, max_num_batched_tokens=256)
    async with running_pair(options, options) as pair:
        at_prefill, at_decode = Steps(pair.prefill), Steps(pair.decode)
        is_cancelled, is_released = taken_in(pair.decode, CancelRequest), taken_in(pair.prefill, ReleaseLease)
        pull, may_pull = peers_of(pair.decode).pull, asyncio.Event()

        async def pull_later(*args):
            await may_pull.wait()
            return await pull(*args)

        monkeypatch.setattr(peers_of(pair.decode), "pull", pull_later)
        at_prefill.hold("r", after=int(is_pulling))  # the first chunk of four is offered, and its pull begins
        answer = pair.ingress.send("r", asked[0])
        await until(
            lambda: at_prefill.is_holding and borrower_of(pair.decode).stats()["kvray_pulls_running"] == is_pulling
        )
        pair.ingress.cancel("r")
        await asyncio.wait_for(is_cancelled.wait(), 5)
        await asyncio.wait_for(is_released.wait(), 5)
        assert at_prefill.begun[-1].parts[0].end < len(asked[0]), "more chunks would follow"
        at_prefill.go_on()
        await until(lambda: engine_of(pair.prefill).pool.num_used == 0)
        may_pull.set()
        got = await pair.ingress.finish(pair.ingress.send("q", asked[1]))
        assert at_prefill.num_of("r") == 1 + is_pulling
        assert at_decode.num_of("r") == 0
        assert (answer.token_ids, answer.last) == ([], None)
    assert got == [reference.greedy(asked[1], 16)]


async def test_an_ingress_that_vanishes_ends_its_requests(model_dir):
    asked = prompts(10, 300, 20)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        for i, prompt in enumerate(asked):
            pair.ingress.send(f"r{i}", prompt, max_tokens=400)
        await asyncio.sleep(0.1)
        pair.ingress.client.close()
        await pair.idle()


async def test_a_lease_that_nobody_ends_frees_the_blocks(model_dir):
    (prompt,) = prompts(11, 200)
    prefill = worker_options(model_dir, lease_s=0.4)
    async with running_pair(prefill, worker_options(model_dir)) as pair:
        # a decode worker that asks and then does not release
        peers = peers_of(pair.decode)
        send = peers.send
        peers.send = lambda address, message: isinstance(message, ReleaseLease) or send(address, message)
        await pair.ingress.finish(pair.ingress.send("r", prompt))
        await pair.idle()
        assert pair.prefill.stats()["kvray_leases_expired_total"] == 1


async def test_a_request_longer_than_the_model_is_refused_with_a_reason(model_dir):
    options = worker_options(model_dir, max_model_len=128)
    async with running_pair(options, options) as pair:
        answer = pair.ingress.send("r", prompts(12, 200)[0])
        await asyncio.wait_for(answer.is_done.wait(), 5)
        assert answer.last is not None
        assert answer.last.error is not None
        assert answer.last.error.kind == "RequestError"
        assert "128" in answer.last.error.message


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


# ------------------------------------------------------------------------------------------------------------ draining


async def test_draining_waits_for_what_is_under_way(model_dir, reference):
    (prompt,) = prompts(13, 100)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        answer = pair.ingress.send("r", prompt, max_tokens=100)
        while not answer.token_ids:  # noqa: ASYNC110 - tokens come by a callback
            await asyncio.sleep(0.01)
        await asyncio.wait_for(pair.decode.drain(), 20)
        await asyncio.wait_for(pair.prefill.drain(), 20)
        (got,) = await pair.ingress.finish(answer, timeout_s=1)
    assert got == reference.greedy(prompt, 100)
