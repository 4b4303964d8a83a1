"""Where the KV of a sequence that begins comes from."""

from __future__ import annotations

import pytest

from engine.scheduling.backlog import Backlog
from engine.scheduling.coming import ComingBlocks
from engine.scheduling.plan import AskBlocks, AskRemote, Instruction
from engine.scheduling.sequence import Phase
from engine.scheduling.sourcing import Sourcing
from engine.scheduling.step_cost import StepCost
from kvcache.load_plan import Load
from messages.price import MovePrice
from messages.request import Copy, HeldRun
from tests.engine.scheduling.ledger_bench import LedgerBench

PROMPT = list(range(100, 141))  # ten full blocks and a token: 41 ms at the assumed price
LONG_PROMPT = list(range(100, 261))  # forty full blocks and a token
NEAR, FAR, DISK = Copy("near", "device"), Copy("far", "device"), Copy("near", "disk")


class Bench(LedgerBench):
    """A ledger, and what blocks cost in seconds, by copy; those that are not named cannot be had."""

    def __init__(self, **block_s: float) -> None:
        super().__init__(64)
        self.block_s = {NEAR: 1e-4} | {Copy(*key.split("_")): cost for key, cost in block_s.items()}
        self.backlog = Backlog(self.ledger, StepCost())
        self.sourcing = Sourcing(
            self.ledger, self.backlog, self.price_of, block_bytes=1, chunk_tokens=4, remote_timeout_s=30.0
        )
        self.out: list[Instruction] = []

    def price_of(self, copy: Copy) -> MovePrice | None:
        if copy not in self.block_s:
            return None
        return MovePrice(
            source=copy.address, tier=copy.tier, road="", fixed_s=0.0, byte_s=self.block_s[copy], handoff_s=0.0
        )

    def begins(self, prompt=PROMPT, held=(), **fields):
        """A sequence that was just admitted."""
        return self.running(f"s{self.num_arrived}", prompt, held=tuple(held), **fields)


def run(begin: int, end: int, *copies: Copy) -> HeldRun:
    return HeldRun(begin, end, copies)


# ------------------------------------------------------------------------------------------------------------ the plan


def test_without_holders_all_is_computed():
    bench = Bench()
    assert bench.sourcing.plan(bench.begins()).loads == ()


def test_what_others_hold_and_it_lacks_is_loaded_from_the_cheapest_copy():
    bench = Bench(far_device=5e-5, near_disk=1e-3)
    bench.hold(PROMPT[:8])
    seq = bench.begins(held=[run(0, 5, NEAR, FAR, DISK), run(5, 8, DISK)])
    assert bench.sourcing.plan(seq).loads == (Load(2, 5, FAR), Load(5, 8, DISK))


def test_the_last_token_is_computed_in_any_case():
    bench = Bench()
    seq = bench.begins(PROMPT[:40], held=[run(0, 10, NEAR)])
    assert bench.sourcing.plan(seq).loads == (Load(0, 9, NEAR),)


def test_who_wants_logprobs_of_its_prompt_computes_it():
    bench = Bench()
    seq = bench.begins(held=[run(0, 10, NEAR)], prompt_logprobs=0)
    assert bench.sourcing.plan(seq).loads == ()


def test_what_would_take_far_longer_than_computing_is_not_loaded():
    bench = Bench(near_device=0.012)  # three times what computing takes
    seq = bench.begins(held=[run(0, 10, NEAR)])
    assert bench.sourcing.plan(seq).loads == ()


def test_what_waits_here_makes_loading_worth_while():
    bench = Bench(near_device=0.012)  # three times what computing takes
    bench.waiting("before", 100)
    seq = bench.begins(held=[run(0, 10, NEAR)])
    plan = bench.sourcing.plan(seq)
    assert plan.loads == (Load(0, 10, NEAR),)
    assert plan.compute_s == pytest.approx(0.140)


def test_what_the_pool_has_in_the_middle_is_not_loaded():
    bench = Bench()
    seq = bench.begins(held=[run(0, 10, NEAR)])
    (block_id,) = bench.pool.allocate(1)
    bench.pool.commit(block_id, seq.names[4])
    bench.pool.unpin([block_id])
    assert bench.sourcing.plan(seq).loads == (Load(0, 4, NEAR), Load(5, 10, NEAR))


def test_who_left_an_earlier_pull_behind_loads_nothing():
    bench = Bench()
    seq = bench.begins(held=[run(0, 10, NEAR)])
    bench.ledger.orphans[seq.seq_id] = []
    assert bench.sourcing.plan(seq).loads == ()


# ---------------------------------------------------------------------------------------------------------- the loading


