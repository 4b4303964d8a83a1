"""What is asked of holders before a sequence is admitted, and what becomes of the answers."""

from __future__ import annotations

import random

import pytest

from engine.scheduling import prefetches
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import BlocksOffered, SequenceSpec, TimePassed
from kvcache import load_plan
from kvcache.locations import BlockLocation, pack_locations
from kvcache.pool import BlockPool
from messages.handoff import FoundRun
from messages.price import MovePrice
from messages.request import Copy, HeldRun, SamplingParams
from tests.engine.fake_worker import FakeWorker
from tests.fake_kv import BASES

NUM_BLOCKS = 9  #: of 4 tokens, that a prompt of 40 tokens can find


@pytest.fixture
def worker() -> FakeWorker:
    return worker_of(60)


def worker_of(num_blocks: int) -> FakeWorker:
    """One sequence at a time; its first one computes."""
    config = SchedulerConfig(
        max_model_len=80, max_num_seqs=1, max_num_batched_tokens=8, chunk_quantum_tokens=4, block_bytes=1
    )
    worker = FakeWorker(config, BlockPool(num_blocks, 4))
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


def test_what_a_waiting_sequence_would_load_from_a_slow_tier_is_asked_for_and_taken_in_from_where_it_was_brought(
    worker,
):
    add(worker, "r", held=held_at("disk"))
    assert worker.ahead == {("r", "at disk"): range(NUM_BLOCKS)}
    worker.find_ahead("r", "at disk", [FoundRun(0, NUM_BLOCKS, "disk")])
    assert worker.questions == {}
    worker.find_ahead("r", "at disk", [FoundRun(0, 7, "host")])
    assert worker.questions == {("r", "at disk"): range(7)}
    assert worker.ahead == {}
    end_first(worker)
    assert worker.questions == {("r", "at disk"): range(7)}  # nothing was offered yet: it asks anew
    [load] = worker.scheduler._ledger.sequences["r"].plan.loads
    assert load == (0, 7, Copy("at disk", "host"))
    worker.drain()


def test_nothing_is_brought_from_behind_the_prompt_of_one_whose_prompt_a_prefill_worker_may_compute(worker):
    spec = SequenceSpec(
        seq_id="moved", token_ids=BASES[1], num_prompt_tokens=16, params=SamplingParams(max_tokens=40), remote_s=9.0,
        remote_source="far", held=held_at("disk"),
    )  # fmt: skip
    worker.add(spec)
    worker.find_ahead("moved", "at disk", [FoundRun(0, 7, "host")])
    assert worker.questions == {("moved", "at disk"): range(4)}
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


# ------------------------------------------------------------------------------------------------------- into the pool


def take_in(worker: FakeWorker, seq_id: str, source: str, indexes=range(NUM_BLOCKS)) -> None:
    """The source has those blocks that it was asked for, and they come."""
    worker.offer_blocks(seq_id, source, list(indexes), is_last=True)
    if seq_id in worker.pulls:
        worker.end_pull(seq_id)


def sources_of(worker: FakeWorker, seq_id: str) -> dict[str, int]:
    """Where the KV of an admitted sequence's prompt came from so far, in tokens."""
    seq = worker.scheduler._ledger.sequences[seq_id]
    return {"device": seq.num_device_tokens, **seq.num_loaded_tokens}


def intake_ids(worker: FakeWorker) -> tuple[str, ...]:
    return worker.scheduler._ledger.intakes.ids()


@pytest.mark.parametrize("tier", ["host", "device"])
def test_what_is_at_hand_is_taken_in_while_its_sequence_waits_and_found_when_that_is_admitted(worker, tier):
    add(worker, "r", held=held_at(tier))
    assert worker.questions == {("r", f"at {tier}"): range(NUM_BLOCKS)}
    take_in(worker, "r", f"at {tier}")
    assert worker.questions == {}
    assert worker.scheduler.num_blocks_taken_in == NUM_BLOCKS
    assert worker.pool.num_used <= 3  # those of the first one: who waits pins nothing
    end_first(worker)
    assert worker.questions == {}
    assert sources_of(worker, "r") == {"device": 0, tier: 4 * NUM_BLOCKS}
    worker.drain()


