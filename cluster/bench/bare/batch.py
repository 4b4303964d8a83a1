"""A batch of prompts that are all there at once, and what came of it. Pure; times are of one clock, in seconds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Tokens: TypeAlias = list[list[int]]

#: Which of a repeat's two batches: prompts alone, each giving one token; or all of it.
Part: TypeAlias = Literal["prefill", "whole"]

_SEEDS: Final = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of each contender."""

    batch_size: int  #: sequences, all there at once
    input_len: int  #: tokens of each prompt
    output_len: int  #: tokens that each sequence generates
    vocab_size: int  #: token ids are drawn below it
    seed: int = 0

    def prompts(self, repeat: int, part: Part) -> Tokens:
        """Draw the prompts of one batch: no other batch has the same, so that no cache helps. -1: for warming up."""
        draw = random.Random((self.seed * _SEEDS + repeat + 1) * 2 + (part == "whole"))
        return [draw.choices(range(self.vocab_size), k=self.input_len) for _ in range(self.batch_size)]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step of an engine that tells."""

    ended_s: float
    host_s: float  #: of the step's time: what the host did, beside waiting for the device
    idle_s: float  #: of the device, between the step before and this one; 0 for the first


@dataclass(slots=True)
class Batch:
    """A batch that was generated."""

    begun_s: float  #: all prompts were there
    token_times_s: list[list[float]] = field(default_factory=list)  #: of each sequence, when each token came
    outputs: Tokens = field(default_factory=list)  #: token ids
    steps: list[StepTimes] = field(default_factory=list)  #: none where the engine does not tell

    @property
    def seconds(self) -> float:
        """From the first prompt to the last token."""
        return max(times[-1] for times in self.token_times_s) - self.begun_s

    @property
    def ttft_s(self) -> list[float]:
        """Of each sequence: the time to its first token."""
        return [times[0] - self.begun_s for times in self.token_times_s]

    @property
    def gaps_s(self) -> list[float]:
        """All gaps between two tokens of a sequence."""
        return [later - sooner for times in self.token_times_s for sooner, later in itertools.pairwise(times)]

    @property
    def decode(self) -> DecodeWindow | None:
        """The time in which every sequence decoded and none prefilled; None: there was none."""
        begin_s = max(times[0] for times in self.token_times_s)
        end_s = min(times[-1] for times in self.token_times_s)
        window = DecodeWindow(begin_s, end_s, [_within(times, begin_s, end_s) for times in self.token_times_s])
        return window if window.num_steps else None


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """From when the last sequence had its first token until the first had its last: steps that only decode.

    begin   |last first token                        first last token|   end
              tokens after it .............. of each sequence, a range
    """

    begin_s: float
    end_s: float
    indexes: list[range]  #: of each sequence's tokens that came after the begin, until the end

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.begin_s

    @property
    def num_tokens(self) -> int:
        """Tokens that came in it."""
        return sum(map(len, self.indexes))

    @property
    def num_steps(self) -> int:
        """Steps in it: each gives a sequence one token."""
        return max(map(len, self.indexes))

    def positions(self, input_len: int) -> Iterator[int]:
        """Yield for each token the place, in its sequence, of the token that was computed for it."""
        for indexes in self.indexes:
            yield from (input_len + index - 1 for index in indexes)


def _within(times: list[float], begin_s: float, end_s: float) -> range:
    """Return the indexes of the tokens that came after `begin_s`, until `end_s`."""
    first = sum(time <= begin_s for time in times)
    return range(first, max(first, sum(time <= end_s for time in times)))
