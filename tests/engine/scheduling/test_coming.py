"""Blocks on their way from others: offered, opened, arrived, or not."""

from __future__ import annotations

from engine.scheduling.coming import Coming, ComingBlocks
from kvcache.locations import BlockLocation, Locations, pack_locations, unpack_locations


def rows_of(*indexes: int, block_id: int = 90) -> Locations:
    return unpack_locations(pack_locations(BlockLocation(i, block_id + i, 5, bytes(15) + b"n", 4) for i in indexes))


def made(arrived: tuple[int, ...] = ()) -> ComingBlocks:
    return ComingBlocks(2, 8, arrived)


def test_a_block_is_offered_then_opened_then_here():
    blocks = made()
    blocks.offer("a", rows_of(2, 3, 5))
    assert [blocks.indexes(state) for state in Coming] == [[4, 6, 7], [2, 3, 5], [], []]
    source, rows = blocks.begin_pull()
    assert (source, rows["index"].tolist(), rows["block_id"].tolist()) == ("a", [2, 3, 5], [92, 93, 95])
    assert (blocks.has(Coming.OPEN), blocks.has(Coming.OFFERED)) == (True, False)
    assert blocks.arrive(frozenset()) == [2, 3, 5]
    assert (blocks.num(Coming.ARRIVED), blocks.num_leading(), blocks.last_arrived()) == (3, 2, 5)


def test_what_came_badly_is_open_until_the_pull_is_closed_then_lacking():
    blocks = made()
    blocks.offer("a", rows_of(2, 3, 4))
    blocks.begin_pull()
    assert blocks.arrive({3}) == [2, 4]
    assert blocks.indexes(Coming.OPEN) == [3]
    blocks.close()
    assert blocks.state(3) is Coming.LACKING


def test_outside_of_its_range_nothing_is_known_and_nothing_lacking():
    blocks = made(arrived=(2,))
    assert [blocks.state(index) for index in (1, 8, -1)] == [Coming.LACKING] * 3
    assert blocks.lacks(rows_of(0, 1, 2, 3, 7, 8, 2**32 - 1, block_id=0)).tolist() == [
        *(False, False, False, True, True, False, False)
    ]


def test_what_is_open_or_here_is_not_lacking_and_what_is_offered_may_be_offered_again():
    blocks = made(arrived=(2,))
    blocks.offer("a", rows_of(3, 4))
    blocks.begin_pull(1)
    assert blocks.lacks(rows_of(2, 3, 4, 5)).tolist() == [False, False, True, True]
    blocks.offer("b", rows_of(4, block_id=40))
    blocks.close()
    source, rows = blocks.begin_pull()
    assert (source, rows["block_id"].tolist()) == ("b", [44])


def test_one_source_is_pulled_from_at_a_time():
    blocks = made()
    blocks.offer("a", rows_of(2, 5))
    blocks.offer("b", rows_of(3, 4))
    assert [blocks.begin_pull()[1]["index"].tolist() for _ in range(2)] == [[2, 5], [3, 4]]


def test_portions_come_from_the_head_or_from_the_tail():
    blocks = made()
    blocks.offer("a", rows_of(2, 3, 4, 5, 6))
    assert blocks.begin_pull(2)[1]["index"].tolist() == [2, 3]
    assert blocks.begin_pull(2, is_tail_first=True)[1]["index"].tolist() == [6, 5]
    assert blocks.indexes(Coming.OFFERED) == [4]


def test_what_is_computed_meanwhile_is_not_pulled():
    blocks = made()
    blocks.offer("a", rows_of(2, 3, 6))
    blocks.withdraw_before(0)
    assert blocks.indexes(Coming.OFFERED) == [2, 3, 6]
    blocks.withdraw_before(4)
    assert blocks.indexes(Coming.OFFERED) == [6]


def test_nothing_and_all_of_it():
    assert (made().num_leading(), made().last_arrived()) == (0, -1)
    assert (made(arrived=tuple(range(2, 8))).num_leading(), ComingBlocks(3, 3).num_leading()) == (6, 0)


def test_what_another_book_has_under_way_goes_on_here_as_far_as_it_is_wanted_here():
    others = ComingBlocks(0, 12)
    others.offer("a", rows_of(3, 4))
    others.begin_pull()
    others.offer("a", rows_of(1, 2, 5, 9))
    blocks = made(arrived=(5,))
    blocks.take_over("a", others)
    assert blocks.indexes(Coming.OPEN) == [3, 4]
    assert blocks.indexes(Coming.OFFERED) == [2]
    assert blocks.rows(Coming.OPEN)["block_id"].tolist() == [93, 94]
    assert blocks.begin_pull()[0] == "a"
