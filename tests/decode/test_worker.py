"""Decode and prefill workers together: real engines, sockets and shared memory, on one event loop."""

from __future__ import annotations

import asyncio

import pytest

from cluster.openai.thought_formats import ThoughtFormat
from cluster.openai.thought_grammar import written_before
from cluster.openai.thoughts import ThoughtPlan
from decode import worker as decode_worker
from kvcache.names import pack_tokens
from messages.handoff import ReleaseLease
from messages.request import CancelRequest, Choice, Grammar
from messages.scaling import WorkerScaling, finite
from tests.workers import (
    BLOCK_BYTES,
    Steps,
    borrower_of,
    engine_of,
    peers_of,
    prompts,
    running_pair,
    taken_in,
    until,
    worker_options,
)
from text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("plans_ahead", [False, True])
async def test_pulled_prompts_give_the_tokens_of_plain_transformers(model_dir, reference, plans_ahead):
    lengths = (1, 15, 16, 17, 32, 100, 257, 600)
    asked = prompts(1, *lengths)
    options = worker_options(model_dir, plans_ahead=plans_ahead)
    async with running_pair(options, options) as pair:
        answers = [pair.ingress.send(f"r{i}", prompt) for i, prompt in enumerate(asked)]
        got = await pair.ingress.finish(*answers)
        for answer, length in zip(answers, lengths, strict=True):
            assert answer.sources is not None
            assert answer.sources.computed == length
        assert pair.decode._worker.roads.stats()['kvray_transfer_bytes_total{road="shm"}'] > 0
    assert got == [reference.greedy(prompt, 16) for prompt in asked]


async def test_who_wants_word_is_told_once_that_a_request_was_accepted_and_before_its_first_token(model_dir):
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        (prompt,) = prompts(21, 600)
        others = (Choice("told-1", 1), Choice("told-2", 2))
        told = pair.ingress.send("told", prompt, wants_word=True, others=others)
        not_told = pair.ingress.send("not told", prompt)
        refused = pair.ingress.send("refused", prompts(22, 5)[0], wants_word=True, repetition_penalty=1e-38)
        await pair.ingress.finish(told, not_told, *(pair.ingress.answers[other.request_id] for other in others))
        await refused.is_done.wait()
    counts = [answer.num_accepted for answer in (told, not_told, refused)]
    assert counts == [1, 0, 0]
    assert not any(pair.ingress.answers[other.request_id].num_accepted for other in others)


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
@pytest.mark.parametrize("plans_ahead", [False, True])
async def test_a_pool_too_small_for_all_preempts_and_stays_exact(model_dir, reference, plans_ahead):
    asked = prompts(6, *([90] * 12))
    tiny = worker_options(model_dir, kv_cache_bytes=40 * BLOCK_BYTES, max_model_len=256, plans_ahead=plans_ahead)
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


@pytest.mark.parametrize("plans_ahead", [False, True])
async def test_a_cancelled_request_leaves_nothing_pinned_on_either_side(model_dir, plans_ahead):
    asked = prompts(9, 600, 600, 600, 50)
    options = worker_options(model_dir, plans_ahead=plans_ahead)
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


async def test_what_is_told_for_scaling_is_finite_from_the_first_moment_on(model_dir):
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        before = finite(pair.decode.scaling())
        assert set(before) == set(WorkerScaling.__struct_fields__), "nothing is left out"
        assert (before["num_running"], before["used_share"]) == (0.0, 0.0)
        answer = pair.ingress.send("r", prompts(31, 300)[0], max_tokens=400)
        await until(lambda: len(answer.token_ids) > 40)
        during, prefill = finite(pair.decode.scaling()), finite(pair.prefill.scaling())
        assert during["num_running"] == 1.0
        assert 0.0 < during["used_share"] < 1.0
        assert during["busy_s_total"] > before["busy_s_total"]
        assert during["step_s"] > 0.0
        assert prefill["busy_s_total"] > 0.0
        await pair.ingress.finish(answer)
        async with asyncio.timeout(10.0):
            await asyncio.gather(pair.decode.drain(), pair.prefill.drain())
