"""What a worker still has to compute, in seconds."""

from __future__ import annotations

import pytest

from engine.scheduling.backlog import Backlog
from engine.scheduling.plan import SequenceStep
from engine.scheduling.step_cost import StepCost
from kvcache.price import ASSUMED_COMPUTE
from tests.engine.scheduling.ledger_bench import LedgerBench

PROMPT = list(range(100, 120))  # five full blocks


@pytest.fixture
def bench():
    made = LedgerBench()
    made.backlog = Backlog(made.ledger, StepCost())
    yield made
    made.ledger.check_invariants()


def test_before_the_first_step_a_price_is_assumed(bench):
    assert bench.backlog.price == ASSUMED_COMPUTE
    assert bench.backlog.compute_s(0, 20) == pytest.approx(0.020)
    assert bench.backlog.seconds() == 0


def test_what_was_measured_is_the_price():
    bench, cost = LedgerBench(), StepCost()
    backlog = Backlog(bench.ledger, cost)
    part = SequenceStep(seq_id="a", slot=0, kind="prefill", start=0, num_tokens=100, is_sampled=False)
    for _ in range(20):
        cost.observe([part], 0.5)
    assert backlog.price is not ASSUMED_COMPUTE
    assert backlog.compute_s(0, 100) == pytest.approx(0.5, rel=0.05)


def test_who_waits_and_who_is_in_prefill_count_by_what_they_lack(bench):
    bench.waiting("a", 10)
    bench.compute(bench.running("b", PROMPT), 8)
    decoding = bench.running("c", 8)
    bench.compute(decoding, 8)
    bench.append(decoding)
    assert bench.backlog.seconds() == pytest.approx(0.010 + 0.012)


def test_who_waits_for_a_prefix_lacks_what_follows_it(bench):
    seq = bench.waiting("a", PROMPT)
    seq.expected_match_tokens = 16
    assert bench.backlog.seconds() == pytest.approx(0.004)


def test_what_others_compute_is_no_work_here(bench):
    bench.waiting("remote", PROMPT, remote_s=0.1)
    bench.pulling("pulling", PROMPT)
    assert bench.backlog.seconds() == 0


def test_prompts_that_lack_much_may_be_left_out(bench):
    bench.waiting("long", 10)
    bench.waiting("short", 4)
    assert bench.backlog.seconds(4) == pytest.approx(0.004)
    assert bench.backlog.seconds(3) == 0
