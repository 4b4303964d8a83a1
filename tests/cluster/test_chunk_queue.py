import asyncio
import random

import pytest

from cluster.chunk_queue import ChunkQueue, Pace, joined
from messages.errors import ErrorInfo, WorkerError
from messages.stream import PromptSources, TokenChunk, TokenLogprob


class Clock:
    """CPU time that passes by so much whenever it is looked at."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += self.step_s
        return self._now_s


def pace(num_streams: int, *, cost_s: float = 2e-4, num_cores: int = 8) -> Pace:
    """One that has seen what a hand-over costs."""
    made = Pace(lambda: num_streams, cpu_s=Clock(256 * cost_s), num_cores=num_cores)
    for _ in range(256):
        made.hand_over()
    return made


@pytest.mark.parametrize(
    ("num_streams", "cost_s", "num_cores", "spacing_s"),
    [
        (1, 2e-4, 8, 4e-4),
        (32, 2e-4, 8, 12.8e-3),
        (32, 2e-4, 64, 12.8e-3),  # never more than half a core
        (32, 2e-4, 2, 25.6e-3),  # a quarter where there are two
        (32, 4e-4, 8, 25.6e-3),
        (1000, 2e-4, 8, 50e-3),
        (10, 0.0, 8, 1e-3),  # a cost that cannot be
        (10, 1.0, 8, 20e-3),
    ],
)
def test_all_streams_together_take_a_share_of_a_core(num_streams, cost_s, num_cores, spacing_s):
    assert pace(num_streams, cost_s=cost_s, num_cores=num_cores).hand_over() == pytest.approx(spacing_s)


def test_what_a_hand_over_costs_is_measured_anew():
    clock = Clock(256 * 1e-4)
    made = Pace(lambda: 10, cpu_s=clock, num_cores=8)
    assert [made.hand_over() for _ in range(256)][-1] == pytest.approx(2e-3)
    clock.step_s = 256 * 3e-4
    assert [made.hand_over() for _ in range(256)][-2:] == pytest.approx([2e-3, 6e-3])


def chunk(request_id: str = "a", *token_ids: int, **fields: object) -> TokenChunk:
    return TokenChunk(request_id=request_id, token_ids=list(token_ids), **fields)


ERROR = ErrorInfo(kind=WorkerError.__name__, message="gone")


def test_chunks_of_one_sequence_become_one_with_all_that_they_held():
    sources = PromptSources(computed=3)
    logprobs = [TokenLogprob(token_id=i, logprob=-1.0, rank=1) for i in (1, 2, 3)]
    parts = [
        chunk("a", 1, logprobs=logprobs[:1], sources=sources, prompt_logprobs=[None]),
        chunk("a", 2, logprobs=logprobs[1:2]),
        chunk("a", 3, logprobs=logprobs[2:], stop_token_id=3, finish_reason="stop"),
    ]
    whole = chunk(
        "a",
        *(1, 2, 3),
        logprobs=logprobs,
        sources=sources,
        prompt_logprobs=[None],
        stop_token_id=3,
        finish_reason="stop",
    )
    assert joined(parts) == [whole]
    assert parts[0].token_ids == [1]


@pytest.mark.parametrize("failure", [{"finish_reason": "error", "error": ERROR}, {"finish_reason": "cancelled"}])
def test_tokens_before_a_failure_are_given(failure):
    assert joined([chunk("a", 1), chunk("a", 2), chunk("a", **failure)]) == [chunk("a", 1, 2), chunk("a", **failure)]
    assert joined([chunk("b", 1), chunk("a", **failure)]) == [chunk("b", 1), chunk("a", **failure)]


def test_each_sequence_keeps_its_tokens_and_their_order():
    draw = random.Random(1)
    for _ in range(100):
        parts = [chunk(draw.choice("abc"), draw.randrange(9)) for _ in range(draw.randrange(1, 12))]
        found = {part.request_id: part.token_ids for part in joined(parts)}
        assert found == {key: [p.token_ids[0] for p in parts if p.request_id == key] for key in found}
        assert sum(map(len, found.values())) == len(parts)


async def test_the_first_chunk_is_given_at_once_and_what_comes_too_early_joined():
    queue = ChunkQueue(pace(32))
    queue.put(chunk("a", 0))
    assert await queue.get() == [chunk("a", 0)]
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    queue.put(chunk("a", 1))
    loop.call_later(0.004, queue.put, chunk("a", 2))
    assert await queue.get() == [chunk("a", 1, 2)]
    assert loop.time() - begin_s > 0.012


async def test_a_slow_sequence_is_never_held_back():
    queue = ChunkQueue(pace(32))
    loop = asyncio.get_running_loop()
    queue.put(chunk("a", 0))
    await queue.get()
    for number in range(3):
        await asyncio.sleep(0.014)
        queue.put(chunk("a", number))
        asked_s = loop.time()
        turns: list[float] = []
        loop.call_soon(lambda turns=turns: turns.append(loop.time()))
        assert await queue.get() == [chunk("a", number)]
        assert not turns, "it came in the same turn of the loop"
        assert loop.time() - asked_s < 1


async def test_a_wait_that_is_cancelled_loses_nothing():
    queue = ChunkQueue(pace(1000))
    queue.put(chunk("a", 0))
    await queue.get()
    queue.put(chunk("a", 1))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await queue.get()
    assert await queue.get() == [chunk("a", 1)]
