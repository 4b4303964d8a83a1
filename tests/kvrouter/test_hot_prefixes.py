import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.names import NAME_BYTES, block_names, pack_tokens
from kvrouter.hot_prefixes import HotPrefixes

HALF_LIFE_S = 600.0


def names(*token_ids):
    """Names of blocks of one token each."""
    return block_names(b"f", b"", pack_tokens(token_ids), 1)


def counted(*prompts, now_s=0.0, **limits):
    hot = HotPrefixes(**limits)
    for number, prompt in enumerate(prompts):
        hot.count(names(*prompt), f"r{number}", 0, 1, now_s)
        hot.check_invariants()
    return hot


def shown(hot, limit=20, tenant=None, now_s=0.0):
    return [
        (len(prefix.names) // NAME_BYTES, round(prefix.num_requests, 3)) for prefix in hot.hottest(limit, tenant, now_s)
    ]


def test_where_prompts_part_is_a_beginning_of_its_own():
    hot = counted([1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7], [1, 2, 6, 8])
    assert shown(hot)[:2] == [(2, 4.0), (3, 2.0)]
    assert sorted(shown(hot)[2:]) == [(3, 1.0), (4, 1.0), (4, 1.0), (4, 1.0)]
    assert hot.hottest(1, None, 0.0)[0].names == names(1, 2)


def test_a_prompt_that_ends_within_another_counts_up_to_there():
    hot = counted([1, 2, 3, 4], [1, 2])
    assert sorted(shown(hot)) == [(2, 2.0), (4, 1.0)]


def test_a_beginning_is_left_out_where_nearly_all_went_on_alike():
    hot = counted(*([[1, 2, 3]] * 9), [1, 2])
    assert shown(hot) == [(3, 9.0)]


def test_a_request_counts_half_after_a_half_life_and_the_order_follows():
    hot = counted([1], [1], [1])
    for _ in range(2):
        hot.count(names(2), "late", 0, 1, 2 * HALF_LIFE_S)
    found = hot.hottest(2, None, 2 * HALF_LIFE_S)
    assert [(prefix.names, prefix.num_requests) for prefix in found] == [(names(2), 2.0), (names(1), 0.75)]
    assert [(prefix.last_request, prefix.age_s) for prefix in found] == [("late", 0.0), ("r2", 2 * HALF_LIFE_S)]


def test_counts_stay_right_over_weeks():
    hot = HotPrefixes()
    for day in range(30):
        hot.count(names(1), "r", 0, 1, day * 86400.0)
    assert shown(hot, now_s=29 * 86400.0) == [(1, 1.0)]
    hot.check_invariants()


def test_a_tenant_is_told_its_own():
    hot = HotPrefixes()
    for tenant in (7, 8, 8):
        hot.count(block_names(b"f", bytes([tenant]), pack_tokens([1, 2]), 1), "r", tenant, 1, 0.0)
    assert shown(hot, tenant=7) == [(2, 1.0)]
    assert shown(hot, tenant=9) == []
    assert shown(hot) == [(2, 2.0), (2, 1.0)]


def test_nothing_found_is_nothing_counted():
    hot = counted([])
    assert len(hot) == 0


def test_when_there_are_too_many_those_that_count_least_go():
    hot = HotPrefixes(max_nodes=100)
    for _ in range(3):
        hot.count(names(1, 2, 3), "hot", 0, 1, 0.0)
    for number in range(1000):
        hot.count(names(4, number), "cold", 0, 1, 0.0)
        assert len(hot) <= 102  # a request adds two at most, before room is made
    hot.check_invariants()
    assert (3, 3.0) in shown(hot)


def test_names_are_bounded_too():
    hot = HotPrefixes(max_names=1000)
    for number in range(50):
        hot.count(names(number, *range(100)), "r", 0, 1, 0.0)
        hot.check_invariants()
    assert len(hot) <= 10
    hot.count(names(*range(100, 5100)), "long", 0, 1, 0.0)  # more than all may have
    hot.check_invariants()
    assert (5000, 1.0) not in shown(hot)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=30))
def test_counts_are_those_of_a_plain_count(prompts):
    hot = counted(*prompts)
    for prefix in hot.hottest(1000, None, 0.0):
        beginning = prefix.names
        assert prefix.num_requests == sum(names(*prompt).startswith(beginning) for prompt in prompts)


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65])
def test_where_two_part_is_found_at_any_place(length):
    rng = random.Random(length)
    common = [rng.randrange(100) for _ in range(length)]
    hot = counted([*common, 100, *range(64)], [*common, 101, *range(7)])
    assert shown(hot)[0] == (length, 2.0)
