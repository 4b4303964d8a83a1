import itertools
import os

import numpy as np
import pytest

from messages.price import ComputePrice
from nodecache.pool import as_names
from nodecache.worth import NUM_LEVELS, Ghosts, Levels, Worth, heads_last


def order(levels: Levels) -> list[int]:
    return list(levels.in_order())


def test_the_worth_of_a_block_grows_with_its_position_its_sights_and_its_priority():
    worth = Worth(16, ComputePrice(token_s=1e-4, pair_s=1e-7))
    index, sights, priority = np.array([0, 100, 1000]), np.array([1, 2, 3]), np.array([-2, 0, 2])
    ones = np.ones(3, int)
    for levels in (
        worth.levels(index, ones, 0 * ones),
        worth.levels(0 * ones, sights, 0 * ones),
        worth.levels(0 * ones, ones, priority),
    ):
        assert levels.tolist() == sorted(set(levels.tolist()))
        assert 1 <= levels.min() <= levels.max() < NUM_LEVELS
    extreme = worth.levels(np.array([2**32 - 1]), np.array([2**32 - 1]), np.array([2]))
    assert extreme[0] < NUM_LEVELS


def test_without_a_price_of_pairs_positions_do_not_count():
    worth = Worth(16)
    assert len(set(worth.levels(np.arange(100), np.ones(100, int), np.zeros(100, int)).tolist())) == 1


def test_the_chance_of_reuse_is_what_was_seen():
    worth = Worth(16)
    before = worth.chances()
    for _ in range(20):
        worth.observe(np.full(1000, 1))
    assert worth.chances()[0] < 0.05 < before[0]
    for _ in range(40):
        worth.observe(np.full(1000, 2))
    assert worth.chances()[0] > 0.5


def test_the_lowest_level_goes_first_and_within_it_the_first_placed():
    levels = Levels(6)
    for block_id, worth in ((0, 5), (1, 2), (2, 5), (3, 2)):
        levels.place(block_id, worth)
    assert order(levels) == [1, 3, 0, 2]
    assert levels.lowest() == (1, 2)
    levels.remove(1)
    assert levels.lowest() == (3, 2)
    assert 3 in levels
    assert 1 not in levels


def test_worth_fades_with_what_room_was_wanted_for_and_order_stays():
    levels = Levels(8)
    for block_id, worth in ((0, 1), (1, 2), (2, 3), (3, 9)):
        levels.place(block_id, worth)
    levels.on_wanted(2)  # a quarter of the arena: two levels
    assert order(levels) == [0, 1, 2, 3]
    assert [levels.lowest()] == [(0, 0)]
    levels.place(4, 1)
    assert order(levels) == [0, 1, 2, 4, 3]
    levels.on_wanted(1000)
    levels.place(5, 0)
    assert order(levels) == [0, 1, 2, 4, 3, 5]
    for block_id in order(levels):
        levels.remove(block_id)
    assert levels.lowest() is None


def test_little_by_little_the_clock_goes_on_as_far():
    at_once, slowly = Levels(100), Levels(100)
    for levels in (at_once, slowly):
        levels.place(0, 8)
    at_once.on_wanted(50)
    for _ in range(50):
        slowly.on_wanted(1)
    assert at_once.lowest() == slowly.lowest() == (0, 4)


def test_levels_agree_with_a_plain_model_of_them():
    rng = np.random.default_rng(7)
    levels, model, clock, serial = Levels(40), {}, 0, itertools.count()
    for _ in range(3000):
        what = rng.integers(3)
        if what == 0 and len(model) < 40:
            block_id, worth = (
                int(rng.choice([b for b in range(40) if b not in model])),
                int(rng.integers(0, NUM_LEVELS)),
            )
            levels.place(block_id, worth)
            model[block_id] = [clock + worth, next(serial)]
        elif what == 1 and model:
            block_id = int(rng.choice(list(model)))
            levels.remove(block_id)
            del model[block_id]
        elif what == 2:
            levels.on_wanted(5)
            clock += 1
            # What ran out goes before what is there, in its old order.
            for entry in model.values():
                if entry[0] < clock:
                    entry[0] = clock
                    entry[1] -= 10**6
        expected = sorted(model, key=lambda block_id: model[block_id])
        assert order(levels) == expected


def test_a_name_is_remembered_until_it_is_overwritten():
    ghosts = Ghosts(1000)
    names = as_names(os.urandom(16 * 500))
    assert not ghosts.seen(names).any()
    ghosts.add(names)
    assert ghosts.seen(names).mean() > 0.8
    ghosts.add(as_names(os.urandom(16 * 100_000)))
    assert not ghosts.seen(names).any()
    assert ghosts.num_bytes <= 32 * 1000


def test_heads_are_worth_as_much_as_their_tails_and_go_after_them():
    positions, levels = heads_last(np.array([4, 2, 3]), np.array([1, 2, 9]))
    assert positions.tolist() == [0, 2, 1]
    assert levels.tolist() == [1, 9, 9]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 1000])
def test_any_number_of_blocks_will_do(num_blocks):
    levels, ghosts = Levels(num_blocks), Ghosts(num_blocks)
    levels.place(num_blocks - 1, 1)
    levels.on_wanted(10)
    assert order(levels) == [num_blocks - 1]
    ghosts.add(as_names(bytes(range(16))))
    assert ghosts.seen(as_names(bytes(range(16)))).all()
