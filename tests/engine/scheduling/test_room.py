"""Who finds room, and who would only sit on it."""

from __future__ import annotations

from engine.scheduling.room import Room
from kvcache.price import SHORT_TOKENS
from tests.engine.scheduling.ledger_bench import LedgerBench

LONG = 2 * SHORT_TOKENS  # tokens, 128 blocks


def bench_of(num_blocks: int, max_num_seqs: int = 32, watermark: float = 0.0) -> LedgerBench:
    made = LedgerBench(num_blocks)
    made.room = Room(made.ledger, max_num_seqs, watermark)
    return made


def has(bench, seq, *, is_short=True) -> bool:
    return bench.room.has(seq, bench.pool.match(seq.names[: seq.max_match_blocks]), is_short=is_short)


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


def full_of_kept_blocks(num_free: int) -> LedgerBench:
    """Of 32 blocks all but `num_free` hold what only this pool keeps."""
    bench = bench_of(32)
    bench.hold([7] * 4 * (32 - num_free))
    return bench


def test_what_costs_nothing_that_is_kept_is_never_too_early():
    bench = full_of_kept_blocks(8)
    bench.running("other", 4)
    assert not bench.room.is_too_early(bench.waiting("a", 32), 0)
    assert bench.room.is_too_early(bench.waiting("b", 33), 0)
    bench.pool.mark(bench.pool.snapshot()[-1:], is_spare=True)
    assert not bench.room.is_too_early(bench.waiting("c", 36), 0)
    assert not bench.room.is_too_early(bench.waiting("d", 40), 1)


def test_who_would_evict_waits_for_those_that_are_computed_before_it():
    bench = full_of_kept_blocks(8)
    seq = bench.waiting("a", 40)
    assert not bench.room.is_too_early(seq, 0)  # nobody is before it
    longer = bench.running("longer", 48)
    assert not bench.room.is_too_early(seq, 0)
    bench.compute(longer, 8)
    assert bench.room.is_too_early(seq, 0)
    bench.compute(longer, 48)
    bench.append(longer)
    assert not bench.room.is_too_early(seq, 0)  # it decodes


def test_who_would_evict_to_pull_waits_for_two_that_pull():
    bench = full_of_kept_blocks(8)
    bench.running("other", 4)  # of no concern to who is not computed here
    seq = bench.waiting("a", 40, remote_s=1.0)
    bench.pulling("first", 4)
    assert not bench.room.is_too_early(seq, 0)
    bench.pulling("second", 4)
    assert bench.room.is_too_early(seq, 0)
    assert bench.room.is_too_early(bench.waiting("b", 40), 0)  # they are computed next, maybe
    assert not bench.room.is_too_early(bench.waiting("c", 4, remote_s=1.0), 0)
