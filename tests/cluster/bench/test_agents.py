"""Drawn sessions of agents: as long and as much alike as the recorded ones whose quantiles they have."""

from __future__ import annotations

from statistics import fmean, median

import pytest

from cluster.bench.agents import agent_trace
from cluster.bench.from_trace import Scale, sessions_of

TRACE = agent_trace(200, 25, 0)


def num_common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_seed_alone_decides():
    assert agent_trace(3, 5, 1) == agent_trace(3, 5, 1) != agent_trace(3, 5, 2)
    assert agent_trace(5, 5, 1).sessions[:3] == agent_trace(3, 5, 1).sessions


def test_prompts_are_as_long_as_recorded():
    """474 recorded sessions, 25 turns: mean 1,595 blocks, median 1,143; a first prompt's median 358."""
    blocks = [request.num_prompt_tokens / 64 for session in TRACE.sessions for request in session.requests]
    assert fmean(blocks) == pytest.approx(1595, rel=0.2)
    assert median(blocks) == pytest.approx(1000, rel=0.3)
    assert median(session.requests[0].num_prompt_tokens / 64 for session in TRACE.sessions) == pytest.approx(
        358, rel=0.3
    )


@pytest.mark.slow
def test_most_of_a_prompt_was_in_the_one_before():
    """Of recorded ones 92.6 % of prompt tokens, at 25 turns, in blocks of 16 that stand for 64 each."""
    hits = total = 0
    for session in sessions_of(agent_trace(16, 25, 0), Scale(block_tokens=1), 0):
        before: list[int] = []
        for turn in session.turns:
            hits += num_common(before, list(turn.tokens))
            total += len(turn.tokens)
            before = list(turn.tokens)
    assert hits / total == pytest.approx(0.93, abs=0.03)


def test_sessions_share_nothing():
    one, other = agent_trace(2, 3, 0).sessions
    assert not set(one.requests[-1].block_ids()) & set(other.requests[-1].block_ids())