def test_who_is_admitted_while_its_blocks_are_pulled_goes_on_with_that_pull(worker):
    add(worker, "r", held=held_at("host"))
    worker.offer_blocks("r", "at host", list(range(NUM_BLOCKS)), is_last=True)
    assert list(worker.pulls) == ["r"]
    end_first(worker)
    assert worker.scheduler.num_pulling == 1
    assert (worker.questions, intake_ids(worker)) == ({}, ())
    worker.end_pull("r")
    assert sources_of(worker, "r") == {"device": 0, "host": 4 * NUM_BLOCKS}
    worker.drain()
    assert worker.scheduler.stats()["num_remote_fallbacks"] == 0


def test_what_else_it_lacks_is_asked_for_beside_the_pull_that_it_goes_on_with(worker):
    runs = (HeldRun(0, 5, (Copy("at host", "host"),)), HeldRun(5, NUM_BLOCKS, (Copy("a peer", "device"),)))
    add(worker, "r", held=runs)
    assert worker.questions == {("r", "at host"): range(5)}
    worker.offer_blocks("r", "at host", [0, 1, 2], is_last=True)  # it has lost two of them
    end_first(worker)
    assert worker.questions == {("r", "a peer"): range(5, NUM_BLOCKS)}
    worker.offer_blocks("r", "a peer", list(range(5, NUM_BLOCKS)), is_last=True)
    worker.end_pull("r")
    worker.end_pull("r")
    worker.drain()


def test_what_is_offered_while_its_blocks_are_pulled_comes_to_the_one_that_was_admitted_meanwhile(worker):
    add(worker, "r", held=held_at("host"))
    worker.offer_blocks("r", "at host", [0, 1, 2], is_last=False)
    worker.offer_blocks("r", "at host", [3, 4], is_last=False)
    end_first(worker)
    worker.offer_blocks("r", "at host", list(range(5, NUM_BLOCKS)), is_last=True)
    worker.end_pull("r")
    worker.end_pull("r")
    assert sources_of(worker, "r") == {"device": 0, "host": 4 * NUM_BLOCKS}
    worker.drain()


def test_a_block_that_came_badly_while_it_waited_is_had_from_elsewhere_when_it_runs(worker):
    add(worker, "r", held=held_at("host", "device"))
    worker.offer_blocks("r", "at device", list(range(NUM_BLOCKS)), is_last=True)
    worker.end_pull("r", bad={4})
    assert worker.pool.num_used <= 3
    end_first(worker)
    assert worker.questions == {("r", "at device"): range(4, 5)}
    take_in(worker, "r", "at device", [])
    assert worker.questions == {("r", "at host"): range(4, 5)}
    worker.drain()


def test_late_bytes_of_what_came_badly_hit_nobody(worker):
    add(worker, "r", held=held_at("host"))
    worker.offer_blocks("r", "at host", list(range(NUM_BLOCKS)), is_last=True)
    end_first(worker)
    worker.end_pull("r", bad={0, 1}, quarantine_until_s=worker.now_s + 5)
    assert worker.pool.num_quarantined == 2
    worker.drain()


def test_a_holder_that_dies_midway_leaves_what_came_and_the_rest_is_had_from_elsewhere(worker):
    add(worker, "r", held=held_at("host", "device"))
    worker.offer_blocks("r", "at device", [0, 1, 2, 3], is_last=False)
    worker.offer_blocks("r", "at device", [], is_last=True)
    worker.end_pull("r")
    assert intake_ids(worker) == ()
    end_first(worker)
    assert worker.questions == {("r", "at device"): range(4, NUM_BLOCKS)}
    worker.drain()


@pytest.mark.parametrize("stage", ["asked", "pulled", "offered in part", "there"])
def test_nothing_is_left_of_who_is_cancelled_while_its_blocks_come(worker, stage):
    add(worker, "r", held=held_at("host"))
    if stage != "asked":
        worker.offer_blocks("r", "at host", [0, 1, 2], is_last=stage != "offered in part")
    if stage == "there":
        worker.end_pull("r")
    worker.cancel("r")
    assert intake_ids(worker) == ()
    if worker.pulls:
        assert worker.pool.num_used <= 3 + 3  # what is being written
        worker.end_pull("r")
    assert worker.pool.num_used <= 3
    assert worker.pool.num_named == (0 if stage == "asked" else 3)  # of use to the next one
    worker.drain()


