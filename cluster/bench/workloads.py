"""The workload of each repeat, from what somebody wants."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from cluster.bench.agents import agent_trace
from cluster.bench.from_trace import Scale, sessions_of
from cluster.bench.synthetic import Arrivals, RandomWorkload, arriving
from cluster.bench.workload import Session, cut_to
from cluster.traces import Trace, read_trace
from messages.errors import ConfigError

_AGENT_TURNS: Final = 25
#: Seeds of repeats, of one seed given.
_SEEDS: Final = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A workload as it is asked for."""

    dataset: Literal["random", "agents"] | Path
    num_prompts: int
    random: RandomWorkload  #: but for how many sessions and turns there are
    scale: Scale
    num_sessions: int | None = None
    turns: int | None = None
    request_rate: float = math.inf  #: of sessions, a second
    arrivals: Arrivals = "poisson"
    seed: int = 0


def workloads(wanted: Wanted) -> Callable[[int], Sequence[Session]]:
    """Return what gives the sessions of a repeat, by its number; asked again for the same one, at once.

    Raises:
        ConfigError: the trace cannot be read, or is of a kind that does not go with what is wanted.
    """
    return functools.lru_cache(maxsize=1)(_made(wanted))


def _made(wanted: Wanted) -> Callable[[int], Sequence[Session]]:
    if isinstance(wanted.dataset, Path):
        trace = read_trace(wanted.dataset, wanted.num_sessions or wanted.num_prompts)
        return lambda number: _arranged(_traced(trace, wanted, number), wanted, number)
    if wanted.dataset == "agents":
        turns = wanted.turns or _AGENT_TURNS
        trace = agent_trace(wanted.num_sessions or _ceil(wanted.num_prompts, turns), turns, wanted.seed)
        return lambda number: _arranged(_traced(trace, wanted, number), wanted, number)
    if wanted.scale.block_tokens is not None:
        raise ConfigError("--block-tokens: wanted with --dataset-path or --dataset-name agents, saw neither")
    turns = wanted.turns or 1
    num_sessions = wanted.num_sessions or _ceil(wanted.num_prompts, turns)
    drawn = replace(wanted.random, num_sessions=num_sessions, num_turns=turns)
    return lambda number: _arranged(drawn.sessions(_seed(wanted, number)), wanted, number)


def _traced(trace: Trace, wanted: Wanted, number: int) -> list[Session]:
    return sessions_of(trace, wanted.scale, _seed(wanted, number))


def _arranged(sessions: list[Session], wanted: Wanted, number: int) -> list[Session]:
    if not math.isinf(wanted.request_rate):
        sessions = arriving(sessions, wanted.request_rate, wanted.arrivals, _seed(wanted, number))
    return cut_to(sessions, wanted.num_prompts)


def _seed(wanted: Wanted, number: int) -> int:
    return wanted.seed * _SEEDS + number


def _ceil(count: int, per: int) -> int:
    return -(-count // per)
