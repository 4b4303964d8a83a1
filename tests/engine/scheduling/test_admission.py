"""Who starts, and what gives way to it."""

from __future__ import annotations

import pytest

from engine.scheduling.admission import Admission
from engine.scheduling.backlog import Backlog
from engine.scheduling.room import Room
from engine.scheduling.step_cost import StepCost
from tests.engine.scheduling.ledger_bench import LedgerBench


@pytest.mark.parametrize(("reused_share", "starts"), [(1.0, False), (0.0, True)])
def test_nothing_gives_way_to_one_that_waits_for_room_that_costs_nothing(reused_share, starts):
    bench = LedgerBench(16)
    bench.running("other", 4)
    bench.hold(list(range(32)))  # eight blocks that only this pool keeps, one for the other, and seven
    bench.pool.reused_share = reused_share
    bench.waiting("senior", 48)  # twelve blocks
    junior = bench.waiting("junior", 60)
    intakes = bench.ledger.intakes
    intakes.begin_ahead("junior", "source", 0, tuple(junior.names[:5]), range(5), 9, 0, [])
    started: list[str] = []
    backlog = Backlog(bench.ledger, StepCost())
    admission = Admission(
        bench.ledger,
        backlog,
        Room(bench.ledger, backlog, 32, 0.0),
        32,
        lambda seq, matched, *_: (started.append(seq.seq_id), bench.ledger.admit(seq, matched)),
    )
    admission.admit(0.0, [], None)
    assert started == ["senior"] * starts
    assert intakes.ids() == (() if starts else ("junior",))
    bench.ledger.check_invariants()


def test_room_that_what_gives_way_leaves_empty_costs_nothing():
    bench = LedgerBench(16)
    bench.running("other", 4)
    bench.hold(list(range(32)))
    bench.pool.reused_share = 1.0
    seq, junior = bench.waiting("senior", 28), bench.waiting("junior", 60)
    bench.ledger.intakes.begin_ahead("junior", "source", 0, tuple(junior.names[:5]), range(5), 9, 0, [])
    room = Room(bench.ledger, Backlog(bench.ledger, StepCost()), 32, 0.0)
    assert room.is_too_early(seq, [], [], 0.0)
    assert not room.is_too_early(seq, [], ["junior"], 0.0)
