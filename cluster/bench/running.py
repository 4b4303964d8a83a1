"""Repeats of a workload: of one server, or of two in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.bench.bodies import Writing
from cluster.bench.figures import PERCENTILES, Figures, Outcome, Targets, figures
from cluster.bench.playing import Pace, Player
from cluster.bench.sending import Deadlines, Sender
from cluster.bench.workload import Session
from messages.errors import ConfigError

Workloads = Callable[[int], Sequence[Session]]  #: the workload by number of the repeat; -1 is for warming up
Progress = Callable[[str, int, int, int], None]  #: which server, which repeat, requests done, of them failed


@dataclass(frozen=True, slots=True)
class Repeat:
    """What came of a workload, once."""

    figures: Figures
    outcomes: list[Outcome]


@dataclass(slots=True)
class Side:
    """One of the servers that are measured."""

    name: str
    url: str
    api_key: str | None
    writing: Writing
    repeats: list[Repeat] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How often, and by what it is judged."""

    pace: Pace
    deadlines: Deadlines
    targets: Targets
    repeats: int = 1
    num_warmups: int = 1
    percentiles: tuple[float, ...] = PERCENTILES
    salt: str = ""  #: what keeps this run's prompts from those of others, at servers that take salts


async def found_model(url: str, api_key: str | None, wanted: str | None, deadlines: Deadlines) -> tuple[str, str]:
    """Return the model that is asked, and who serves it: the one that is `wanted`, else the first there.

    Raises:
        ConfigError: nobody answers there, or has no such model.
    """
    async with Sender(url, api_key, deadlines) as sender:
        models = await sender.models()
    chosen = next((model for model in models if wanted in (None, model.name)), None)
    if chosen is None:
        there = ", ".join(model.name for model in models) or "none"
        raise ConfigError(f"{url} has no model {wanted or ''}: it has {there} (--model)".replace("  ", " "))
    return chosen.name, chosen.owner


async def run(sides: Sequence[Side], workloads: Workloads, plan: Plan, on_progress: Progress) -> None:
    """Fill the sides' repeats. Of two sides now the one, now the other comes first."""
    for side in sides:
        if plan.num_warmups:
            await _warm_up(side, workloads, plan)
    for number in range(plan.repeats):
        sessions = workloads(number)
        for side in sides if number % 2 == 0 else reversed(sides):
            side.repeats.append(await _repeat(side, number, sessions, plan, on_progress))


async def _warm_up(side: Side, workloads: Workloads, plan: Plan) -> None:
    turns = [session.turns[0] for session in workloads(-1)][: plan.num_warmups]
    async with Sender(side.url, side.api_key, plan.deadlines) as sender:
        player = Player(sender, side.writing, plan.pace, f"{plan.salt} warm", lambda _: None)
        await player.play([Session(0.0, (turn,)) for turn in turns])


async def _repeat(side: Side, number: int, sessions: Sequence[Session], plan: Plan, on_progress: Progress) -> Repeat:
    num_done = num_failed = 0

    def on_done(outcome: Outcome) -> None:
        nonlocal num_done, num_failed
        num_done += 1
        num_failed += outcome.fault is not None
        on_progress(side.name, number, num_done, num_failed)

    on_progress(side.name, number, 0, 0)
    async with Sender(side.url, side.api_key, plan.deadlines) as sender:
        player = Player(sender, side.writing, plan.pace, f"{plan.salt} {number}", on_done)
        began_s = time.process_time()
        outcomes, seconds = await player.play(sessions)
        cpu_s = time.process_time() - began_s
    found = figures(outcomes, seconds, plan.targets, plan.percentiles)
    found.values["client_cpu_share"] = cpu_s / seconds if seconds > 0 else 0.0
    return Repeat(found, outcomes)