def test_what_is_cheap_to_load_is_waited_for():
    bench = Bench()
    seq = bench.begins(held=[run(0, 10, NEAR)])
    plan = bench.sourcing.plan(seq)
    deadline_s = bench.sourcing.load(seq, plan, 100.0, bench.out)
    assert bench.out == [AskBlocks(seq.seq_id, "near", 0, tuple(seq.names[:10]), is_tail_first=False)]
    assert (seq.phase, len(seq.block_table)) == (Phase.PULLING, 10)
    assert deadline_s == pytest.approx(100.0 + 4 * 0.001 + 5)
    assert seq.pull.expected_s == pytest.approx(100.001)
    bench.ledger.check_invariants()


def test_where_both_take_about_as_long_the_head_is_computed_and_the_tail_comes_in_portions():
    bench = Bench(near_device=0.005)
    seq = bench.begins(LONG_PROMPT, held=[run(0, 40, NEAR)])
    bench.sourcing.load(seq, bench.sourcing.plan(seq), 100.0, bench.out)
    assert bench.out == [AskBlocks(seq.seq_id, "near", 0, tuple(seq.names[:40]), is_tail_first=True)]
    assert (seq.phase, seq.pull.is_mixed, seq.pull.portion_blocks) == (Phase.RUNNING, True, 10)  # of 0.05 s


def test_others_are_not_waited_for_longer_than_is_allowed():
    bench = Bench(near_device=0.005)
    bench.sourcing._remote_timeout_s = 3.0
    seq = bench.begins(LONG_PROMPT, held=[run(0, 40, NEAR)])
    assert bench.sourcing.load(seq, bench.sourcing.plan(seq), 100.0, bench.out) == 103.0


def test_for_what_a_holder_does_not_give_the_next_one_is_planned():
    bench = Bench(far_device=0.001)
    seq = bench.begins(held=[run(0, 10, NEAR, FAR)])
    bench.sourcing.load(seq, bench.sourcing.plan(seq), 100.0, bench.out)
    seq.pull.holders.clear()
    seq.pull.failed.add(NEAR)
    seq.pull.blocks = ComingBlocks(0, 10, {0, 1, 5})
    seq.pull.asked.clear()
    assert bench.sourcing.plan(seq).loads == (Load(2, 5, FAR), Load(6, 10, FAR))


def test_who_may_offer_more_still_is_not_asked_again():
    bench = Bench(far_device=0.001)
    seq = bench.begins(held=[run(0, 10, NEAR, FAR)])
    bench.sourcing.load(seq, bench.sourcing.plan(seq), 100.0, bench.out)
    seq.pull.asked.clear()
    assert bench.sourcing.plan(seq).loads == (Load(0, 10, FAR),)


# ------------------------------------------------------------------------------------------------- the prefill worker


def test_a_prefill_worker_is_asked_for_what_follows_the_pools_head():
    bench = Bench()
    bench.hold(PROMPT[:8])
    seq = bench.begins(remote_s=0.3, remote_source="prefill")
    assert bench.sourcing.ask_prefill(seq, 100.0, bench.out) == 130.0
    assert bench.out == [AskRemote(seq.seq_id, 8)]
    assert (seq.phase, seq.pull.expected_s, len(seq.block_table)) == (Phase.PULLING, 100.3, 11)


def test_a_head_that_others_hold_comes_from_them_and_the_rest_from_the_prefill_worker():
    bench = Bench(prefill_device=1e-5)
    seq = bench.begins(
        held=[run(0, 4, NEAR, Copy("prefill", "device")), run(4, 6, Copy("prefill", "device"))],
        remote_s=0.3,
        remote_source="prefill",
    )
    bench.sourcing.ask_prefill(seq, 100.0, bench.out)
    assert bench.out == [
        AskBlocks(seq.seq_id, "near", 0, tuple(seq.names[:4]), is_tail_first=False),
        AskRemote(seq.seq_id, 16),  # what the prefill worker has it hands over anyway
    ]


@pytest.mark.parametrize(
    ("remote_s", "is_here"), [(None, True), (0.041 / 0.75 + 0.03, True), (0.041, False), (float("inf"), True)]
)
def test_what_is_clearly_cheaper_here_is_computed_here(remote_s, is_here):
    bench = Bench()
    seq = bench.begins(remote_s=remote_s, remote_source="prefill")
    assert bench.sourcing.is_cheaper_here(seq, bench.sourcing.plan(seq)) is is_here


def test_what_loads_quickly_is_cheaper_than_a_handoff():
    bench = Bench()
    seq = bench.begins(held=[run(0, 10, NEAR)], remote_s=0.02, remote_source="prefill")
    assert bench.sourcing.is_cheaper_here(seq, bench.sourcing.plan(seq))  # a millisecond of loading, and a token


def test_what_waits_here_counts_against_it():
    bench = Bench()
    bench.waiting("before", 100)
    seq = bench.begins(remote_s=0.1, remote_source="prefill")
    assert not bench.sourcing.is_cheaper_here(seq, bench.sourcing.plan(seq))
