"""A prefill worker that holds nothing of a prompt pulls it from whoever does: real engines, sockets, shared memory."""

from __future__ import annotations

import random

import pytest

from messages.price import MovePrice
from messages.request import Copy, HeldRun
from tests.workers import engine_of, running_decode, running_pair, worker_options

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NUM_SHARED = 320


def draw(*lengths: int) -> list[list[int]]:
    rng = random.Random(50)
    return [[rng.randrange(5, 250) for _ in range(length)] for length in lengths]


def held_at(address: str) -> tuple[HeldRun, ...]:
    return (HeldRun(0, NUM_SHARED // 16, (Copy(address, "device"),)),)


def pull_for_nothing(*workers) -> None:
    """Let pulling seem to cost nothing: the tiny model computes a block in a tenth of a millisecond."""
    free = MovePrice(source="", road="", fixed_s=0.0, byte_s=0.0, handoff_s=0.0)
    for worker in workers:
        scheduler = engine_of(worker).scheduler
        price_of = scheduler._sourcing.price_of
        scheduler.set_prices(lambda copy, price_of=price_of: None if price_of(copy) is None else free)


def sources_of(worker) -> tuple[int, int]:
    """The prompt tokens that a worker had from peers, and those that it computed."""
    stats = engine_of(worker).scheduler.stats()
    return stats["num_prompt_tokens_peer"], stats["num_prompt_tokens_computed"]


async def test_prefill_pulls_a_prefix_that_a_third_worker_holds_and_computes_it_when_that_is_gone(model_dir, reference):
    shared, first, second = draw(NUM_SHARED, 40, 40)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        pull_for_nothing(pair.prefill, pair.decode)
        async with running_decode(options) as (holder, asked):
            await asked.finish(asked.send("held", shared))
            held = held_at(asked.address)
            answer = pair.ingress.send("pulled", shared + first, held=held)
            assert await pair.ingress.finish(answer) == [reference.greedy(shared + first, 16)]
            assert (answer.sources.peer, answer.sources.computed) == (NUM_SHARED, 40)
            assert sources_of(pair.prefill) == (NUM_SHARED, 40)
            await pair.idle()
            assert not engine_of(holder).pool.num_used
        engine_of(pair.prefill).pool.clear()
        engine_of(pair.decode).pool.clear()
        answer = pair.ingress.send("computed", shared + second, held=held)
        assert await pair.ingress.finish(answer) == [reference.greedy(shared + second, 16)]
        assert (answer.sources.peer, answer.sources.computed) == (0, NUM_SHARED + 40)


async def test_prefill_pulls_what_the_decode_worker_that_asks_it_holds(model_dir, reference):
    shared, first = draw(NUM_SHARED, 200)
    options = worker_options(model_dir)
    async with running_pair(options, options) as pair:
        pull_for_nothing(pair.prefill, pair.decode)
        await pair.ingress.finish(pair.ingress.send("held", shared))
        await pair.idle()
        engine_of(pair.prefill).pool.clear()
        before = sources_of(pair.prefill)
        answer = pair.ingress.send("pulled", shared + first, held=held_at(pair.ingress.address))
        assert await pair.ingress.finish(answer) == [reference.greedy(shared + first, 16)]
        assert (answer.sources.device, answer.sources.computed) == (NUM_SHARED, 200)
        peer, computed = sources_of(pair.prefill)
        assert (peer - before[0], computed - before[1]) == (NUM_SHARED, 200)
