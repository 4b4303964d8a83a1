import random

import pytest

from kvcache.price import (
    ASSUMED_MOVE,
    Computation,
    LearnedPrices,
    MoveCost,
    compute_s,
    handoff_s,
    harm_s,
    is_clearly_cheaper,
    move_s,
)
from messages.price import ComputePrice, MovePrice


def test_prices_are_learned_whatever_the_noise():
    rng, learned = random.Random(1), LearnedPrices(2)
    for _ in range(300):
        num_bytes = rng.randrange(1, 10**8)
        learned.observe((1.0, num_bytes), (1e-3 + num_bytes * 2e-10) * rng.uniform(0.95, 1.05))
    assert learned.prices == pytest.approx([1e-3, 2e-10], rel=0.1)


def test_a_price_is_never_negative():
    learned = LearnedPrices(2)
    for num_bytes, elapsed_s in ((1000, 1.0), (2000, 0.5), (4000, 0.1)) * 10:
        learned.observe((1.0, num_bytes), elapsed_s)
    assert min(learned.prices) >= 0


def test_what_is_not_seen_any_more_keeps_its_price():
    learned = LearnedPrices(2)
    for num_bytes in (1e6, 2e6, 4e6) * 20:
        learned.observe((1.0, num_bytes), 1e-3 + num_bytes * 1e-9)
    for _ in range(10_000):
        learned.observe((1.0, 0.0), 1e-3)
    assert learned.seconds((1.0, 1e7)) == pytest.approx(0.011, rel=0.1)


def learned_move(*, handoffs=()) -> MovePrice:
    cost = MoveCost("tcp://p:1")
    for num_bytes in (10**6, 10**7, 10**8) * 20:
        cost.observe_pull("shm", num_bytes, 1e-3 + num_bytes * 1e-9)
    for handoff in handoffs:
        cost.observe_handoff(*handoff)
    assert cost.price is not None
    return cost.price


def test_a_source_has_no_price_before_its_first_pull():
    cost = MoveCost("tcp://p:1")
    assert cost.price is None
    cost.observe_pull("shm", 10**6, 0.0)  # too fast for the clock
    assert cost.price is not None


def test_pulls_teach_what_a_byte_costs():
    price = learned_move()
    assert (price.source, price.road, price.handoff_s) == ("tcp://p:1", "shm", ASSUMED_MOVE.handoff_s)
    assert move_s(price, 5 * 10**7) == pytest.approx(0.051, rel=0.05)


def test_another_road_is_learned_anew():
    cost = MoveCost("tcp://p:1")
    for road, byte_s in (("shm", 1e-9), ("socket", 1e-8)):
        for num_bytes in (10**6, 10**7) * 5:
            cost.observe_pull(road, num_bytes, num_bytes * byte_s)
    assert cost.price is not None
    assert cost.price.road == "socket"
    assert move_s(cost.price, 10**7) == pytest.approx(0.1, rel=0.05)


def test_a_handoff_adds_what_neither_computing_nor_moving_explains():
    # 0.5 s at the source, 0.1 s of pulls hidden by it, 20 ms of messages and the last pull
    overlapped = learned_move(handoffs=[(0.52, 0.5, 10**8)])
    assert overlapped.handoff_s == pytest.approx(0.02, abs=0.002)
    # all of it was held there: the pull of 0.1 s shows
    held = learned_move(handoffs=[(0.13, 0.01, 10**8)])
    assert held.handoff_s == pytest.approx(0.03, abs=0.005)


def test_a_handoff_that_was_disturbed_does_not_count():
    price = learned_move(handoffs=[(0.02, 0.0, 0), (3.0, 0.0, 0), (0.5, 0.0, 0)])
    assert price.handoff_s == pytest.approx(0.019, abs=0.002)


def test_handoffs_of_long_ago_do_not_count():
    price = learned_move(handoffs=[(0.01, 0.0, 0)] * 30 + [(0.1, 0.0, 0)] * 8)
    assert price.handoff_s == pytest.approx(0.099, abs=0.002)


def test_a_prediction_is_what_was_learned():
    price = learned_move(handoffs=[(0.52, 0.5, 10**8)] * 3)
    assert handoff_s(price, 10**8, 0.5) == pytest.approx(0.02, abs=0.002)
    assert handoff_s(price, 10**8, 0.0) == pytest.approx(0.02 + 0.101, abs=0.005)


def test_computing_costs_steps_tokens_and_pairs():
    price = ComputePrice(step_s=1.0, token_s=0.01, pair_s=0.001)
    assert compute_s(price, Computation.of(0, 4)) == pytest.approx(1.0 + 0.04 + 0.010)  # 1 + 2 + 3 + 4 pairs
    assert compute_s(price, Computation.of(2, 4)) == pytest.approx(1.0 + 0.02 + 0.007)
    assert compute_s(price, Computation.of(0, 5000)) - compute_s(
        ComputePrice(token_s=0.01, pair_s=0.001), Computation.of(0, 5000)
    ) == pytest.approx(3)
    assert compute_s(price, Computation.of(4, 4)) == 0


def test_computing_where_others_decode_costs_them_too():
    assert harm_s(1.0, 0) > 0
    assert harm_s(1.0, 9) == pytest.approx(10 * harm_s(1.0, 0))


def test_about_the_same_is_not_clearly_cheaper():
    assert not is_clearly_cheaper(0.9, 1.0)
    assert is_clearly_cheaper(0.5, 1.0)
    assert not is_clearly_cheaper(0.0, 0.0)
