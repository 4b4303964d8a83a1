"""What is loaded, from where, and whether the head is computed meanwhile."""

from __future__ import annotations

import pytest

from kvcache.load_plan import Load, lacking_runs, plan_loads
from messages.price import ComputePrice, MovePrice
from messages.request import Copy, HeldRun

NEAR, FAR = Copy("near", "device"), Copy("far", "disk")


def price(byte_s: float, *, fixed_s: float = 0.0, handoff_s: float = 0.0) -> MovePrice:
    return MovePrice(source="", road="", fixed_s=fixed_s, byte_s=byte_s, handoff_s=handoff_s)


def plan(lacking, prices, *, token_s: float = 1e-3, queue_s: float = 0.0, num_beside: int = 0):
    """Blocks of 16 tokens, and of a thousand bytes."""
    return plan_loads(
        lacking,
        prices.get,
        block_size=16,
        block_bytes=1000,
        chunk_tokens=64,
        compute=ComputePrice(token_s=token_s),
        queue_s=queue_s,
        num_beside=num_beside,
    )


def test_runs_are_cut_where_blocks_are_here_and_end_where_nobody_has_any():
    held = (HeldRun(0, 10, (NEAR,)), HeldRun(10, 20, (NEAR, FAR)), HeldRun(21, 30, (NEAR,)))
    runs = lacking_runs(held, 2, 40, lambda index: index in (5, 6, 12))
    assert runs == [
        HeldRun(2, 5, (NEAR,)),
        HeldRun(7, 10, (NEAR,)),
        HeldRun(10, 12, (NEAR, FAR)),
        HeldRun(13, 20, (NEAR, FAR)),
    ]


def test_nothing_is_loaded_beyond_what_the_prompt_can_use():
    assert lacking_runs((HeldRun(0, 10, (NEAR,)),), 0, 4, lambda index: False) == [HeldRun(0, 4, (NEAR,))]
    assert lacking_runs((HeldRun(0, 10, (NEAR,)),), 4, 4, lambda index: False) == []


def test_each_run_comes_from_its_cheapest_copy():
    lacking = [HeldRun(0, 4, (FAR, NEAR)), HeldRun(4, 8, (FAR,))]
    planned = plan(lacking, {NEAR: price(1e-9), FAR: price(1e-7)})
    assert planned.loads == (Load(0, 4, NEAR), Load(4, 8, FAR))


def test_a_source_is_asked_once_so_that_a_second_run_from_there_costs_no_question():
    lacking = [HeldRun(0, 4, (NEAR,)), HeldRun(5, 6, (FAR, NEAR))]
    planned = plan(lacking, {NEAR: price(2e-9, handoff_s=0.01), FAR: price(1e-9, handoff_s=0.001)})
    assert [load.copy for load in planned.loads] == [NEAR, NEAR]
    assert planned.load_s == pytest.approx(0.01 + 5 * 1000 * 2e-9)


@pytest.mark.parametrize(
    ("byte_s", "is_loaded", "is_mixed"),
    [(1e-9, True, False), (1.5e-5, True, True), (1e-3, False, False)],
)
def test_one_way_alone_where_it_is_far_quicker_and_both_where_they_are_about_as_quick(byte_s, is_loaded, is_mixed):
    planned = plan([HeldRun(0, 64, (NEAR,))], {NEAR: price(byte_s)})
    assert (bool(planned.loads), planned.is_mixed) == (is_loaded, is_mixed)
    assert planned.compute_s == pytest.approx(1.024)
    assert planned.seconds <= min(planned.load_s, planned.compute_s)


def test_both_meet_where_the_head_has_come_as_far_as_the_tail():
    lacking, prices = [HeldRun(0, 64, (NEAR,))], {NEAR: price(1.6e-5)}  # each way takes 1.024 s
    assert plan(lacking, prices).meet_tokens == 512
    later = plan(lacking, prices, queue_s=0.512)
    assert later.meet_tokens == 256
    assert later.mixed_s > 0.512 + 0.256


def test_computing_that_harms_others_is_dearer_and_who_may_come_later_does_not_count():
    lacking, prices = [HeldRun(0, 4, (NEAR,))], {NEAR: price(1.1 * 1.6e-5)}  # a tenth longer than computing takes
    assert not plan(lacking, prices).loads
    assert plan(lacking, prices, num_beside=1).loads


def test_who_computes_behind_a_queue_loads_what_an_idle_one_computes():
    lacking, prices = [HeldRun(0, 64, (NEAR,))], {NEAR: price(2e-4)}
    assert not plan(lacking, prices).loads
    assert plan(lacking, prices, queue_s=20.0).loads


def test_what_cannot_come_from_anywhere_ends_what_is_loaded():
    lacking = [HeldRun(0, 4, (NEAR,)), HeldRun(4, 8, (FAR,)), HeldRun(8, 12, (NEAR,))]
    assert plan(lacking, {NEAR: price(1e-9)}).loads == (Load(0, 4, NEAR),)
    assert plan([HeldRun(0, 4, (FAR,))], {}).loads == ()
