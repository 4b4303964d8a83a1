from __future__ import annotations

import pytest
import torch

from engine.steps.staging import Staging
from tests.engine.steps.emulator import Emulator


@pytest.fixture
def emulator() -> Emulator:
    return Emulator()


def test_what_is_brought_arrives_in_a_new_tensor_or_where_it_is_wanted(emulator):
    staging = Staging(emulator, 4)
    first = staging.bring(2, lambda words: words.__setitem__(slice(None), [1, 2]))
    target = torch.zeros(3, dtype=torch.int64)
    assert staging.bring(3, lambda words: words.__setitem__(slice(None), [3, 4, 5]), target) is target
    assert (first.tolist(), target.tolist()) == ([1, 2], [3, 4, 5])


def test_a_buffer_is_written_again_when_its_copy_is_over_and_not_before(emulator):
    staging = Staging(emulator, 1)
    emulator.done.clear()
    for number in range(4):
        staging.bring(1, lambda words, number=number: words.fill(number))
    assert emulator.done == ["wait 0", "copy 1", "wait 0", "copy 2", "wait 1", "copy 3", "wait 2", "copy 4"]
    emulator.synchronize()


def test_two_ways_to_the_device_do_not_wait_for_each_other(emulator):
    one, other = Staging(emulator), Staging(emulator)
    emulator.done.clear()
    for staging in (one, other, one, other):
        staging.bring(1, lambda words: words.fill(7))
    assert [each for each in emulator.done if each.startswith("wait")] == ["wait 0"] * 4


def test_room_grows_by_doubling_once_nothing_leaves_from_what_there_was(emulator):
    staging = Staging(emulator, 2)
    emulator.done.clear()
    for count in (2, 2, 5, 7, 8):
        brought = staging.bring(count, lambda words: words.fill(9))
        assert brought.tolist() == [9] * count
    assert [each for each in emulator.done if not each.startswith("copy")] == [
        *("wait 0", "wait 0"),
        *("wait 1", "pinned 8"),
        *("wait 2", "pinned 8"),
        "wait 3",
    ]
