import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter.index import Holder
from kvrouter.name_memory import Last, NameMemory
from messages.miss import MissedRun


class Memory(NameMemory):
    """Writes down at once."""

    def note(self, holder, stored, removed):
        super().note(holder, stored, removed)
        self.flush()


A, B, B_HOST = Holder("a"), Holder("b"), Holder("b", "host")


def name(number: int) -> bytes:
    return random.Random(number).randbytes(16)


def names(*numbers: int) -> bytes:
    return b"".join(map(name, numbers))


def test_a_name_that_nobody_ever_told_of_was_never_seen():
    assert Memory().last(name(1)) == Last("never_seen")


def test_what_its_holder_dropped_is_evicted_and_what_went_with_it_is_lost():
    memory = Memory()
    memory.note(A, names(1, 2), b"")
    memory.note(A, b"", names(1))
    memory.lose("a")
    assert memory.last(name(1)) == Last("evicted")
    assert memory.last(name(2)) == Last("holder_lost", "a")


def test_what_another_stored_later_is_not_evicted_by_who_had_it_before():
    memory = Memory()
    memory.note(A, names(1), b"")
    memory.note(B_HOST, names(1), b"")
    memory.note(A, b"", names(1))
    memory.lose("b")
    assert memory.last(name(1)) == Last("holder_lost", "b"), "the node cache had it, and went"


def test_a_block_that_moved_down_within_a_node_is_not_evicted():
    memory = Memory()
    memory.note(B_HOST, names(1), b"")
    memory.note(Holder("b", "disk"), names(1), b"")
    memory.note(B_HOST, b"", names(1))
    memory.lose("b")
    assert memory.last(name(1)) == Last("holder_lost", "b")


def test_what_one_drops_after_the_last_who_stored_it_was_lost_is_evicted():
    memory = Memory()
    memory.note(A, names(1), b"")
    memory.note(B, names(1), b"")
    memory.lose("b")
    memory.note(A, b"", names(1))
    assert memory.last(name(1)) == Last("evicted")


def test_a_worker_that_comes_back_and_does_not_have_it_any_more_evicted_it():
    memory = Memory()
    memory.note(A, names(1), b"")
    assert memory.last(name(1)) == Last("evicted"), "it is there, and nobody holds the block"


def test_stored_and_dropped_in_one_message_is_evicted():
    memory = Memory()
    memory.note(A, names(1, 2), names(1))
    assert memory.last(name(1)) == Last("evicted")


def test_a_later_name_at_the_same_place_makes_the_earlier_one_never_seen():
    memory = Memory(num_places=1)
    memory.note(A, names(1), b"")
    memory.note(A, names(2), b"")
    memory.note(A, b"", names(2))
    assert memory.last(name(1)) == Last("never_seen")
    assert memory.last(name(2)) == Last("evicted")


def test_after_as_many_changes_as_it_has_places_about_a_third_is_still_known():
    memory = Memory(num_places=1 << 12)
    memory.note(A, names(*range(1000)), b"")
    memory.note(A, names(*range(1000, 1000 + (1 << 12))), b"")
    known = sum(memory.last(name(number)).why != "never_seen" for number in range(1000))
    assert 320 < known < 420  # exp(-1) of 1000


def test_missing_says_why_from_the_first_block_that_nobody_holds_on():
    memory = Memory()
    memory.note(A, names(*range(6)), b"")
    memory.note(A, b"", names(2, 3))
    memory.lose("a")
    assert memory.missing(names(*range(9)), 2) == (
        MissedRun(2, 4, "evicted"),
        MissedRun(4, 6, "holder_lost", "a"),
        MissedRun(6, 9, "never_seen"),
    )
    assert memory.missing(names(*range(9)), 9) == ()
    assert memory.missing(b"", 0) == ()


@pytest.mark.slow
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 3))
def test_missing_covers_the_prompt_and_finds_every_border_where_no_state_comes_twice(lengths, begin):
    memory = Memory()
    states = ["never_seen", "evicted", *(f"w{number}" for number in range(4))][: len(lengths)]
    said, number = [], 0
    for length, state in zip(lengths, states, strict=True):
        numbers = range(number, number + length)
        if state != "never_seen":
            holder = Holder(state)
            memory.note(holder, names(*numbers), names(*numbers) if state == "evicted" else b"")
            memory.lose(state)
        said += [(state if state in ("never_seen", "evicted") else "holder_lost")] * length
        number += length
    runs = memory.missing(names(*range(number)), min(begin, number))
    assert [why for run in runs for why in [run.why] * (run.end - run.begin)] == said[begin:]


def test_more_holders_than_there_are_numbers_are_told_apart_still():
    memory = Memory()
    for number in range(70_000):
        memory.note(Holder(f"w{number}"), b"", b"")
    memory.note(Holder("w69999"), names(1), b"")
    memory.lose("w69999")
    assert memory.last(name(1)) == Last("holder_lost", "w69999")


def test_what_is_noted_counts_once_it_is_written_down_at_last_with_the_loss_of_a_worker():
    memory = NameMemory()
    memory.note(A, names(1, 2), names(1))
    memory.note(B, names(3), b"")
    assert memory.last(name(1)) == Last("never_seen")
    memory.lose("b")
    assert [memory.last(name(number)).why for number in (1, 2, 3)] == ["evicted", "evicted", "holder_lost"]


def test_no_more_than_some_thousand_names_wait_to_be_written_down():
    memory = NameMemory()
    for begin in range(0, 9000, 100):
        memory.note(A, names(*range(begin, begin + 100)), b"")
    assert memory.last(name(0)) == Last("evicted")
    assert memory.last(name(8999)) == Last("never_seen")
