"""Copies as rows of an array, and the ranges that they may be in."""

from __future__ import annotations

import numpy as np
import pytest

from transport.protocol import Copies, Copy, RegionError, check_ranges

ONE, OTHER = Copy(0, 2**40, 3), Copy(7, 0, 5)


def test_copies_are_a_sequence_whatever_they_were_made_of():
    rows = Copies.of([ONE, OTHER])
    assert (list(rows), len(rows), rows[1], rows[-1]) == ([ONE, OTHER], 2, OTHER, OTHER)
    assert list(rows[1:]) == [OTHER]
    assert rows.num_bytes == 8
    assert Copies.of(rows) is rows
    assert (list(Copies.of([])), Copies.of([]).num_bytes) == ([], 0)


def test_copies_of_one_size_are_made_of_their_offsets():
    assert list(Copies.of_equal(np.array([1, 5]), np.array([9, 2]), 4)) == [Copy(1, 9, 4), Copy(5, 2, 4)]


@pytest.mark.parametrize(
    "bad", [Copy(9, 0, 2), Copy(0, 19, 2), Copy(-1, 0, 1), Copy(0, -1, 1), Copy(0, 0, -1), Copy(0, 0, 2**62)]
)
def test_the_first_copy_that_lies_outside_is_named_with_what_there_is(bad):
    with pytest.raises(RegionError, match=f"num_bytes={bad.num_bytes}.* source 10 bytes, target 20 bytes"):
        check_ranges([Copy(0, 0, 10), bad, Copy(99, 99, 99)], 10, 20)
    check_ranges([Copy(0, 0, 10), Copy(10, 20, 0)], 10, 20)
