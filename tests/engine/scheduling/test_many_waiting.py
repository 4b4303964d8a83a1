"""Many sequences at once: what one of them costs does not grow with the others."""

from __future__ import annotations

import math

import pytest

from engine.scheduling import admission
from engine.scheduling import ledger as ledger_module
from engine.scheduling.backlog import Backlog
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import FoundAhead, SequenceAdded, SequenceCancelled, SequenceSpec, TimePassed
from engine.scheduling.prompt_names import PromptNames
from engine.scheduling.step_cost import StepCost
from kvcache.names import block_names, pack_tokens, split_names
from messages.request import SamplingParams
from tests.engine.scheduling.ledger_bench import LedgerBench
from tests.engine.scheduling.scheduler_bench import PROMPT, Bench

LONG = list(range(100, 160))  # fifteen blocks


def waiting_behind_a_writer(num_waiting: int, **config: object) -> Bench:
    """A sequence that is computing the long prompt, and others that wait for it to."""
    bench = Bench(max_num_batched_tokens=8, **config)
    bench.add("writer", LONG)
    bench.start()
    for number in range(num_waiting):
        bench.add(f"s{number}", LONG)
    return bench


def lookups_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many names each later match is asked about."""
    found: list[int] = []
    match = bench.pool.match

    def counted(names):
        names = list(names)
        found.append(len(names))
        return match(names)

    monkeypatch.setattr(bench.pool, "match", counted)
    return found


def test_who_comes_is_looked_at_alone(monkeypatch):
    bench = waiting_behind_a_writer(20)
    lookups = lookups_of(bench, monkeypatch)
    bench.add("last", LONG)
    assert len(lookups) == 2  # as it arrives, and as it might be admitted
    assert bench.scheduler.num_waiting == 21


def test_who_waits_for_a_long_prompt_is_looked_at_again_when_all_of_it_is_written(monkeypatch):
    bench = waiting_behind_a_writer(5)
    lookups = lookups_of(bench, monkeypatch)
    num_looked_at = []
    while bench.scheduler.num_waiting:
        lookups.clear()
        bench.finish()
        num_looked_at.append(len(lookups))
        bench.start()
    assert num_looked_at == [0] * (len(num_looked_at) - 1) + [5]
    assert len(num_looked_at) == 7  # chunks of eight tokens, the last of which has a block that the others match
    assert bench.scheduler.num_running == 6


def test_where_the_writer_ends_early_the_next_one_writes_on():
    bench = waiting_behind_a_writer(3)
    bench.finish()
    bench.post(SequenceCancelled("writer"))
    assert [part.seq_id for part in bench.start()] == ["s0"]
    assert bench.parts[0].start == 8  # what was written is used
    bench.finish()
    assert bench.run().keys() == {"s0", "s1", "s2"}


def test_so_many_blocks_are_looked_at_in_an_event_and_seniors_are_not_overtaken(monkeypatch):
    monkeypatch.setattr(admission, "_MAX_LOOKED_AT", 20)  # two of fifteen blocks
    bench = waiting_behind_a_writer(6)
    while bench.scheduler.num_waiting == 6:
        bench.finish()
        num_found = bench.scheduler.num_running - 1
        bench.start()
    assert num_found in (0, 2)
    bench.add("late", 3)  # a short one that nothing else keeps from running
    assert "late" not in bench.scheduler._ledger.running
    order = list(bench.scheduler._ledger.running)
    while bench.scheduler.num_waiting:
        bench.finish()
        bench.start()
        order += [seq_id for seq_id in bench.scheduler._ledger.running if seq_id not in order]
    assert order == ["writer", *(f"s{number}" for number in range(6)), "late"]


def test_time_that_passed_for_one_that_waits_is_noticed_as_another_comes():
    bench = waiting_behind_a_writer(1)
    held = bench.scheduler._ledger.waiting[0]
    held.held_until_s = bench.scheduler._admission._look_again_s = 5.0
    bench.now_s = 6.0
    bench.add("next", LONG)
    assert held.held_until_s == math.inf  # it was looked at again, and waits for who runs


def test_whose_time_ends_as_another_comes_leaves_its_place_to_who_waited_and_counts_no_more():
    bench = Bench(max_num_batched_tokens=8)
    bench.add("writer", LONG, deadline_s=5.0)
    bench.start()
    bench.add("waits", LONG)
    bench.finish()
    bench.now_s = 5.0
    bench.add("next", 9)
    assert bench.scheduler._ledger.running.keys() == {"waits", "next"}
    assert bench.scheduler._backlog.seconds() == pytest.approx(bench.scheduler.queued_s)
    bench.run()


def test_blocks_of_many_that_end_at_once_are_given_back_bit_by_bit_and_sooner_where_they_are_wanted(monkeypatch):
    monkeypatch.setattr(ledger_module, "_MAX_GIVEN_BACK", 10)
    bench = Bench(num_blocks=40, max_num_batched_tokens=200)
    for number in range(4):
        bench.add(f"s{number}", 30)
    bench.step()
    for number in range(4):  # eight blocks each
        bench.scheduler._ledger.end(bench.scheduler._ledger.sequences[f"s{number}"])
    bench.scheduler.check_invariants()
    assert bench.pool.num_used == 16
    taker = bench.scheduler._ledger
    bench.add("next", PROMPT)
    assert taker.running.keys() == {"next"}
    assert bench.pool.num_used <= 8
    bench.run()
    assert bench.pool.num_used == 0


def test_room_that_the_dead_still_hold_is_taken_before_anybody_is_preempted(monkeypatch):
    monkeypatch.setattr(ledger_module, "_MAX_GIVEN_BACK", 0)
    bench = LedgerBench(8)
    first, second = bench.running("a", list(range(16))), bench.running("b", list(range(50, 66)))
    for seq in (first, second):
        assert bench.ledger.reserve(seq, 16)
    bench.ledger.end(first)
    assert bench.pool.num_free == 0
    second.token_ids.extend(range(16))
    assert bench.ledger.reserve(second, 32)
    assert bench.ledger.num_preemptions == 0
    bench.ledger.check_invariants()


def looks_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whom it is asked of whether they are short."""
    found: list[str] = []
    is_short = bench.scheduler._room.is_short
    monkeypatch.setattr(bench.scheduler._room, "is_short", lambda seq: (found.append(seq.seq_id), is_short(seq))[1])
    return found