def test_who_ends_by_its_deadline_while_its_blocks_come_leaves_nothing(worker):
    params = SamplingParams(max_tokens=4)
    spec = SequenceSpec(
        seq_id="r",
        token_ids=BASES[1],
        num_prompt_tokens=40,
        params=params,
        held=held_at("host"),
        deadline_s=worker.now_s + 1,
    )
    worker.add(spec)
    worker.offer_blocks("r", "at host", list(range(NUM_BLOCKS)), is_last=True)
    worker.now_s += 1
    worker.post(TimePassed())
    assert worker.sequences["r"].is_over
    worker.drain()


def test_a_source_that_never_answers_pins_blocks_for_a_while_only(worker):
    worker.take_in("first", 0, None)
    add(worker, "r", held=held_at("host"))
    worker.offer_blocks("r", "at host", [0], is_last=False)
    worker.now_s += 31
    worker.post(TimePassed())
    assert (intake_ids(worker), worker.questions) == ((), {})
    assert worker.pool.num_used <= 3 + 1  # what is being written
    end_first(worker)
    assert worker.questions == {}  # one pull at a time: it computes
    worker.drain()


def test_a_prompt_is_not_handed_over_while_an_earlier_pull_for_it_still_runs(worker):
    spec = SequenceSpec(
        seq_id="r", token_ids=BASES[1], num_prompt_tokens=40, params=SamplingParams(max_tokens=4), remote_s=0.0,
        remote_source="far", held=held_at("host"),
    )  # fmt: skip
    worker.add(spec)
    worker.offer_blocks("r", "at host", [0], is_last=False)
    worker.now_s += 31
    worker.post(TimePassed())
    assert list(worker.pulls) == ["r"]
    end_first(worker)
    assert (worker.asked, worker.scheduler.declined_ids()) == ({}, ("r",))
    worker.drain()


@pytest.mark.parametrize("bad", [(), (1,)])
def test_what_comes_too_late_is_not_taken_in_a_second_time_while_it_is_still_written(worker, bad):
    worker.take_in("first", 0, None)
    names = worker.taken_in["intake 1"]
    worker.offer_blocks("intake 1", "near", [0, 1], is_last=False)
    worker.now_s += 31
    worker.post(TimePassed())
    assert (intake_ids(worker), worker.questions, list(worker.pulls)) == ((), {}, ["intake 1"])
    worker.take_in("first", 0, None)
    assert worker.taken_in["intake 2"] == names[2:]
    worker.post(
        BlocksOffered("intake 1", "near", pack_locations([BlockLocation(2, 7, 7, names[2], 4)]), is_last=True)
    )  # late as well
    assert list(worker.pulls) == ["intake 1"]
    worker.end_pull("intake 1", bad=set(bad))
    worker.take_in("first", 0, None)  # what came is here, what came badly is wanted
    assert worker.taken_in.get("intake 3", ()) == tuple(names[index] for index in bad)
    worker.drain()


def test_what_is_still_written_for_one_that_was_cancelled_is_not_taken_in_for_the_next(worker):
    add(worker, "r", held=held_at("host"))
    worker.offer_blocks("r", "at host", [0, 1, 2], is_last=True)
    worker.cancel("r")
    add(worker, "same", held=held_at("host"))
    assert worker.questions == {("same", "at host"): range(3, NUM_BLOCKS)}
    worker.end_pull("r")
    take_in(worker, "same", "at host", range(3, NUM_BLOCKS))
    assert worker.scheduler.num_blocks_taken_in == NUM_BLOCKS - 3
    end_first(worker)
    assert worker.questions == {}
    worker.drain()


def test_what_is_at_hand_of_a_source_that_still_reads_the_rest_waits_for_that(worker):
    here, slow = Copy("a cache", "host"), Copy("a cache", "disk")
    add(worker, "r", held=(HeldRun(0, 3, (here,)), HeldRun(3, NUM_BLOCKS, (slow,))))
    assert worker.ahead == {("r", "a cache"): range(3, NUM_BLOCKS)}
    assert worker.questions == {}
    worker.find_ahead("r", "a cache", [FoundRun(3, NUM_BLOCKS, "host")])
    assert worker.questions == {("r", "a cache"): range(NUM_BLOCKS)}
    worker.drain()


