"""Drawn workload: what was asked for, the same for the same seed."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest

from cluster.bench.synthetic import RandomWorkload, arriving
from cluster.bench.workload import Session, Turn, cut_to, num_requests


def test_lengths_are_those_asked_for():
    sessions = RandomWorkload(num_sessions=5, input_len=30, output_len=7).sessions(0)
    assert [(len(turn.tokens), turn.max_tokens) for session in sessions for turn in session.turns] == [(30, 7)] * 5


def test_lengths_differ_within_the_ratio():
    sessions = RandomWorkload(num_sessions=400, input_len=100, output_len=1, range_ratio=0.2).sessions(0)
    lengths = [len(session.turns[0].tokens) for session in sessions]
    assert (min(lengths), max(lengths)) == (80, 120)
    assert fmean(lengths) == pytest.approx(100, abs=2)


def test_sessions_of_a_group_share_their_prefix_and_no_more():
    sessions = RandomWorkload(num_sessions=4, input_len=50, prefix_len=20, num_prefixes=2).sessions(0)
    heads = [tuple(session.turns[0].tokens[:20]) for session in sessions]
    assert heads[0] == heads[2] != heads[1] == heads[3]
    assert len({tuple(session.turns[0].tokens[20:]) for session in sessions}) == 4


def test_later_turns_are_appended_after_a_pause():
    [session] = RandomWorkload(num_sessions=1, input_len=10, prefix_len=5, num_turns=3, think_s=2.0).sessions(0)
    assert [(len(turn.tokens), turn.is_appended, turn.pause_s) for turn in session.turns] == [
        (15, False, 0.0),
        (10, True, 2.0),
        (10, True, 2.0),
    ]


def test_a_seed_gives_the_same_load_and_another_seed_another():
    workload = RandomWorkload(num_sessions=2, input_len=20)
    assert workload.sessions(1) == workload.sessions(1) != workload.sessions(2)


def test_tokens_lie_in_the_vocabulary():
    [session] = RandomWorkload(num_sessions=1, input_len=5000, vocab_size=300).sessions(0)
    assert (min(session.turns[0].tokens), max(session.turns[0].tokens)) == (100, 299)


def sessions_of(count: int) -> list[Session]:
    return [Session(0.0, (Turn([1], 1),)) for _ in range(count)]


def test_constant_arrivals_have_equal_distances():
    begins = [session.begin_s for session in arriving(sessions_of(4), 2.0, "constant", 0)]
    assert begins == [0.0, 0.5, 1.0, 1.5]


def test_poisson_arrivals_come_at_the_rate_and_vary_as_they_should():
    begins = [session.begin_s for session in arriving(sessions_of(4000), 10.0, "poisson", 0)]
    gaps = [later - begin for begin, later in itertools.pairwise(begins)]
    assert fmean(gaps) == pytest.approx(0.1, rel=0.05)
    assert fmean(gap**2 for gap in gaps) == pytest.approx(2 * 0.1**2, rel=0.1)  # an exponential's second moment


def test_a_load_is_cut_fairly():
    turns = tuple(Turn([number], 1) for number in range(3))
    cut = cut_to([Session(0.0, turns), Session(1.0, turns[:1]), Session(2.0, turns)], 4)
    assert [len(session.turns) for session in cut] == [2, 1, 1]
    assert num_requests(cut) == 4
    assert cut_to([Session(0.0, turns), Session(1.0, turns)], 1) == [Session(0.0, turns[:1])]
