"""What cache-aware routing, disaggregation and tiers bring, each with and without: agent sessions, the demo model.

    make ab                                     eight configurations, three rounds; writes docs/ab.*, README.md
    python benchmarks/ab.py --quick             two of them, once; writes nothing
    python benchmarks/ab.py --trace FILE        recorded sessions instead of drawn ones; writes nothing
    python benchmarks/ab.py --record            also append to benchmarks/results/ab.jsonl

Sessions are drawn with the quantiles of recorded ones (cluster/bench/agents.py); one token stands for 64 of theirs.
All are asked at once, each turn when the one before it was answered. Every configuration has two workers with the same
pools and is started anew for each round; rounds have other prompts of the same lengths, and go through the
configurations in turn, forwards and backwards. Sizes are bytes of KV in bfloat16: 1 KiB a token.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from harness.models import model_directory
from harness.report import ROOT, commit, goal, hardware, parser, record
from harness.serving import serving

from cluster.bench.bodies import Writing
from cluster.bench.figures import Figures, Spread, Targets
from cluster.bench.from_trace import Scale
from cluster.bench.playing import Pace
from cluster.bench.plots import check_can_plot, drawing, save
from cluster.bench.running import Plan, Side, Workloads, run
from cluster.bench.sending import Deadlines
from cluster.bench.synthetic import RandomWorkload
from cluster.bench.workload import num_requests
from cluster.bench.workloads import Wanted, workloads

DOCS, README = ROOT / "docs", ROOT / "README.md"
MARKS = ("<!-- ab: written by make ab -->", "<!-- /ab -->")
ROUNDS = 3
NUM_SESSIONS, NUM_TURNS = 20, 12
MAX_PROMPT, MAX_OUTPUT = 4000, 32
POOL, HOST, DISK = "12MiB", "48MiB", "256MiB"
TARGETS = Targets(ttft_s=0.5, itl_s=0.02)
#: Name in figures, title, how it is shown, whether more of it is better.
COLUMNS = (
    ("hit_share", "hits", "{:.3f}", True),
    ("ttft_ms_p50", "TTFT p50, ms", "{:.0f}", False),
    ("ttft_ms_p99", "TTFT p99, ms", "{:.0f}", False),
    ("itl_ms_p99", "ITL p99, ms", "{:.1f}", False),
    ("good_share", "good", "{:.2f}", True),
    ("seconds", "seconds", "{:.1f}", False),
)


class Configuration(NamedTuple):
    """Which of the three there are."""

    routes_by_cache: bool
    is_disaggregated: bool
    has_tiers: bool

    @property
    def cells(self) -> tuple[str, str, str]:
        """Say it in a table's first cells."""
        return (
            "by cache" if self.routes_by_cache else "by load",
            "1 prefill, 1 decode" if self.is_disaggregated else "2 decode",
            "host, disk" if self.has_tiers else "none",
        )

    def flags(self, folder: Path) -> list[str]:
        """Return what `kvray serve` is started with; `folder` is for its files."""
        settings = folder / "kvray.yaml"
        settings.write_text(f"pools: {{routing: {'cache' if self.routes_by_cache else 'load'}}}\n")
        pools = ("1", "1") if self.is_disaggregated else ("0", "2")
        flags = ["--config", str(settings), "--prefill", pools[0], "--decode", pools[1], "--kv-cache-memory", POOL]
        flags += ["--max-model-len", str(MAX_PROMPT + MAX_OUTPUT)]
        if self.has_tiers:
            flags += ["--host-memory", HOST, "--disk-dir", str(folder / "disk"), "--disk-capacity", DISK]
        return [*flags, "--served-model-name", "bench", "--dtype", "bfloat16", "--no-access-log"]


CONFIGURATIONS = [Configuration(*chosen) for chosen in itertools.product((False, True), repeat=3)]
FACTORS = ("routing by cache", "disaggregation", "tiers")


@dataclass(slots=True)
class Effect:
    """What one of the three does: figures with it over figures without, everything else alike."""

    name: str
    ratios: dict[str, Spread]


