from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from nodecache.disk.collection import Candidate, choose_victim


def candidate(segment_id: int, *values: float, num_rows: int = 4) -> Candidate:
    return Candidate(segment_id, num_rows, np.array(values, np.float64))


def test_without_a_candidate_there_is_no_victim():
    assert choose_victim([], 4, 4) is None


def test_an_empty_segment_goes_first():
    assert choose_victim([candidate(1, 1, 2), candidate(2)], 0, 4).segment_id == 2


def test_the_coldest_segment_goes_whole_where_as_many_blocks_must_go():
    victim = choose_victim([candidate(2, 5, 6, 7, 8), candidate(1, 1, 2, 3, 4), candidate(3, 9, 10, 11, 12)], 4, 4)
    assert (victim.segment_id, victim.is_kept.tolist()) == (1, [False] * 4)


def test_what_need_not_go_is_copied():
    victim = choose_victim([candidate(1, 1, 2), candidate(2, 3, 4, 5, 6)], 0, 4)
    assert (victim.segment_id, victim.is_kept.tolist()) == (1, [True, True])


def test_a_valuable_block_among_cold_ones_is_copied():
    victim = choose_victim([candidate(1, 1, 2, 90, 3), candidate(2, 50, 60, 70, 80)], 3, 4)
    assert (victim.segment_id, victim.is_kept.tolist()) == (1, [False, False, True, False])


def test_at_most_half_a_segment_is_copied_and_what_there_is_room_for():
    assert choose_victim([candidate(1, 5, 6, 7, 8)], 0, 4).is_kept.tolist() == [False, False, True, True]
    assert choose_victim([candidate(1, 5, 6, 7, 8)], 0, 1).is_kept.tolist() == [False, False, False, True]
    assert choose_victim([candidate(1, 5, 6, 7, 8)], 0, 0).is_kept.tolist() == [False] * 4


def test_of_equal_losses_the_first_goes():
    assert choose_victim([candidate(7, 1, 1, 1, 1), candidate(3, 1, 1, 1, 1)], 8, 4).segment_id == 7


@settings(deadline=None)
@given(
    values=st.lists(st.lists(st.floats(0, 1e9), max_size=8), min_size=1, max_size=6),
    num_excess=st.integers(-10, 60),
    num_free=st.integers(0, 8),
)
def test_a_victim_gives_at_least_half_of_its_room_and_keeps_its_best(values, num_excess, num_free):
    candidates = [candidate(number, *each, num_rows=8) for number, each in enumerate(values)]
    victim = choose_victim(candidates, num_excess, num_free)
    chosen = candidates[victim.segment_id].values
    assert len(victim.is_kept) == len(chosen)
    assert victim.is_kept.sum() <= min(4, num_free)
    if victim.is_kept.any() and not victim.is_kept.all():
        assert chosen[victim.is_kept].min() >= chosen[~victim.is_kept].max()