def test_sources_take_turns_and_two_sequences_pull_at_a_time():
    worker = worker_of(400)
    runs = (HeldRun(0, 5, (Copy("at host", "host"),)), HeldRun(5, NUM_BLOCKS, (Copy("a peer", "device"),)))
    for number in range(3):
        add(worker, f"r{number}", [number, *BASES[1]], held=runs)
    assert list(worker.questions) == [("r0", "at host"), ("r1", "at host")]
    take_in(worker, "r0", "at host", range(5))
    assert list(worker.questions) == [("r1", "at host"), ("r0", "a peer")]
    take_in(worker, "r0", "a peer", range(5, NUM_BLOCKS))
    assert list(worker.questions) == [("r1", "at host"), ("r2", "at host")]
    worker.drain()


def test_a_share_of_the_pool_at_most_is_filled_for_those_who_wait(worker):
    for number in range(3):
        add(worker, f"r{number}", [number, *BASES[1]], held=held_at("host"))
        if ("r" + str(number), "at host") in worker.questions:
            take_in(worker, f"r{number}", "at host", worker.questions[f"r{number}", "at host"])
    assert worker.scheduler.num_blocks_taken_in == 60 // 4
    end_first(worker)  # the first of them is admitted: there is room for the next
    assert worker.questions == {("r2", "at host"): range(NUM_BLOCKS)}
    worker.drain()


@pytest.mark.parametrize("is_pulled", [False, True])
def test_who_runs_grows_into_the_room_that_is_held_for_those_who_wait(is_pulled):
    worker = worker_of(20)
    end_first(worker)
    params = SamplingParams(max_tokens=64)
    worker.add(SequenceSpec(seq_id="grows", token_ids=BASES[0][:12], num_prompt_tokens=12, params=params))
    add(worker, "r", held=held_at("host"))
    assert worker.questions == {("r", "at host"): range(5)}
    if is_pulled:
        worker.offer_blocks("r", "at host", [0], is_last=False)
    while not worker.sequences["grows"].is_over:
        assert worker.want_step()
        worker.end_step()
    assert worker.scheduler.stats()["num_preemptions"] == 0
    worker.drain()


def test_nothing_is_asked_for_ahead_while_one_that_was_admitted_pulls(worker):
    add(worker, "r0", [0, *BASES[1]], held=held_at("host"))
    worker.offer_blocks("r0", "at host", list(range(NUM_BLOCKS)), is_last=True)
    end_first(worker)
    add(worker, "r1", [1, *BASES[1]], held=held_at("host"))
    assert list(worker.pulls) == ["r0"]
    assert worker.questions == {}
    worker.end_pull("r0")
    assert worker.questions == {("r1", "at host"): range(NUM_BLOCKS)}
    worker.drain()


def test_a_slow_source_brings_portions_and_who_is_admitted_computes_while_the_tail_is_loaded(monkeypatch):
    monkeypatch.setattr(load_plan, "_HALF_BATCH_S", 0.0)  # blocks here are a few and small
    worker = worker_of(100)
    monkeypatch.setattr(prefetches, "_PORTION_S", 0.03)
    block_s = 0.012
    worker.scheduler.set_prices(
        lambda copy: MovePrice(source=copy.address, tier=copy.tier, road="", fixed_s=0, byte_s=block_s, handoff_s=0)
    )
    add(worker, "r", held=held_at("host"))
    worker.offer_blocks("r", "at host", list(range(NUM_BLOCKS)), is_last=True)
    assert [location.index for location, _ in worker.pulls["r"][0]] == [0, 1]
    worker.end_pull("r")
    assert [location.index for location, _ in worker.pulls["r"][0]] == [2, 3]
    worker.scheduler.set_prices(
        lambda copy: MovePrice(source=copy.address, tier=copy.tier, road="", fixed_s=0, byte_s=0.005, handoff_s=0)
    )
    end_first(worker)
    seq = worker.scheduler._ledger.sequences["r"]
    assert (seq.pull.is_mixed, seq.num_computed, worker.scheduler.num_pulling) == (True, 8, 1)
    worker.end_pull("r")
    assert max(location.index for location, _ in worker.pulls["r"][0]) == NUM_BLOCKS - 1
    worker.drain()
    assert worker.scheduler.stats()["num_remote_fallbacks"] == 0


