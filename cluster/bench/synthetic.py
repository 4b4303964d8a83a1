"""Drawn workloads: lengths, shared prefixes, turns, arrivals. Seeded: the same numbers give the same one."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal

from cluster.bench.workload import Session, Turn

Arrivals = Literal["poisson", "constant"]

FIRST_TOKEN = 100  #: ids below it are often special ones
VOCAB_SIZE = 1000  #: ids below it any tokenizer has


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWorkload:
    """Sessions of random tokens. Lengths are drawn evenly from their value times 1 - range_ratio to 1 + range_ratio."""

    num_sessions: int
    input_len: int = 1024  #: tokens of a turn, without the prefix
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0  #: tokens at the begin of a session, shared by those of its group
    num_prefixes: int = 1  #: groups
    num_turns: int = 1
    think_s: float = 0.0  #: from an answer to the next turn
    vocab_size: int = VOCAB_SIZE

    def sessions(self, seed: int) -> list[Session]:
        """Draw them; all begin at 0."""
        draw = random.Random(f"random workload {seed}")
        prefixes = [self._tokens(draw, self.prefix_len) for _ in range(self.num_prefixes)]
        return [self._session(draw, prefixes[number % self.num_prefixes]) for number in range(self.num_sessions)]

    def _session(self, draw: random.Random, prefix: list[int]) -> Session:
        turns = []
        for number in range(self.num_turns):
            tokens = self._tokens(draw, self._length(draw, self.input_len))
            output = self._length(draw, self.output_len)
            turns.append(
                Turn(
                    tokens=tokens if number else [*prefix, *tokens],
                    max_tokens=output,
                    pause_s=self.think_s if number else 0.0,
                    is_appended=number > 0,
                )
            )
        return Session(0.0, tuple(turns))

    def _length(self, draw: random.Random, length: int) -> int:
        low, high = length * (1 - self.range_ratio), length * (1 + self.range_ratio)
        return max(1, draw.randint(round(low), round(high)))

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        first = min(FIRST_TOKEN, self.vocab_size // 2)
        return draw.choices(range(first, self.vocab_size), k=count)


def arriving(sessions: list[Session], per_s: float, arrivals: Arrivals, seed: int) -> list[Session]:
    """Let sessions begin at `per_s` a second: at equal distances, or at random (a Poisson process)."""
    draw = random.Random(f"arrivals {seed}")
    gaps = (1 / per_s if arrivals == "constant" else draw.expovariate(per_s) for _ in sessions)
    begins = itertools.accumulate(itertools.chain([0.0], gaps))
    return [Session(begin_s, session.turns) for begin_s, session in zip(begins, sessions, strict=False)]
