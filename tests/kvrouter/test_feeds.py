"""Who is in step, and who is asked for a snapshot: few at a time, again where none comes."""

import pytest

from kvrouter.feeds import Feeds
from messages.fleet import KvEvents


def piece(worker_id, seq, num_left):
    return KvEvents(worker_id=worker_id, seq=seq, cleared=seq == 0, num_pieces_left=num_left)


@pytest.fixture
def feeds():
    return Feeds(timeout_s=5.0)


def begin(feeds, *worker_ids):
    for worker_id in worker_ids:
        feeds.begin(worker_id)


def test_few_snapshots_are_under_way_at_once_and_the_next_is_asked_for_when_one_is_whole(feeds):
    begin(feeds, "a", "b", "c", "d")
    assert feeds.to_ask(0.0) == ["a", "b"]
    assert feeds.to_ask(0.0) == []
    assert feeds.num_out_of_step == 4
    assert [feeds.take(piece("a", seq, 1 - seq), 0.1) for seq in range(2)] == ["fold", "fold"]
    assert feeds.to_ask(0.1) == ["c"]
    assert feeds.num_out_of_step == 3


def test_a_worker_that_is_silent_does_not_keep_others_waiting_and_is_asked_again(feeds):
    begin(feeds, "a", "b", "c")
    assert feeds.to_ask(0.0) == ["a", "b"]
    feeds.take(piece("a", 0, 9), 0.9)
    assert feeds.to_ask(1.5) == ["c"]
    assert feeds.to_ask(5.5) == ["b"]
    assert feeds.to_ask(6.0) == ["a"]  # in the midst of its pieces
    assert feeds.take(piece("a", 1, 8), 6.0) == "ignore"
    assert feeds.take(piece("a", 0, 9), 6.0) == "fold"


def test_what_is_of_the_numbering_before_is_ignored_until_the_snapshot_begins(feeds):
    begin(feeds, "a")
    assert feeds.take(piece("a", 0, 0), 0.0) == "ignore"  # nobody asked
    feeds.to_ask(0.0)
    assert feeds.take(KvEvents(worker_id="a", seq=7), 0.0) == "ignore"
    assert feeds.take(piece("a", 0, 0), 0.0) == "fold"
    assert feeds.take(KvEvents(worker_id="a", seq=1), 0.0) == "fold"


@pytest.mark.parametrize("seq", [0, 2])
def test_a_gap_between_pieces_or_changes_leads_to_a_new_snapshot(feeds, seq):
    begin(feeds, "a")
    feeds.to_ask(0.0)
    assert feeds.take(piece("a", 0, 3), 0.0) == "fold"
    assert feeds.take(KvEvents(worker_id="a", seq=seq, num_pieces_left=2), 0.0) == "gap"
    assert feeds.to_ask(0.0) == ["a"]
    assert feeds.take(piece("a", 1, 2), 0.0) == "ignore"


def test_who_left_is_nobody(feeds):
    begin(feeds, "a", "b", "c")
    feeds.to_ask(0.0)
    feeds.forget("a")
    feeds.forget("c")
    assert feeds.take(piece("a", 0, 0), 0.0) == "ignore"
    assert (list(feeds), feeds.num_out_of_step, feeds.to_ask(0.0)) == (["b"], 1, [])


def test_who_is_put_off_is_not_listened_to_and_asked_again_after_a_while(feeds):
    begin(feeds, "a")
    feeds.to_ask(0.0)
    assert feeds.take(piece("a", 0, 2), 0.0) == "fold"
    feeds.put_off("a", 0.1)
    assert feeds.take(piece("a", 1, 1), 0.2) == "ignore"
    assert feeds.take(piece("a", 0, 0), 0.2) == "ignore"
    assert (feeds.to_ask(5.0), feeds.num_out_of_step) == ([], 1)
    assert feeds.to_ask(5.2) == ["a"]
    assert feeds.take(piece("a", 0, 0), 5.3) == "fold"
