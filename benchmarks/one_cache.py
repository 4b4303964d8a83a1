"""One cache of many pools, in simulated time: hits, seconds, and where hits are lost.

    python benchmarks/one_cache.py             agent sessions and conversations on fleets of several shapes
    python benchmarks/one_cache.py --quick     the same memory in one worker, and in two prefill and two decode workers
    python benchmarks/one_cache.py --record    also append to benchmarks/results/one_cache.jsonl

The deciders are the real ones: of router, workers and pools (harness/simulated.py). The same figures come out each
time, on any machine; but they hang on every millisecond, so each row is the mean over several orders of the sessions,
and a rule is only better than another where it is so in most rows. Needs the traces, as benchmarks/tiers_replay.py
does, which measures a few of these shapes where they are served.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from harness.models import model_directory, vocab_size
from harness.report import ROOT, goal, parser, record
from harness.simulated import Machine
from harness.simulated_fleet import Fleet
from harness.trace import Turn, agent_sessions, conversations, endless_hits

TRACES = ROOT.parent / "shared" / "traces"


class Shape(NamedTuple):
    """A fleet, and what is asked of it."""

    sessions: str
    num_at_once: int
    num_prefill: int
    num_decode: int
    num_blocks: int  #: of each pool, 16 tokens each
    num_cores: float = 2.0


ONE = Shape("32 agents", 32, 0, 1, 4096)
FOUR = Shape("32 agents", 32, 2, 2, 1024)
SHAPES = [
    ONE,
    FOUR,
    Shape("32 agents", 32, 1, 1, 2048),
    Shape("32 agents", 32, 1, 1, 1024),
    Shape("32 agents", 32, 0, 4, 1024),
    Shape("32 agents", 32, 4, 4, 512),
    Shape("32 agents", 8, 2, 2, 512),
    Shape("32 others", 32, 2, 2, 1024),
    Shape("8 agents", 8, 1, 1, 1024),
    Shape("64 agents", 64, 2, 6, 1024, 8.0),
    Shape("500 conversations", 16, 2, 2, 1024),
    Shape("500 conversations", 16, 1, 1, 1024),
]


class Figures(NamedTuple):
    """Means over the orders."""

    hit: float
    seconds: float


def measure(shape: Shape, sessions: list[list[Turn]], num_orders: int) -> Figures:
    """Replay the sessions in several orders, and print what the last one lost."""
    runs = []
    for order in range(num_orders):
        shuffled = sessions if order == 0 else random.Random(order).sample(sessions, len(sessions))
        fleet = Fleet(Machine(num_cores=shape.num_cores), shape.num_prefill, shape.num_decode, shape.num_blocks)
        seconds = fleet.replay(shuffled, shape.num_at_once)
        runs.append(Figures(fleet.hit, seconds))
    figures = Figures(mean(run.hit for run in runs), mean(run.seconds for run in runs))
    name = f"{shape.num_prefill} + {shape.num_decode} x {shape.num_blocks}, {shape.num_at_once} at once"
    least, most = min(run.hit for run in runs), max(run.hit for run in runs)
    print(f"  {name:26s} hit {figures.hit:.3f} ({least:.3f}-{most:.3f}) {figures.seconds:6.1f} s")
    print(f"  {'the last one':>26s} {fleet.report()}", flush=True)
    return figures


def main() -> None:
    options = parser(__doc__, "one_cache", quick="two shapes")
    options.add_argument("--traces", type=Path, default=TRACES, help="the directory of the traces")
    args = options.parse_args()
    agents, talks = args.traces / "agent_sessions.jsonl.xz", args.traces / "mooncake_conversation.jsonl"
    if not agents.exists() or not talks.exists():
        print(f"not run: there are no traces in {args.traces}")
        sys.exit(0)
    vocab = vocab_size(model_directory("demo"))
    read = agent_sessions(agents, 72, 25, vocab)
    workloads = {"8 agents": read[:8], "32 agents": read[:32], "32 others": read[40:72], "64 agents": read[:64]}
    workloads["500 conversations"] = conversations(talks, 500, vocab)
    shapes = [ONE, FOUR] if args.quick else SHAPES
    rows: dict[Shape, Figures] = {}
    for workload in dict.fromkeys(shape.sessions for shape in shapes):
        sessions = workloads[workload]
        print(f"{workload}, {sum(map(len, sessions))} requests; an endless cache hits {endless_hits(sessions):.3f}")
        for shape in shapes:
            if shape.sessions == workload:
                rows[shape] = measure(shape, sessions, 3)
    if args.record:
        record("one_cache", [{**shape._asdict(), **figures._asdict()} for shape, figures in rows.items()])
    print()
    print(goal("2 + 2 workers: hits", rows[FOUR].hit, at_least=0.90))
    print(goal("2 + 2 workers: seconds, of one worker's", rows[FOUR].seconds / rows[ONE].seconds, under=1.0))


if __name__ == "__main__":
    main()
