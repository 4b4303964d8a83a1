"""The workload of each repeat: the same lengths and times of turns, other tokens."""

from __future__ import annotations

import math

import pytest

from cluster.bench.from_trace import Scale
from cluster.bench.synthetic import RandomWorkload
from cluster.bench.workload import num_requests
from cluster.bench.workloads import Wanted, workloads

DRAWN = RandomWorkload(num_sessions=1, input_len=12)


def wanted(**fields) -> Wanted:
    common = {"dataset": "random", "num_prompts": 10, "random": DRAWN, "scale": Scale(speed=math.inf)}
    return Wanted(**(common | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"turns": 3},
        {"dataset": "agents", "turns": 4, "scale": Scale(block_tokens=1, max_prompt_tokens=500, speed=math.inf)},
    ],
    ids=["random", "turns", "agents"],
)
def test_repeats_have_as_many_requests_and_other_tokens(fields):
    make = workloads(wanted(**fields))
    first, second = make(0), make(1)
    assert num_requests(first) == num_requests(second) == 10
    assert [len(session.turns) for session in first] == [len(session.turns) for session in second]
    tokens = [{tuple(turn.tokens) for session in sessions for turn in session.turns} for sessions in (first, second)]
    assert not tokens[0] & tokens[1]


def test_agents_of_all_repeats_are_as_long():
    make = workloads(wanted(dataset="agents", turns=5, scale=Scale(block_tokens=1, speed=math.inf)))
    one, other = ([len(turn.tokens) for session in make(number) for turn in session.turns] for number in (0, 1))
    assert one == other


def test_a_seed_gives_the_same_workload():
    assert workloads(wanted(seed=3))(2) == workloads(wanted(seed=3))(2) != workloads(wanted(seed=4))(2)


def test_sessions_come_at_the_rate():
    sessions = workloads(wanted(request_rate=4.0, arrivals="constant"))(0)
    assert [session.begin_s for session in sessions][:3] == [0.0, 0.25, 0.5]
