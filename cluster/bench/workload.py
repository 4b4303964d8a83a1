"""What is asked of a server: sessions of turns, and when. Frozen values; seconds and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    tokens: Sequence[int]  #: of the prompt; empty where there is a body
    max_tokens: int
    pause_s: float = 0.0  #: from the end of the answer before it
    #: the prompt is that of the turn before, its answer, and these tokens; else these tokens alone
    is_appended: bool = False
    path: str | None = None  #: of a request that is posted as it stands
    body: dict[str, Any] | None = None  #: what is posted then


@dataclass(frozen=True, slots=True)
class Session:
    """Turns, each of which is asked after the answer to the one before it; never empty."""

    begin_s: float  #: from the begin of the workload
    turns: tuple[Turn, ...]


def num_requests(sessions: Sequence[Session]) -> int:
    """Return how many requests sessions have in all."""
    return sum(len(session.turns) for session in sessions)


def cut_to(sessions: Sequence[Session], num_prompts: int) -> list[Session]:
    """Return sessions with at most `num_prompts` requests in all: the first turns of each, in turn."""
    wanted = [0] * len(sessions)
    left = num_prompts
    for number in range(max((len(session.turns) for session in sessions), default=0)):
        for place, session in enumerate(sessions):
            if number < len(session.turns) and left > 0:
                wanted[place] += 1
                left -= 1
    return [
        Session(session.begin_s, session.turns[:count])
        for session, count in zip(sessions, wanted, strict=True)
        if count
    ]
