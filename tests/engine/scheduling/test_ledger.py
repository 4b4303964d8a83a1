"""The scheduler's books: who is in which phase, whose blocks are whose, and that a slip in them is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.scheduling.intake import PullTarget
from engine.scheduling.sequence import Phase, Sequence
from kvcache.locations import pack_locations, unpack_locations
from kvcache.pool import BlockState
from messages.errors import InvariantError
from tests.engine.scheduling.ledger_bench import LedgerBench, locations

PROMPT = list(range(100, 111))  # two full blocks and three tokens


@pytest.fixture
def bench():
    bench = LedgerBench()
    yield bench
    bench.ledger.check_invariants()


def ids(sequences) -> list[str]:
    return [seq.seq_id for seq in sequences]


# -------------------------------------------------------------------------------------------------------------- phases


def test_the_queue_is_in_order_of_priority_then_of_arrival_and_who_comes_back_takes_the_old_place(bench):
    for seq_id, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0)):
        bench.waiting(seq_id, 3, priority=priority)
    assert ids(bench.ledger.waiting) == ["c", "a", "d", "b"]
    a = bench.ledger.sequences["a"]
    bench.ledger.admit(a, [])
    bench.ledger.preempt(a)
    assert ids(bench.ledger.waiting) == ["c", "a", "d", "b"]


def test_what_a_sequence_writes_is_its_tenants(bench):
    seq = bench.running("a", PROMPT, tenant=7)
    bench.compute(seq, 8)
    assert [bench.pool.tenant(block_id) for block_id in seq.block_table] == [7, 7]


def test_who_is_admitted_holds_what_was_found_and_announces_the_rest(bench):
    bench.hold(PROMPT[:4])
    seq = bench.running("a", PROMPT)
    assert (seq.phase, seq.num_computed, seq.num_device_tokens) == (Phase.RUNNING, 4, 4)
    assert [bench.pool.num_pins(block_id) for block_id in seq.block_table] == [1]
    assert bench.ledger.in_flight == {seq.names[1]: seq}
    assert seq.slot is not None


def test_tokens_found_after_the_first_emission_were_not_the_prompts_source(bench):
    bench.hold(PROMPT)
    seq = bench.waiting("a", PROMPT)
    seq.has_emitted, seq.num_device_tokens = True, 0
    bench.ledger.admit(seq, bench.pool.match(seq.names))
    assert (seq.num_computed, seq.num_device_tokens) == (8, 0)


def test_who_announced_a_block_first_is_waited_for_until_it_goes(bench):
    first, second = bench.running("a", PROMPT), bench.running("b", PROMPT)
    assert set(bench.ledger.in_flight.values()) == {first}
    bench.ledger.end(second)
    assert set(bench.ledger.in_flight.values()) == {first}
    bench.ledger.end(first)
    assert bench.ledger.in_flight == {}


def test_a_pull_has_blocks_for_the_whole_prompt_and_no_slot(bench):
    bench.hold(PROMPT[:4])
    seq = bench.pulling("a", PROMPT, generated=2)
    assert (seq.phase, seq.slot, len(seq.block_table)) == (Phase.PULLING, None, 3)
    assert seq.pull is not None
    assert (seq.pull.first_index, seq.pull.deadline_s) == (1, 30.0)
    assert ids(bench.ledger.pulling.values()) == ["a"]
    assert bench.ledger.running == {}


@pytest.mark.parametrize(("num_blocks", "num_computed"), [(0, 0), (1, 4), (2, 8), (3, 11)])
def test_of_a_pull_the_first_blocks_are_kept_and_the_others_given_back(bench, num_blocks, num_computed):
    seq = bench.pulling("a", PROMPT)
    seq.num_passed_over = 3
    bench.append(seq)
    bench.ledger.end_pull(seq, num_blocks)
    assert (seq.phase, seq.num_computed, len(seq.block_table)) == (Phase.RUNNING, num_computed, num_blocks)
    assert bench.pool.num_used == num_blocks
    assert (seq.pull, seq.num_passed_over) == (None, 0)
    assert seq.slot is not None


def test_what_is_kept_holds_its_blocks_and_nobody_waits_for_it(bench):
    seq = bench.running("a", PROMPT)
    bench.compute(seq, 11)
    bench.ledger.keep(seq)
    assert (seq.phase, seq.slot, bench.pool.num_used) == (Phase.KEPT, None, 3)
    assert bench.ledger.running == {}
    bench.ledger.end(seq)
    assert (bench.pool.num_used, bench.ledger.sequences) == (0, {})


def test_who_is_preempted_comes_back_by_what_it_computed(bench):
    seq = bench.running("a", PROMPT)
    bench.compute(seq, 11)
    bench.append(seq)
    bench.append(seq)
    bench.compute(seq, 12)
    bench.ledger.preempt(seq)
    assert (seq.phase, seq.block_table, seq.num_computed, seq.slot) == (Phase.WAITING, [], 0, None)
    assert (bench.pool.num_used, bench.ledger.num_preemptions) == (0, 1)
    assert bench.ledger.in_flight == {}
    assert len(bench.pool.match(seq.names)) == 3, "generated blocks are named too"


@pytest.mark.parametrize("has_emitted", [False, True])
def test_a_preemption_before_the_first_token_begins_the_prompts_count_anew(bench, has_emitted):
    seq = bench.running("a", PROMPT)
    seq.has_emitted, seq.num_device_tokens, seq.num_peer_tokens, seq.num_offered_blocks = has_emitted, 4, 4, 1
    seq.prompt_logprobs = [None, None]
    bench.ledger.preempt(seq)
    assert (seq.num_device_tokens, seq.num_peer_tokens) == ((4, 4) if has_emitted else (0, 0))
    assert len(seq.prompt_logprobs) == (2 if has_emitted else 1)
    assert seq.num_offered_blocks == 0


@pytest.mark.parametrize("phase", ["waiting", "running", "pulling"])
def test_nothing_is_left_of_who_ends_in_any_phase_and_nobody_ends_twice(bench, phase):
    seq = getattr(bench, phase)("a", PROMPT)
    bench.ledger.end(seq)
    assert seq.phase is Phase.ENDED
    assert bench.pool.num_used == 0
    books = bench.ledger
    assert (books.sequences, books.waiting, books.running, books.pulling, books.in_flight) == ({}, [], {}, {}, {})
    books.sequences["a"] = seq
    with pytest.raises(InvariantError, match="'a' ended twice"):
        books.end(seq)


def test_blocks_that_steps_use_stay_pinned_until_the_last_has_ended(bench):
    seq = bench.running("a", PROMPT)
    assert bench.ledger.reserve(seq, 11)
    seq.num_steps = 2
    bench.ledger.end(seq)
    bench.ledger.check_invariants()
    assert (bench.pool.num_used, bench.ledger.sequences) == (3, {})
    seq.num_steps = 1
    bench.ledger.bury()
    assert bench.pool.num_used == 3
    seq.num_steps = 0
    bench.ledger.bury()
    assert (bench.pool.num_used, bench.ledger.dying) == (0, [])


def test_who_does_not_run_or_pull_cannot_stop_doing_so(bench):
    seq = bench.waiting("a", PROMPT)
    with pytest.raises(InvariantError, match="'a' is waiting, and has no slot"):
        bench.ledger.keep(seq)
    with pytest.raises(InvariantError, match="'a' is waiting, and has no pull"):
        bench.ledger.end_pull(seq, 0)


# -------------------------------------------------------------------------------------------------------------- blocks


def test_a_table_grows_to_cover_what_is_asked_and_never_shrinks(bench):
    seq = bench.running("a", PROMPT)
    assert [bench.ledger.reserve(seq, end) and len(seq.block_table) for end in (1, 4, 5, 11, 3)] == [1, 1, 2, 3, 3]


def test_no_more_juniors_give_way_than_are_needed_the_least_urgent_and_youngest_first():
    bench = LedgerBench(num_blocks=5)
    senior, old, young, patient = (bench.running(i, 4, priority=p) for i, p in (("s", 0), ("o", 0), ("y", 0), ("p", 1)))
    for seq in (old, young, patient):
        assert bench.ledger.reserve(seq, 4)
    assert bench.ledger.reserve(senior, 16)
    assert ids(bench.ledger.waiting) == ["y", "p"]
    assert bench.ledger.num_preemptions == 2
    bench.ledger.check_invariants()


def test_who_finds_no_room_among_its_juniors_keeps_what_it_has_and_costs_nobody_more_than_blocks():
    bench = LedgerBench(num_blocks=3)
    senior, junior, empty = bench.running("s", 8), bench.running("j", 8), bench.running("e", 4)
    assert bench.ledger.reserve(senior, 8)
    assert bench.ledger.reserve(junior, 4)
    assert not bench.ledger.reserve(junior, 8)
    assert (len(senior.block_table), len(junior.block_table)) == (2, 1)
    assert empty.phase is Phase.RUNNING, "who holds no block has none to give"
    assert bench.ledger.num_preemptions == 0
    bench.ledger.check_invariants()


def test_whether_room_would_be_taken_from_others_is_known_before_and_takes_nothing():
    bench = LedgerBench(num_blocks=5)
    senior, junior = bench.running("s", 16), bench.running("j", 8)
    assert bench.ledger.reserve(senior, 8)
    assert bench.ledger.reserve(junior, 8)
    would_take = [bench.ledger.would_take(senior, end) for end in (8, 12, 13)]
    assert would_take == [False, False, True]
    assert not bench.ledger.would_take(junior, 16), "it could not either way"
    assert (len(senior.block_table), len(junior.block_table), bench.pool.num_free) == (2, 2, 1)
    assert bench.ledger.num_preemptions == 0


def test_blocks_that_came_to_be_held_since_admission_are_taken(bench):
    seq = bench.running("a", PROMPT)
    bench.hold(PROMPT)
    bench.ledger.extend_match(seq)
    assert (seq.num_computed, seq.num_device_tokens, len(seq.block_table)) == (8, 8, 2)
    assert bench.ledger.in_flight == {}
    bench.ledger.extend_match(seq)
    assert len(seq.block_table) == 2, "a token is left to compute"


def test_nothing_is_taken_in_the_middle_of_a_block(bench):
    seq = bench.running("a", PROMPT)
    bench.compute(seq, 2)
    bench.hold(PROMPT)
    bench.ledger.extend_match(seq)
    assert (seq.num_computed, len(seq.block_table)) == (2, 1)


def test_what_is_taken_after_the_first_emission_was_not_the_prompts_source(bench):
    bench.hold(PROMPT)
    seq = bench.waiting("a", PROMPT, generated=1)
    seq.has_emitted = True
    bench.ledger.admit(seq, [])
    bench.ledger.extend_match(seq)
    assert (seq.num_computed, seq.num_device_tokens) == (8, 0)


def test_blocks_get_their_names_when_they_are_full_and_not_before(bench):
    seq = bench.running("a", PROMPT)
    bench.compute(seq, 3)
    assert bench.pool.name(seq.block_table[0]) is None
    bench.compute(seq, 9)
    assert [bench.pool.name(block_id) for block_id in seq.block_table] == [*seq.names, None]
    assert bench.ledger.in_flight == {}


def test_a_generated_block_is_named_by_the_token_that_fills_it(bench):
    seq = bench.running("a", PROMPT)
    bench.compute(seq, 11)
    for _ in range(2):
        bench.append(seq)
    bench.compute(seq, 12)
    assert len(seq.names) == 3
    assert bench.pool.name(seq.block_table[2]) == seq.names[2]


def test_two_that_compute_one_block_name_it_once_and_both_go_on(bench):
    first, second = bench.running("a", PROMPT), bench.running("b", PROMPT)
    bench.compute(first, 8)
    bench.compute(second, 8)
    assert first.block_table != second.block_table
    assert bench.pool.match(first.names) == first.block_table
    assert bench.pool.stats.num_duplicate_blocks == 2


# ------------------------------------------------------------------------------------------------------------- orphans


def opened(bench: LedgerBench, *indexes: int) -> Sequence:
    """A pull of PROMPT with these blocks on their way, for tenant 7."""
    seq = bench.pulling("a", PROMPT, tenant=7)
    assert seq.pull is not None
    offered = [locations(PROMPT)[index] for index in indexes]
    seq.pull.blocks.offer("owner", unpack_locations(pack_locations(offered)))
    seq.pull.blocks.begin_pull()
    return seq


@pytest.mark.parametrize("ending", ["end", "end_pull"])
def test_blocks_that_a_pull_still_writes_are_nobodys_until_it_ends(bench, ending):
    seq = opened(bench, 0, 2)
    table = list(seq.block_table)
    if ending == "end":
        bench.ledger.end(seq)
    else:
        bench.ledger.end_pull(seq, 0)
    assert bench.ledger.orphans == {"a": [PullTarget(0, table[0], seq.names[0], 7), PullTarget(2, table[2], b"", 7)]}
    assert bench.pool.num_used == 2
    bench.ledger.check_invariants()
    bench.ledger.free_orphans("a", frozenset(), None)
    assert (bench.pool.num_used, bench.ledger.orphans) == (0, {})
    assert bench.pool.match(seq.names) == [table[0]], "what came well serves others; a partial block has no name"
    assert bench.pool.tenant(table[0]) == 7


def test_what_arrived_before_the_end_is_no_orphan(bench):
    seq = opened(bench, 0, 1)
    seq.pull.blocks.arrive({1})
    bench.ledger.commit(seq, [0])
    bench.ledger.end(seq)
    assert [target.index for target in bench.ledger.orphans["a"]] == [1]
    bench.ledger.free_orphans("a", frozenset({1}), None)
    assert len(bench.pool.match(seq.names)) == 1


def test_a_bad_orphan_into_which_late_bytes_may_come_goes_to_quarantine_and_the_good_ones_do_not(bench):
    seq = opened(bench, 0, 1, 2)
    table = list(seq.block_table)
    bench.ledger.end(seq)
    bench.ledger.free_orphans("a", frozenset({1, 2}), quarantine_until_s=5.0)
    states = [bench.pool.state(block_id) for block_id in table]
    assert states == [BlockState.EVICTABLE, BlockState.QUARANTINED, BlockState.QUARANTINED]
    assert bench.pool.release_quarantined(5.0) == 2


def test_orphans_of_nobody_are_none(bench):
    bench.ledger.free_orphans("unknown", frozenset(), None)


# ---------------------------------------------------------------------------------------------------------- invariants


def _pin_once_more(bench: LedgerBench, seq: Sequence) -> None:
    bench.pool.pin(seq.block_table[:1])


def _lose_a_block(bench: LedgerBench, seq: Sequence) -> None:
    seq.block_table = seq.block_table[:-1]


def _lose_an_empty_block(bench: LedgerBench, seq: Sequence) -> None:
    bench.ledger.reserve(seq, 13)
    _lose_a_block(bench, seq)


def _swap_blocks(bench: LedgerBench, seq: Sequence) -> None:
    seq.block_table[0], seq.block_table[1] = seq.block_table[1], seq.block_table[0]


def _lose_the_slot(bench: LedgerBench, seq: Sequence) -> None:
    seq.slot = None


def _give_the_slot_back(bench: LedgerBench, seq: Sequence) -> None:
    bench.ledger.slots.give_back(seq.slot)


def _queue_it_too(bench: LedgerBench, seq: Sequence) -> None:
    bench.ledger.waiting.append(seq)


def _forget_it(bench: LedgerBench, seq: Sequence) -> None:
    del bench.ledger.running[seq.seq_id]


def _compute_it_all(bench: LedgerBench, seq: Sequence) -> None:
    seq.num_computed = seq.num_tokens


def _end_it_in_the_books(bench: LedgerBench, seq: Sequence) -> None:
    seq.phase = Phase.ENDED


def _name_the_last_block(bench: LedgerBench, seq: Sequence) -> None:
    bench.pool.commit(seq.block_table[-1], b"another name")


def _keep_it_unfinished(bench: LedgerBench, seq: Sequence) -> None:
    bench.ledger.keep(seq)


def _wait_for_who_waits(bench: LedgerBench, seq: Sequence) -> None:
    bench.ledger.in_flight[b"a name"] = bench.ledger.waiting[0]


def _disorder_the_queue(bench: LedgerBench, seq: Sequence) -> None:
    bench.ledger.waiting.reverse()


def _let_who_waits_hold_blocks(bench: LedgerBench, seq: Sequence) -> None:
    bench.ledger.waiting[0].block_table = bench.pool.allocate(1)


def _shrink_a_pull(bench: LedgerBench, seq: Sequence) -> None:
    bench.pool.unpin([bench.ledger.sequences["pulls"].block_table.pop()])


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (_pin_once_more, "pinned once for each table"),
        (_lose_a_block, "tables cover what is computed"),
        (_lose_an_empty_block, "pinned once for each table"),
        (_swap_blocks, "blocks have the names of their sequences"),
        (_lose_the_slot, "who runs has a slot"),
        (_give_the_slot_back, "who runs has a slot"),
        (_queue_it_too, "in the one list of its phase"),
        (_forget_it, "in the one list of its phase"),
        (_compute_it_all, "who runs has something to compute"),
        (_end_it_in_the_books, "ended and is still in the books"),
        (_name_the_last_block, "still to be written is nobody else's"),
        (_keep_it_unfinished, "what is kept is whole"),
        (_wait_for_who_waits, "only who runs or pulls is waited for"),
        (_disorder_the_queue, "the queue is in order"),
        (_let_who_waits_hold_blocks, "who waits holds nothing"),
        (_shrink_a_pull, "a pull has all its targets"),
    ],
)
def test_a_slip_in_the_books_is_found(slip: Callable[[LedgerBench, Sequence], None], words: str):
    bench = LedgerBench()
    bench.waiting("waits", 5)
    bench.waiting("waits too", 5)
    bench.pulling("pulls", 9)
    seq = bench.running("runs", PROMPT)
    bench.compute(seq, 9)
    bench.ledger.check_invariants()
    slip(bench, seq)
    with pytest.raises(InvariantError, match=words):
        bench.ledger.check_invariants()
