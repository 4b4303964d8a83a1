"""What hints do: decrees of who manages the cache, and advice of requests."""

import math

import numpy as np
import pytest

from messages.handoff import BlockHint
from nodecache.arena import as_ids
from nodecache.keeping import Keeping, priorities
from nodecache.pool import Written, as_names
from tests.nodecache.blocks import BLOCK_SIZE, checksum_of, names_of, pool_of

NOW_S = 100.0
ALL = (0, None)


@pytest.fixture
def pool():
    pool = pool_of(20)
    yield pool
    pool.check_invariants()


def hold(pool, count, chain=""):
    names = names_of(range(count), chain)
    block_ids = pool.take([3] * count, NOW_S)
    written = Written(
        block_ids,
        as_names(b"".join(names)),
        np.array([checksum_of(name) for name in names], np.uint64),
        np.full(count, BLOCK_SIZE, np.uint32),
        np.arange(count, dtype=np.uint32),
    )
    assert pool.commit(written, np.ones(count, np.uint32), NOW_S).all()
    pool.unpin(block_ids)
    return block_ids


def kept_s(pool, block_ids):
    return pool.records(block_ids)["pinned_until_s"].tolist()


def priorities_of(pool, block_ids):
    return pool.records(block_ids)["priority"].tolist()


def test_advice_is_about_its_range_of_the_prefix_in_whatever_order_blocks_come(pool):
    blocks = hold(pool, 5)
    hints = [BlockHint(0, None, -2, 0.0), BlockHint(1, 4, 1, 0.0), BlockHint(0, 2, None, 30.0)]
    Keeping(pool).advise(as_ids(blocks[::-1].tolist()), hints, NOW_S)
    assert priorities_of(pool, blocks) == [-2, 1, 1, 1, -2]
    assert kept_s(pool, blocks) == [130.0, 130.0, 0.0, 0.0, 0.0]


def test_a_decree_replaces_what_was_said_and_advice_takes_no_pin_back(pool):
    keeping, blocks = Keeping(pool), hold(pool, 3)
    keeping.decree(blocks, 2, math.inf, NOW_S)
    keeping.advise(blocks, [BlockHint(*ALL, None, 5.0)], NOW_S)
    assert (kept_s(pool, blocks), priorities_of(pool, blocks)) == ([math.inf] * 3, [2] * 3)
    keeping.advise(blocks, [BlockHint(*ALL, -2, 0.0)], NOW_S)
    assert (kept_s(pool, blocks), priorities_of(pool, blocks)) == ([math.inf] * 3, [-2] * 3)
    keeping.decree(blocks, 0, 0.0, NOW_S)
    assert (kept_s(pool, blocks), priorities_of(pool, blocks)) == ([0.0] * 3, [0] * 3)


def test_a_pin_is_made_longer_and_never_shorter(pool):
    keeping, blocks = Keeping(pool), hold(pool, 1)
    for ttl_s, until_s in ((50.0, 150.0), (10.0, 150.0), (80.0, 180.0)):
        keeping.advise(blocks, [BlockHint(*ALL, None, ttl_s)], NOW_S)
        assert kept_s(pool, blocks) == [until_s]


def test_at_most_half_of_the_arena_is_kept_heads_first_whoever_wants_it(pool):
    keeping, first, second = Keeping(pool), hold(pool, 7, "one"), hold(pool, 8, "other")
    keeping.advise(first, [BlockHint(*ALL, None, 5.0)], NOW_S)
    keeping.advise(second, [BlockHint(*ALL, None, 50.0)], NOW_S)
    assert kept_s(pool, second) == [150.0] * 3 + [0.0] * 5
    assert pool.num_hinted(NOW_S) == 10
    keeping.decree(second[5:], 0, math.inf, NOW_S)
    assert kept_s(pool, second[5:]) == [0.0] * 3
    keeping.advise(first, [BlockHint(*ALL, None, 7.0)], NOW_S)
    assert kept_s(pool, first) == [107.0] * 7, "what is kept already takes no more room"
    later_s = NOW_S + 8.0
    keeping.advise(second, [BlockHint(*ALL, None, 50.0)], later_s)
    assert kept_s(pool, second) == [158.0] * 8, "pins that ended make room for others"


def test_what_is_kept_outlives_what_is_worth_more(pool):
    keeping, blocks = Keeping(pool), hold(pool, 4)
    keeping.advise(blocks, [BlockHint(0, 2, None, 60.0)], NOW_S)
    hold(pool, 16, "others")
    taken = pool.take([63] * 18, NOW_S)
    assert len(taken) == 18
    assert [found >= 0 for found in pool.find(b"".join(names_of(range(4)))).tolist()] == [True, True, False, False]
    pool.give_back(taken)


def test_blocks_that_are_not_there_yet_are_valued_by_what_is_wanted_of_them():
    hints = [BlockHint(0, 4, -1, 0.0), BlockHint(2, None, 1, 0.0), BlockHint(3, 4, None, 60.0)]
    assert priorities(np.arange(6), hints).tolist() == [-1, -1, 1, 2, 1, 1]
    assert priorities(np.arange(2), ()).tolist() == [0, 0]