def test_who_waits_for_an_answer_is_not_looked_at(monkeypatch):
    bench = Bench()
    bench.scheduler.set_node_cache("cache")
    for number in range(20):
        bench.add(f"s{number}", 20, held=None)
    looks = looks_of(bench, monkeypatch)
    bench.post(TimePassed())
    assert looks == []
    bench.post(FoundAhead("s7", "cache", ()))
    assert looks == ["s7"]
    bench.post(SequenceCancelled("s8"))
    assert bench.scheduler._prefetches.check_invariants() == []


def test_behind_many_that_find_no_room_short_ones_are_looked_for_bit_by_bit(monkeypatch):
    monkeypatch.setattr(admission, "_MAX_SEARCHED", 5)
    monkeypatch.setattr("engine.scheduling.room.SHORT_TOKENS", 4)
    bench = Bench(num_blocks=32, max_num_batched_tokens=8)
    bench.add("runs", 20)
    bench.start()
    for number in range(20):
        bench.add(f"long{number}", 100)
    looks = looks_of(bench, monkeypatch)
    found = []
    for _ in range(4):
        looks.clear()
        bench.post(TimePassed())
        found += looks[1:]
        assert len(looks) <= 6
    assert found == [f"long{number}" for number in range(1, 20)]
    bench.scheduler._admission._blocked = bench.scheduler._ledger.ready[0]
    bench.scheduler._admission._is_full = True  # so that it is not looked at as it comes
    bench.add("behind", 4)
    for _ in range(4):
        bench.post(TimePassed())
    assert bench.scheduler._ledger.running.keys() == {"runs", "behind"}


# ----------------------------------------------------------------------------------------------------------- the names


def spec_of(token_ids: list[int], salt: bytes = b"") -> SequenceSpec:
    return SequenceSpec(
        seq_id="s",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(max_tokens=1),
        salt=salt,
    )


def test_choices_that_share_their_tokens_are_named_once_and_go_on_alone():
    prompts, tokens = PromptNames(b"model", 4), list(range(10))
    first_namer, first = prompts.of(spec_of(tokens))
    assert prompts.is_known(spec_of(tokens))
    second_namer, second = prompts.of(spec_of(tokens))
    assert first == second == split_names(block_names(b"model", b"", pack_tokens(range(10)), 4))
    assert first is not second
    for namer, tail in ((first_namer, [8, 9, 1, 1]), (second_namer, [8, 9, 2, 2])):
        expected = split_names(block_names(b"model", b"", pack_tokens([*range(8), *tail]), 4))
        assert namer.extend(pack_tokens(tail)) == expected[2:]


def test_the_same_tokens_in_another_list_or_under_another_salt_are_looked_at_anew():
    prompts, tokens = PromptNames(b"model", 4), list(range(10))
    _, names = prompts.of(spec_of(tokens))
    assert not prompts.is_known(spec_of(list(tokens)))
    assert not prompts.is_known(spec_of(tokens, b"salt"))
    assert prompts.of(spec_of(tokens, b"salt"))[1] != names


# --------------------------------------------------------------------------------------------------------- the backlog


def test_seconds_that_are_remembered_are_those_that_adding_up_gives():
    bench = Bench(max_num_batched_tokens=8, max_num_seqs=3)
    ledger: SequenceLedger = bench.scheduler._ledger
    for number, size in enumerate([60, 9, 60, 30, 5]):
        bench.scheduler.on_event(SequenceAdded(spec_named(f"s{number}", size)), 0.0)
        remembered = bench.scheduler._backlog
        remembered.remember()
        assert remembered.seconds() == pytest.approx(Backlog(ledger, StepCost()).seconds())
    assert ledger.waiting


def spec_named(seq_id: str, size: int) -> SequenceSpec:
    return SequenceSpec(
        seq_id=seq_id,
        token_ids=list(range(size)),
        num_prompt_tokens=size,
        params=SamplingParams(max_tokens=3),
    )


def test_a_pool_is_as_it_was_when_all_have_gone():
    bench = waiting_behind_a_writer(7, max_num_seqs=3)
    bench.finish()
    assert bench.run().keys() == {"writer", *(f"s{number}" for number in range(7))}
    assert (bench.pool.num_used, bench.scheduler._ledger.in_flight) == (0, {})


def test_who_comes_does_not_overtake_one_that_was_preempted():
    bench = Bench(num_blocks=12, max_num_seqs=4)
    bench.add("old", 20, max_tokens=40)
    bench.add("young", 20, max_tokens=40)
    while bench.start() and not bench.scheduler._ledger.num_preemptions:
        bench.finish()
    assert [seq.seq_id for seq in bench.scheduler._ledger.waiting] == ["young"]
    bench.add("next", 9)
    assert "next" not in bench.scheduler._ledger.running
