"""What is asked of holders before a sequence is admitted, and what becomes of the answers."""

from __future__ import annotations

import pytest

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import SequenceSpec
from kvcache.pool import BlockPool
from messages.handoff import FoundRun
from messages.request import Copy, HeldRun, SamplingParams
from tests.engine.fake_worker import FakeWorker
from tests.fake_kv import BASES

NUM_BLOCKS = 9  #: of 4 tokens, that a prompt of 40 tokens can find


@pytest.fixture
def worker() -> FakeWorker:
    """One sequence at a time; its first one computes."""
    config = SchedulerConfig(
        max_model_len=80, max_num_seqs=1, max_num_batched_tokens=8, chunk_quantum_tokens=4, block_bytes=1
    )
    worker = FakeWorker(config, BlockPool(60, 4))
    add(worker, "first", BASES[0][:12])
    assert worker.ahead == {}
    return worker


def add(worker: FakeWorker, seq_id: str, tokens=BASES[1], held: tuple[HeldRun, ...] | None = ()) -> None:
    params = SamplingParams(max_tokens=4)
    worker.add(SequenceSpec(seq_id=seq_id, token_ids=tokens, num_prompt_tokens=len(tokens), params=params, held=held))


def held_at(*tiers, begin: int = 0) -> tuple[HeldRun, ...]:
    return (HeldRun(begin, NUM_BLOCKS, tuple(Copy(f"at {tier}", tier) for tier in tiers)),)


def end_first(worker: FakeWorker) -> None:
    worker.cancel("first")


def test_what_a_waiting_sequence_would_load_from_a_slow_tier_is_asked_for_and_loaded_from_where_it_was_brought(worker):
    add(worker, "r", held=held_at("disk"))
    assert worker.ahead == {("r", "at disk"): range(NUM_BLOCKS)}
    worker.find_ahead("r", "at disk", [FoundRun(0, NUM_BLOCKS, "disk")])
    worker.find_ahead("r", "at disk", [FoundRun(0, 7, "host")])
    assert worker.questions == {}
    end_first(worker)
    assert worker.ahead == {}
    assert worker.questions == {("r", "at disk"): range(7)}
    [load] = worker.scheduler._ledger.sequences["r"].plan.loads
    assert load == (0, 7, Copy("at disk", "host"))
    worker.drain()


def test_nothing_is_asked_for_that_lies_at_hand_somewhere_or_is_computed_sooner(worker):
    add(worker, "at hand", held=held_at("host", "disk"))
    add(worker, "no blocks", BASES[1][:3])
    assert worker.ahead == {}
    worker.drain()


def test_who_is_cancelled_while_it_waits_is_not_asked_for_any_more(worker):
    add(worker, "r", held=held_at("remote"))
    worker.cancel("r")
    assert worker.ahead == {}
    worker.drain()


def test_holders_are_asked_for_the_most_senior_ones_and_the_next_when_one_is_admitted(worker):
    for number in range(12):
        add(worker, f"r{number}", [number, *BASES[1]], held=held_at("disk"))
    assert [seq_id for seq_id, _ in worker.ahead] == [f"r{number}" for number in range(8)]
    end_first(worker)
    assert [seq_id for seq_id, _ in worker.ahead] == [f"r{number}" for number in range(1, 9)]
    worker.drain()


def test_where_nobody_said_who_holds_the_blocks_the_node_cache_is_asked_before_anything_is_computed(worker):
    end_first(worker)
    add(worker, "r", held=None)
    assert worker.ahead == {("r", "cache"): range(NUM_BLOCKS)}
    assert not worker.want_step()
    worker.find_ahead("r", "cache", [FoundRun(0, NUM_BLOCKS, "host")])
    assert worker.questions == {("r", "cache"): range(NUM_BLOCKS)}
    add(worker, "nowhere", BASES[0], held=None)
    worker.drain()


def test_an_answer_may_come_with_the_end_of_the_time_of_who_waits_for_it(worker):
    params = SamplingParams(max_tokens=4)
    deadline_s = worker.now_s + 1.0
    spec = SequenceSpec(
        seq_id="r", token_ids=BASES[1], num_prompt_tokens=40, params=params, held=None, deadline_s=deadline_s
    )
    worker.add(spec)
    worker.now_s = deadline_s
    worker.find_ahead("r", "cache", [])
    assert worker.sequences["r"].is_over
    assert worker.ahead == {}
    worker.drain()


def test_without_a_node_cache_nobody_waits_for_its_answer(worker):
    end_first(worker)
    worker.scheduler.set_node_cache("")
    add(worker, "r", held=None)
    assert worker.want_step()
    worker.drain()


def test_what_the_pool_holds_is_not_asked_for(worker):
    end_first(worker)
    add(worker, "r")
    worker.drain()
    add(worker, "same", held=None)
    assert worker.ahead == {}
    assert worker.want_step()
    worker.drain()