def test_of_the_same_blocks_only_one_pull_runs():
    worker = worker_of(400)
    add(worker, "r", held=held_at("host"))
    add(worker, "same", held=held_at("host"))
    assert list(worker.questions) == [("r", "at host")]
    add(worker, "first again", BASES[0][:20], held=held_at("host"))  # the first one is about to write its head
    assert worker.questions["first again", "at host"] == range(3, 4)
    worker.drain()


def test_nothing_is_taken_in_where_others_want_the_room():
    worker = worker_of(16)  # the first one has 3, one is left for it to grow into
    add(worker, "senior", BASES[0][1:])
    add(worker, "r", held=held_at("host"))
    assert worker.questions == {}
    worker.cancel("senior")
    assert worker.questions == {("r", "at host"): range(4)}  # a share of 16
    worker.drain()


def drive_at_random(seed: int, num_events: int) -> FakeWorker:
    """Long prompts that two holders have, each one's own, one or two slots, and whatever may happen while they wait."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        max_model_len=80,
        max_num_seqs=rng.randint(1, 2),
        max_num_batched_tokens=8,
        chunk_quantum_tokens=4,
        block_bytes=1,
    )
    worker = FakeWorker(config, BlockPool(rng.choice([40, 80, 160]), 4))
    for number in range(num_events):
        waiting = [seq.seq_id for seq in worker.scheduler._ledger.waiting]
        action = rng.random()
        if action < 0.1 and len(waiting) < 5:
            cut = rng.randint(1, NUM_BLOCKS)
            copies = [(Copy(rng.choice(["near", "far"]), rng.choice(["host", "device", "disk"])),) for _ in range(2)]
            held = (HeldRun(0, cut, copies[0]), HeldRun(cut, NUM_BLOCKS + 1, copies[1]))
            spec = SequenceSpec(
                seq_id=f"r{number}",
                token_ids=[*BASES[number % 2], number % 5],
                num_prompt_tokens=41,
                params=SamplingParams(max_tokens=rng.randint(1, 8)),
                salt=bytes([rng.randrange(20)]),
                priority=rng.choice([0, 0, 0, -1]),
                deadline_s=rng.choice([None, None, worker.now_s + 20]),
                remote_s=rng.choice([None, None, None, 0.02]),
                held=held,
            )
            worker.add(spec)
        elif action < 0.13 and waiting:
            worker.cancel(rng.choice(waiting))
        elif action < 0.3 and worker.questions:
            seq_id, source = rng.choice(list(worker.questions))
            indexes = [index for index in worker.questions[seq_id, source] if rng.random() < 0.9]
            worker.offer_blocks(seq_id, source, indexes, is_last=rng.random() < 0.7)
        elif action < 0.4 and worker.pulls:
            seq_id = rng.choice(list(worker.pulls))
            bad = {location.index for location, _ in worker.pulls[seq_id][0] if rng.random() < 0.1}
            worker.end_pull(seq_id, bad, worker.now_s + 3 if bad and rng.random() < 0.5 else None)
        elif action < 0.43 and worker.ahead:
            key = rng.choice(list(worker.ahead))
            span = worker.ahead[key]
            worker.find_ahead(*key, [FoundRun(span.start, span.stop, rng.choice(["host", "disk"]))])
        elif action < 0.45 and worker.asked:
            worker.offer(rng.choice(list(worker.asked)), list(range(11)), is_last=True)
        elif action < 0.46:
            worker.now_s += rng.choice([1.0, 12.0])
            worker.post(TimePassed())
        elif worker.step is not None:
            worker.end_step()
        else:
            worker.want_step()
    return worker


@pytest.mark.slow
def test_whatever_happens_while_they_wait_every_token_comes_and_nothing_is_left() -> None:
    num_taken_in = num_joined = num_left = num_quarantined = 0
    for seed in range(40):
        worker = drive_at_random(seed, 300)
        worker.drain()
        num_taken_in += worker.scheduler.num_blocks_taken_in
        num_joined += worker.num_joined
        num_left += worker.num_left
        num_quarantined += worker.pool.stats.num_quarantined_blocks
    assert num_taken_in > 200
    assert min(num_joined, num_left, num_quarantined) > 10
