"""What a shared cache has of a trace, by how much it holds."""

import pytest

from cluster.hit_curve import hits, in_order, num_common
from cluster.traces import Trace, TraceRequest, TraceSession, read_trace
from tests.shared_traces import agent_sessions, mooncake


def request(*runs: tuple[int, int], at_s: float = 0.0) -> TraceRequest:
    num_tokens = 512 * sum(count for _, count in runs)
    return TraceRequest(at_s, 0.0, num_tokens, 8, tuple(runs))


def talk(*requests: TraceRequest) -> Trace:
    """A trace of requests that each are a session, at one time after the other."""
    sessions = [TraceSession(str(i), float(i), (one,)) for i, one in enumerate(requests)]
    return Trace("mooncake", 512, tuple(sessions))


def share(trace: Trace, num_blocks: int | None) -> list[float]:
    turns = list(in_order(trace, 2))
    found = hits(trace, turns, None if num_blocks is None else num_blocks * trace.block_tokens)
    return [found.by_request[turn.session, turn.place] / trace.block_tokens for turn in turns]


def test_blocks_are_hit_from_the_head_on_and_one_token_is_always_computed():
    trace = talk(request((0, 4)), request((0, 2), (9, 1), (3, 1)), request((0, 4)))
    assert share(trace, None) == [0, 2, 4 - 1 / 512]


def test_of_a_prompt_the_tail_goes_first():
    trace = talk(request((0, 4)), request((10, 2)), request((0, 4)))
    assert share(trace, 4) == [0, 0, 2]
    assert share(trace, 2) == [0, 0, 0]


def test_sessions_lose_their_tails_oldest_first():
    one = TraceSession("a", None, (request((0, 4)), request((0, 5), at_s=2.0)))
    other = TraceSession("b", None, (request((100, 3), at_s=0.0), request((100, 4), at_s=5.0)))
    trace = Trace("agents", 512, (one, other))
    assert [(turn.session, turn.place) for turn in in_order(trace, 2)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert share(trace, None) == [0, 0, 4, 3]
    assert share(trace, 5) == [0, 0, 2, 0]


def test_a_session_follows_where_one_has_ended():
    sessions = [TraceSession(str(i), None, (request((0, 1)), request((0, 1), at_s=10.0 * i))) for i in range(5)]
    order = [(turn.session, turn.place) for turn in in_order(Trace("agents", 512, tuple(sessions)), 2)]
    assert sorted(order) == [(session, place) for session in range(5) for place in range(2)]
    assert order.index((2, 0)) > order.index((0, 1))
    assert order.index((3, 0)) > order.index((1, 1))


def test_common_heads():
    assert num_common(((0, 4),), ((0, 9),)) == 4
    assert num_common(((0, 4), (8, 2)), ((0, 4), (8, 1), (3, 3))) == 5
    assert num_common((), ((0, 4),)) == num_common(((1, 4),), ((0, 4),)) == 0


@pytest.mark.slow
def test_the_real_conversations_give_the_curve_that_their_makers_saw():
    trace = read_trace(mooncake())
    turns = list(in_order(trace, 1))
    seen = {blocks: hits(trace, turns, blocks * 512).share for blocks in (1000, 10_000, 50_000)}
    assert {blocks: round(one, 3) for blocks, one in seen.items()} == {1000: 0.045, 10_000: 0.216, 50_000: 0.362}
    assert hits(trace, turns, None).share == pytest.approx(0.374, abs=1e-3)


@pytest.mark.slow
def test_of_real_agents_32_at_once_want_some_4_million_tokens():
    trace = read_trace(agent_sessions())
    turns = list(in_order(trace, 32))
    seen = [hits(trace, turns, int(1e6 * millions)).share for millions in (0.5, 1, 2, 4, 8)]
    assert seen == pytest.approx([0.463, 0.734, 0.906, 0.954, 0.963], abs=0.03)
