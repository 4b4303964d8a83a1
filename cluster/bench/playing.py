"""Plays sessions at their times: an open loop, or a closed one with so many at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.bench.bodies import COMPLETIONS, Writing
from cluster.bench.figures import Outcome
from cluster.bench.sending import Answer
from cluster.bench.synthetic import FIRST_TOKEN, VOCAB_SIZE
from cluster.bench.workload import Session, Turn, num_requests


class Asks(Protocol):
    """Who asks one question (cluster.bench.sending.Sender); a fake of it is in the tests."""

    async def ask(
        self, path: str, body: dict[str, object], *, num_sent_tokens: int, max_tokens: int, wants_all: bool
    ) -> Answer:
        """Ask, and return what came of it; raises nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many sessions are played at once, and for how long in all."""

    max_concurrency: int | None = None  #: sessions; one that pauses keeps its place. None: all whose time has come
    limit_s: float = 3600.0  #: then what is not answered has failed


class Player:
    """One workload against one server. `on_done` is called after each answer."""

    def __init__(
        self, sender: Asks, writing: Writing, pace: Pace, salt: str, on_done: Callable[[Outcome], None]
    ) -> None:
        self._sender = sender
        self._writing = writing
        self._pace = pace
        self._salt = salt
        self._on_done = on_done
        self._outcomes: list[Outcome] = []
        self._begun_s = 0.0
        self._slots = asyncio.Semaphore(pace.max_concurrency) if pace.max_concurrency else contextlib.nullcontext()

    async def play(self, sessions: Sequence[Session]) -> tuple[list[Outcome], float]:
        """Return what came of every request, and the seconds that all took together."""
        self._begun_s = time.perf_counter()
        tasks = [asyncio.create_task(self._session(session)) for session in sessions]
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._pace.limit_s)
            seconds = time.perf_counter() - self._begun_s
        finally:  # also when this is cancelled: no session outlives its connections
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # a bug of ours is not to be lost
        for _ in range(num_requests(sessions) - len(self._outcomes)):
            detail = f"within {self._pace.limit_s:g} s of the repeat (--max-seconds)"
            self._outcomes.append(Outcome(fault="not finished", detail=detail))
        return self._outcomes, seconds

    async def _session(self, session: Session) -> None:
        await self._sleep_until(session.begin_s)
        async with self._slots:
            wanted_s = session.begin_s
            before: list[int] = []
            for number, turn in enumerate(session.turns):
                if number:
                    wanted_s = self._now_s() + turn.pause_s
                    await self._sleep_until(wanted_s)
                answer = await self._ask(turn, before, wanted_s if number or session.begin_s else None)
                before = [*(before if turn.is_appended else ()), *turn.tokens, *_answered(answer, turn)]

    async def _ask(self, turn: Turn, before: Sequence[int], wanted_s: float | None) -> Answer:
        """Ask one turn; `wanted_s`: when it was to be sent, where that is a matter of time and not of turns."""
        before = before if turn.is_appended else ()
        path, body = self._writing.body(turn, before, self._salt)
        is_counted = path == COMPLETIONS and turn.body is None and self._writing.form == "ids"
        began_s = self._now_s()
        answer = await self._sender.ask(
            path,
            body,
            num_sent_tokens=len(before) + len(turn.tokens) if is_counted else 0,
            max_tokens=turn.max_tokens,
            wants_all=self._writing.ignores_eos and turn.body is None and "ignore_eos" in body,
        )
        answer.outcome.began_s = began_s
        answer.outcome.late_s = 0.0 if wanted_s is None else max(0.0, began_s - wanted_s)
        self._outcomes.append(answer.outcome)
        self._on_done(answer.outcome)
        return answer

    def _now_s(self) -> float:
        return time.perf_counter() - self._begun_s

    async def _sleep_until(self, at_s: float) -> None:
        if (seconds := at_s - self._now_s()) > 0:
            await asyncio.sleep(seconds)


def _answered(answer: Answer, turn: Turn) -> Sequence[int]:
    """Return the tokens of an answer; others, as many, where they are not known."""
    if answer.token_ids:
        return answer.token_ids
    draw = random.Random(f"{turn.max_tokens} {list(turn.tokens[-4:])}")
    return draw.choices(range(FIRST_TOKEN, VOCAB_SIZE), k=turn.max_tokens)
