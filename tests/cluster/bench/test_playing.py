"""Sessions at their times: turns in order, so many at once, an end in any case."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from cluster.bench.bodies import Writing
from cluster.bench.figures import Outcome
from cluster.bench.playing import Pace, Player
from cluster.bench.sending import Answer
from cluster.bench.workload import Session, Turn

WRITING = Writing(model="m")
ALL = Pace()


class FakeSender:
    """Answers after a while, with the ids that the server is said to give; may never answer."""

    def __init__(self, seconds: float = 0.0, token_ids: tuple[int, ...] = (), hangs_at: int = -1) -> None:
        self.asked: list[tuple[float, dict[str, Any], int]] = []
        self.at_once = self.most_at_once = 0
        self._seconds, self._token_ids, self._hangs_at = seconds, token_ids, hangs_at

    async def ask(self, path: str, body: dict[str, Any], *, num_sent_tokens: int, max_tokens: int, wants_all: bool):
        self.asked.append((time.perf_counter(), body, num_sent_tokens))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(60 if len(self.asked) == self._hangs_at else self._seconds)
        self.at_once -= 1
        return Answer(Outcome(num_output_tokens=max_tokens), list(self._token_ids))


async def play(sender: FakeSender, sessions: list[Session], pace: Pace = ALL) -> tuple[list[Outcome], list[Outcome]]:
    done: list[Outcome] = []
    outcomes, _ = await Player(sender, WRITING, pace, "salt", done.append).play(sessions)
    return outcomes, done


async def test_turns_follow_each_other_with_what_was_answered():
    sender = FakeSender(token_ids=(7, 8))
    turns = (Turn([1, 2], 2), Turn([3], 2, is_appended=True), Turn([9], 2))
    outcomes, done = await play(sender, [Session(0.0, turns)])
    assert [body["prompt"] for _, body, _ in sender.asked] == [[1, 2], [1, 2, 7, 8, 3], [9]]
    assert [num_sent for _, _, num_sent in sender.asked] == [2, 5, 1]
    assert outcomes == done
    assert len(done) == 3


async def test_an_answer_whose_tokens_nobody_tells_is_stood_for_by_as_many():
    sender = FakeSender()
    await play(sender, [Session(0.0, (Turn([1, 2], 5), Turn([3], 1, is_appended=True)))])
    prompt = sender.asked[1][1]["prompt"]
    assert (prompt[:2], prompt[-1], len(prompt)) == ([1, 2], 3, 8)


async def test_sessions_begin_in_time_and_turns_after_their_pause():
    sender = FakeSender(seconds=0.02)
    sessions = [Session(0.1, (Turn([1], 1), Turn([2], 1, pause_s=0.1))), Session(0.05, (Turn([3], 1),))]
    began_s = time.perf_counter()
    outcomes, _ = await play(sender, sessions)
    assert [body["prompt"] for _, body, _ in sender.asked] == [[3], [1], [2]]
    times = [at_s - began_s for at_s, _, _ in sender.asked]
    assert all(at_s >= wanted_s for at_s, wanted_s in zip(times, (0.05, 0.1, 0.22), strict=True))
    assert all(outcome.late_s < 0.1 for outcome in outcomes)


async def test_no_more_sessions_than_said_are_played_at_once():
    sender = FakeSender(seconds=0.01)
    await play(sender, [Session(0.0, (Turn([1], 1), Turn([2], 1)))] * 9, Pace(max_concurrency=2))
    assert (len(sender.asked), sender.most_at_once) == (18, 2)


async def test_who_waits_for_a_place_is_late():
    sender = FakeSender(seconds=0.05)
    outcomes, _ = await play(sender, [Session(0.001, (Turn([1], 1),))] * 2, Pace(max_concurrency=1))
    assert sorted(outcome.late_s >= 0.04 for outcome in outcomes) == [False, True]


async def test_no_session_goes_on_once_the_player_is_cancelled():
    sender = FakeSender(hangs_at=1)
    playing = asyncio.create_task(play(sender, [Session(0.0, (Turn([1], 1), Turn([2], 1)))]))
    await asyncio.sleep(0.05)
    assert sender.at_once == 1
    playing.cancel()
    await asyncio.gather(playing, return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_is_not_answered_in_time_has_failed_and_is_counted():
    sender = FakeSender(seconds=0.01, hangs_at=2)
    sessions = [Session(0.0, (Turn([1], 1), Turn([2], 1), Turn([3], 1)))]
    outcomes, _ = await play(sender, sessions, Pace(limit_s=0.2))
    assert [outcome.fault for outcome in outcomes] == [None, "not finished", "not finished"]
    assert "--max-seconds" in outcomes[-1].detail