def measure(configuration: Configuration, workload: Workloads, number: int) -> Figures:
    """Serve, and ask everything once, the machine for itself."""
    folder = Path(tempfile.mkdtemp(prefix="kvray-ab-"))
    began_s = time.monotonic()
    try:
        with serving(str(model_directory("demo")), *configuration.flags(folder)) as served:
            writing = Writing(model="bench", has_token_ids=True, has_sources=True)
            side = Side("kvray", served.url, None, writing)
            plan = Plan(
                pace=Pace(limit_s=120.0),
                deadlines=Deadlines(request_s=90.0, silence_s=60.0),
                targets=TARGETS,
                num_warmups=2,
                salt=f"{number}",
            )
            asyncio.run(run([side], lambda repeat: workload(repeat if repeat < 0 else number), plan, lambda *_: None))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    [repeat] = side.repeats
    found = repeat.figures
    if found.faults:
        raise SystemExit(f"{configuration.cells}: {found.faults}, {found.examples}")
    shown = "  ".join(f"{title} {form.format(found.values[name])}" for name, title, form, _ in COLUMNS)
    print(
        f"  {', '.join(configuration.cells):42s} {shown}  (with start {time.monotonic() - began_s:.0f} s)", flush=True
    )
    return found


def effects(rounds: dict[Configuration, list[Figures]]) -> list[Effect]:
    """Return what each of the three does, over all pairs of configurations that differ in it alone, round by round."""
    found = []
    for place, name in enumerate(FACTORS):
        pairs = [
            (with_it.values, without.values)
            for configuration in CONFIGURATIONS
            if configuration[place]
            for with_it, without in zip(
                rounds[configuration],
                rounds[Configuration(*(chosen and i != place for i, chosen in enumerate(configuration)))],
                strict=True,
            )
        ]
        ratios = {column: _ratio(pairs, column) for column, *_ in COLUMNS}
        found.append(Effect(name, ratios))
    return found


def _ratio(pairs: list[tuple[dict[str, float], dict[str, float]]], column: str) -> Spread | None:
    """Return how a figure changes; a pair of which the second has none of it tells nothing. None: no pair tells."""
    ratios = [one[column] / other[column] for one, other in pairs if other[column] > 0]
    return Spread.of(ratios) if ratios else None


