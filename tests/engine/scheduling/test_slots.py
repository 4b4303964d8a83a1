from __future__ import annotations

from engine.scheduling.slots import SlotPool


def test_the_lowest_free_slot_goes_first():
    pool = SlotPool()
    first, second, third = pool.take(), pool.take(), pool.take()
    assert [slot.index for slot in (first, second, third)] == [0, 1, 2]
    pool.give_back(third)
    pool.give_back(first)
    assert [pool.take().index for _ in range(3)] == [0, 2, 3]


def test_what_was_told_of_a_slot_is_not_told_of_who_takes_it_next():
    pool = SlotPool()
    slot = pool.take()
    slot.num_told_tokens, slot.num_told_blocks = 30, 2
    pool.give_back(slot)
    again = pool.take()
    assert (again.index, again.num_told_tokens, again.num_told_blocks) == (0, 0, 0)


def test_slots_that_were_freed_are_told_once_also_when_they_are_in_use_again():
    pool = SlotPool()
    slots = [pool.take() for _ in range(3)]
    pool.give_back(slots[2])
    pool.give_back(slots[0])
    pool.give_back(pool.take())
    assert pool.take_freed() == (0, 2)
    assert pool.take_freed() == ()


def test_a_lost_slot_and_one_that_two_hold_are_found():
    pool = SlotPool()
    slots = [pool.take() for _ in range(3)]
    pool.give_back(slots[1])
    assert pool.is_whole([2, 0])
    assert not pool.is_whole([2])
    assert not pool.is_whole([2, 0, 0])
