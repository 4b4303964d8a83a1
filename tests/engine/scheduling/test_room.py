"""Who finds room, and who would only sit on it."""

from __future__ import annotations

from engine.scheduling.backlog import Backlog
from engine.scheduling.plan import BlocksOffered, PullEnded, TakeIn
from engine.scheduling.room import Room
from engine.scheduling.step_cost import StepCost
from kvcache.locations import pack_locations
from kvcache.price import SHORT_TOKENS
from tests.engine.scheduling.ledger_bench import LedgerBench, locations

LONG = 2 * SHORT_TOKENS  # tokens, 128 blocks


def bench_of(num_blocks: int, max_num_seqs: int = 32, watermark: float = 0.0) -> LedgerBench:
    made = LedgerBench(num_blocks)
    cost = StepCost()
    made.room = Room(made.ledger, Backlog(made.ledger, cost), max_num_seqs, watermark)
    return made


def has(bench, seq, *, is_short=True) -> bool:
    return bench.room.find(seq, bench.pool.match(seq.names[: seq.max_match_blocks]), is_short=is_short) == []


# --------------------------------------------------------------------------------------------------------------- short


def test_a_prompt_is_short_where_little_of_it_is_to_be_computed():
    bench = bench_of(400)
    prompt = list(range(LONG))
    assert bench.room.is_short(bench.waiting("a", SHORT_TOKENS))
    assert not bench.room.is_short(bench.waiting("b", SHORT_TOKENS + 1))
    bench.hold(prompt[: LONG - SHORT_TOKENS - 4])
    assert not bench.room.is_short(bench.waiting("c", prompt))
    bench.hold(prompt[: LONG - SHORT_TOKENS])
    assert bench.room.is_short(bench.waiting("d", prompt))


def test_a_prompt_is_counted_as_it_was_when_it_was_admitted():
    bench = bench_of(400)
    bench.waiting("a", 8)
    bench.waiting("b", LONG)
    bench.running("c", 8).is_long = True
    bench.pulling("d", 12)
    assert bench.room.num_short == 2


# ---------------------------------------------------------------------------------------------------------------- room


def test_a_sequence_alone_may_have_the_whole_pool():
    bench = bench_of(8, watermark=0.5)
    assert has(bench, bench.waiting("a", 32), is_short=False)
    assert not has(bench, bench.waiting("b", 33), is_short=False)


def test_what_is_found_needs_no_room():
    bench = bench_of(8)
    prompt = list(range(100, 124))
    bench.hold(prompt[:16])
    bench.running("other", 8)  # two blocks, when it has computed
    assert not has(bench, bench.waiting("a", 24))  # six blocks, and one that is left free
    assert not has(bench, bench.waiting("b", [*prompt, 1]))
    assert has(bench, bench.waiting("c", prompt[:20]))


def test_who_runs_keeps_the_room_to_grow_into_and_a_share_stays_free():
    bench = bench_of(16, watermark=0.25)
    other = bench.running("other", 20)
    assert has(bench, bench.waiting("a", 28))  # 7 beside 5, and 4
    assert not has(bench, bench.waiting("b", 29))
    bench.compute(other, 20)
    assert has(bench, bench.waiting("c", 28))


def test_long_prompts_leave_slots_and_blocks_to_short_ones():
    bench = bench_of(64, max_num_seqs=16)
    for number in range(15):
        bench.running(f"r{number}", 4).is_long = True
    seq = bench.waiting("a", 4)
    assert has(bench, seq)
    assert not has(bench, seq, is_short=False)
    bench = bench_of(64)
    bench.running("other", 4)
    seq = bench.waiting("a", 240)  # 60 beside 1, and 1
    assert has(bench, seq)
    assert not has(bench, seq, is_short=False)  # and 4 for short ones


# ------------------------------------------------------------------------------------------------------------ too early


def full_of_kept_blocks(num_free: int, reused_share: float = 1.0) -> LedgerBench:
    """Of 32 blocks all but `num_free` hold what only this pool keeps."""
    bench = bench_of(32)
    bench.hold([7] * 4 * (32 - num_free))
    bench.pool.reused_share = reused_share
    return bench


def is_too_early(bench, seq, now_s=0.0) -> bool:
    return bench.room.is_too_early(seq, bench.pool.match(seq.names[: seq.max_match_blocks]), [], now_s)


def test_what_costs_nothing_that_is_kept_is_never_too_early():
    bench = full_of_kept_blocks(8)
    bench.running("other", 4)
    assert not is_too_early(bench, bench.waiting("a", 32))
    assert is_too_early(bench, bench.waiting("b", 33))
    bench.pool.mark(bench.pool.snapshot()[-1:], is_spare=True)
    assert not is_too_early(bench, bench.waiting("c", 36))
    assert is_too_early(bench, bench.waiting("d", 37))


def test_what_is_found_is_no_loss_but_a_spare_copy_that_is_used_is_no_room_for_others():
    bench = full_of_kept_blocks(2)
    bench.running("other", 4)
    prompt = [7] * 24
    assert not is_too_early(bench, bench.waiting("a", [*prompt, *range(8)]))
    bench.pool.mark(bench.pool.snapshot()[:6], is_spare=True)
    assert not is_too_early(bench, bench.waiting("b", [*prompt, *range(8)]))
    assert is_too_early(bench, bench.waiting("c", [*prompt, *range(9)]))