def table(rounds: dict[Configuration, list[Figures]]) -> str:
    """Write the figures in Markdown: a row for each configuration, median, lowest and highest."""
    head = ["routing", "workers", "tiers", *(title for _, title, *_ in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", f"|---|---|---|{'---:|' * len(COLUMNS)}"]
    for configuration, repeats in rounds.items():
        cells = [_cell(Spread.of(one.values[name] for one in repeats), form) for name, _, form, _ in COLUMNS]
        lines.append(f"| {' | '.join([*configuration.cells, *cells])} |")
    return "\n".join(lines)


def effect_table(found: list[Effect]) -> str:
    """Write what each of the three does, in Markdown."""
    lines = [
        f"| with, over without | {' | '.join(title for _, title, *_ in COLUMNS)} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    lines += [
        f"| {effect.name} | {' | '.join(_cell(effect.ratios[name], '{:.2f}') for name, *_ in COLUMNS)} |"
        for effect in found
    ]
    return "\n".join(lines)


def _cell(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "-"
    middle, low, high = (form.format(value) for value in (spread.median, spread.low, spread.high))
    return middle if low == high else f"{middle} ({low}-{high})"


def draw(rounds: dict[Configuration, list[Figures]], path: Path) -> None:
    """Draw the figures: a bar for each configuration, a mark for each round."""
    made, axes = drawing(1, len(COLUMNS), (14.0, 3.8))
    labels = [", ".join(one.cells[:2]) + ("" if one.has_tiers else ", no") + " tiers" for one in rounds]
    colours = ["#0868ac" if all(configuration) else "#a8c8e0" for configuration in rounds]
    for axis, (name, title, _, is_more_better) in zip(axes, COLUMNS, strict=True):
        values = [[one.values[name] for one in repeats] for repeats in rounds.values()]
        places = range(len(values), 0, -1)
        axis.barh(places, [median(of_one) for of_one in values], color=colours)
        for place, of_one in zip(places, values, strict=True):
            axis.plot(of_one, [place] * len(of_one), "k|", markersize=7)
        axis.set_title(f"{title}\n({'more' if is_more_better else 'less'} is better)", fontsize=9)
        axis.set_yticks(places, labels if axis is axes[0] else [""] * len(labels), fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(visible=True, axis="x", alpha=0.3)
    save(made, path)


def page(rounds: dict[Configuration, list[Figures]], found: list[Effect], facts: str, seconds: float) -> str:
    """Write docs/ab.md."""
    num_rounds = len(rounds[CONFIGURATIONS[0]])
    ttft_ms, itl_ms = 1e3 * (TARGETS.ttft_s or 0), 1e3 * (TARGETS.itl_s or 0)
    return f"""# With and without: routing by cache, disaggregation, tiers

Written by `make ab`, which took {seconds / 60:.0f} minutes: {facts}.

{NUM_SESSIONS} sessions of a coding agent at once, {NUM_TURNS} turns each, drawn with the quantiles of recorded ones
(`cluster/bench/agents.py`); one token stands for 64 of theirs, prompts have at most {MAX_PROMPT:,} tokens, answers
{MAX_OUTPUT}. Two workers of the demo model with {POOL} of KV each, started anew for each of {num_rounds} rounds;
tiers are {HOST} of host memory and {DISK} of disk. Routing by load is `pools.routing: load`: each worker has a
prefix cache of its own, and nobody knows what the others hold. Medians, in brackets the lowest and the highest. Good:
answered with the first token within {ttft_ms:.0f} ms and a mean gap within {itl_ms:.0f} ms.

{table(rounds)}

What each of the three does, over all pairs of configurations that differ in it alone, figures with it over figures
without:

{effect_table(found)}

![The same figures as bars](ab.svg)
"""


def write(rounds: dict[Configuration, list[Figures]], found: list[Effect], seconds: float) -> None:
    """Write the page, the plot, and the table that README.md shows between its marks."""
    facts = f"{hardware()}, {datetime.datetime.now(datetime.UTC).date()}, commit {commit()}"
    (DOCS / "ab.md").write_text(page(rounds, found, facts, seconds))
    draw(rounds, DOCS / "ab.svg")
    begin, end = MARKS
    shown = f"{begin}\n{facts}:\n\n{table(rounds)}\n\n![The same figures as bars](docs/ab.svg)\n{end}"
    text, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: shown, README.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"README.md: wanted {begin} ... {end} once, saw it {count} times")
    README.write_text(text)


def main() -> None:
    options = parser(__doc__, "ab", quick="nothing and everything, once")
    options.add_argument("--trace", type=Path, help="recorded sessions of agents, for those that are drawn")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often all of it is done (default {ROUNDS})")
    args = options.parse_args()
    writes = not args.quick and args.trace is None
    if writes:
        check_can_plot(DOCS / "ab.svg")
    began_s = time.monotonic()
    num_sessions, num_turns = (8, 4) if args.quick else (NUM_SESSIONS, NUM_TURNS)
    workload = workloads(
        Wanted(
            dataset=args.trace or "agents",
            num_prompts=num_sessions * num_turns,
            num_sessions=num_sessions,
            turns=num_turns,
            random=RandomWorkload(num_sessions=1),
            scale=Scale(
                block_tokens=1,
                max_prompt_tokens=MAX_PROMPT,
                max_output_tokens=MAX_OUTPUT,
                max_turns=num_turns,
                speed=float("inf"),
            ),
        )
    )
    configurations = [CONFIGURATIONS[0], CONFIGURATIONS[-1]] if args.quick else CONFIGURATIONS
    rounds: dict[Configuration, list[Figures]] = {configuration: [] for configuration in configurations}
    print(f"{hardware()}\n{num_sessions} sessions at once, {num_requests(workload(0))} requests")
    for number in range(1 if args.quick else max(1, args.rounds)):
        print(f"round {number + 1}")
        for configuration in configurations if number % 2 == 0 else reversed(configurations):
            rounds[configuration].append(measure(configuration, workload, number))
    seconds = time.monotonic() - began_s
    if not args.quick:
        found = effects(rounds)
        print(f"\n{table(rounds)}\n\n{effect_table(found)}")
        if writes:
            write(rounds, found, seconds)
    if args.record:
        record(
            "ab", [{"cells": key.cells, "rounds": [asdict(one) for one in of_one]} for key, of_one in rounds.items()]
        )
    nothing, everything = (
        {name: median(one.values[name] for one in rounds[key]) for name, *_ in COLUMNS}
        for key in (configurations[0], configurations[-1])
    )
    print(f"\n{seconds:.0f} s")
    print(goal("all three: hits, of those with none", everything["hit_share"] / nothing["hit_share"], at_least=1.0))
    print(goal("all three: TTFT p50, of that with none", everything["ttft_ms_p50"] / nothing["ttft_ms_p50"], under=1.0))
    print(goal("all three: seconds, of those with none", everything["seconds"] / nothing["seconds"], under=1.0))
    if not args.quick:
        print(goal("minutes", seconds / 60, under=15.0))


if __name__ == "__main__":
    sys.exit(main())
