"""Repeats of a workload: of our engine, or of ours and a peer's in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from cluster.bench.bare.batch import Batch, Part, Tokens, Workload
from messages.errors import WorkerError

_WARM_UP_TOKENS: Final = 8

Progress = Callable[[str, int, Part], None]  #: who is next, in which repeat (-1: warming up), and with what


class Contender(Protocol):
    """Who generates: `KvrayEngine`, `TransformersEngine`."""

    name: str

    def generate(self, prompts: Tokens, num_tokens: int) -> Batch:
        """Generate so many tokens, greedily, for each of the prompts, all there at once.

        Raises:
            WorkerError: it cannot.
        """
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


@dataclass(frozen=True, slots=True)
class Repeat:
    """What one contender did of one repeat."""

    prefill: Batch  #: each prompt gave one token
    whole: Batch


@dataclass(slots=True)
class Side:
    """A contender and what it did."""

    contender: Contender
    repeats: list[Repeat] = field(default_factory=list)
    failure: str = ""  #: why there is no more


def run(sides: Sequence[Side], workload: Workload, repeats: int, on_progress: Progress) -> None:
    """Fill the sides' repeats: each is asked the same; now the one, now the other comes first.

    A contender that fails is told of in its side, and asked no more.
    """
    for number in range(-1, repeats):
        for side in sides if number % 2 == 0 else reversed(sides):
            if side.failure:
                continue
            try:
                if number < 0:
                    on_progress(side.contender.name, number, "whole")
                    num_tokens = min(_WARM_UP_TOKENS, workload.output_len)
                    side.contender.generate(workload.prompts(number, "whole"), num_tokens)
                else:
                    side.repeats.append(_repeat(side.contender, workload, number, on_progress))
            except WorkerError as error:
                side.failure = error.message


def _repeat(contender: Contender, workload: Workload, number: int, on_progress: Progress) -> Repeat:
    def generate(part: Part, num_tokens: int) -> Batch:
        on_progress(contender.name, number, part)
        return contender.generate(workload.prompts(number, part), num_tokens)

    return Repeat(generate("prefill", 1), generate("whole", workload.output_len))