def test_who_would_evict_waits_while_others_go_on_for_as_long_as_computing_again_is_worth():
    bench = full_of_kept_blocks(8)
    seq = bench.waiting("a", 40)  # evicts two blocks: 8 ms, by the assumed price, and the harm of that
    assert not is_too_early(bench, seq)
    bench.running("other", 4)
    assert is_too_early(bench, seq, 5.0)
    assert is_too_early(bench, seq, 5.0 + 8 * (0.008 + 0.2 * 0.008 * 2) - 0.001)
    assert not is_too_early(bench, seq, 5.0 + 8 * (0.008 + 0.2 * 0.008 * 2) + 0.001)


def test_nobody_waits_for_blocks_of_which_none_is_ever_used_again():
    bench = full_of_kept_blocks(8, reused_share=0.0)
    bench.running("other", 4)
    assert not is_too_early(bench, bench.waiting("a", 40))


def test_who_waited_for_room_waits_anew_once_it_was_admitted():
    bench = full_of_kept_blocks(8)
    bench.running("other", 4)
    seq = bench.waiting("a", 40)
    assert is_too_early(bench, seq, 1.0)
    bench.ledger.admit(seq, [])
    bench.ledger.preempt(seq)
    assert is_too_early(bench, seq, 100.0)


# --------------------------------------------------------------------------------------------------------------- ahead


def num_ahead(bench, seq, num_lacking, *, num_before=0, load_s=1.0) -> int:
    return bench.room.num_ahead(seq, num_lacking, num_before, load_s)


def test_what_is_filled_ahead_leaves_what_runs_and_waits_before_and_the_rest_of_its_own():
    bench = bench_of(32)
    seq = bench.waiting("a", 40)
    assert num_ahead(bench, seq, 8) == 8
    bench.running("other", 32)  # 8 to come, 1 beside them, 2 for short ones
    assert num_ahead(bench, seq, 8, num_before=11) == 8
    assert num_ahead(bench, seq, 8, num_before=13) == 6
    assert num_ahead(bench, seq, 8, num_before=20) == 0


def test_what_only_this_pool_keeps_is_evicted_ahead_only_where_loading_takes_longer_than_it_is_worth():
    bench = full_of_kept_blocks(8)  # three of them are reserved
    seq = bench.waiting("a", 40)
    lost_s = 5 * 0.004 * 1.2  # of five blocks, by the assumed price, and the harm of that
    assert num_ahead(bench, seq, 10, load_s=lost_s - 0.001) == 5
    assert num_ahead(bench, seq, 10, load_s=lost_s + 0.001) == 10
    bench.pool.reused_share = 0.0
    assert num_ahead(bench, seq, 10, load_s=0.0) == 10


def test_what_is_coming_for_a_sequence_is_room_that_it_has():
    bench = bench_of(12)
    bench.running("other", 4)
    seq = bench.waiting("a", 40)  # ten blocks, one for the other and one that is left free
    assert has(bench, seq)
    bench.ledger.intakes.begin_ahead("a", "source", 0, tuple(seq.names[:9]), range(9), 9, 0, [])
    assert has(bench, seq)
    assert not has(bench, bench.waiting("b", 8))


def find(bench, seq) -> list[str] | None:
    return bench.room.find(seq, bench.pool.match(seq.names[: seq.max_match_blocks]), is_short=True)


def test_what_is_taken_in_for_juniors_or_for_nobody_gives_way_as_far_as_it_must_the_last_one_first():
    bench = bench_of(16)
    senior, seq = bench.waiting("senior", 40), bench.waiting("a", 40)  # ten blocks
    junior = bench.waiting("junior", 40)
    intakes = bench.ledger.intakes
    for waiting in (senior, junior):
        intakes.begin_ahead(waiting.seq_id, "source", 0, tuple(waiting.names[:3]), range(3), 9, 0, [])
    intakes.begin(TakeIn("warm", "source", (b"x" * 16, b"y" * 16), 0.0), [])
    assert find(bench, seq) == ["warm"]  # eight are free
    assert find(bench, bench.waiting("b", 48)) is None  # twelve, and the senior and the junior keep three each
    assert find(bench, senior) == []
    bench.ledger.end(junior)
    assert find(bench, seq) == []


def test_room_that_a_pull_writes_to_or_that_is_found_already_is_not_gained():
    bench = bench_of(8)
    intakes, seq = bench.ledger.intakes, bench.waiting("a", 32)  # eight blocks
    intakes.begin(TakeIn("warm", "source", tuple(seq.names[:2]), 0.0), [])
    assert find(bench, seq) == ["warm"]
    first = locations(list(seq.token_ids))[0]
    names = intakes.find("warm").names
    intakes.take_blocks(BlocksOffered("warm", "source", pack_locations([first]), is_last=False), [])
    assert names[0] == first.name
    assert find(bench, seq) is None  # a pull writes there
    intakes.finish_pull(PullEnded("warm", frozenset()), [])
    assert find(bench, seq) == ["warm"]  # one is found, one is gained
