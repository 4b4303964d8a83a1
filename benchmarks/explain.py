"""What it costs the router to keep what explains its decisions, beside the same router without.

    python benchmarks/explain.py            both routers in turns, in one process
    python benchmarks/explain.py --quick    a tenth of the repeats
    python benchmarks/explain.py --record   also append to benchmarks/results/explain.jsonl

The fleets, prompts and loads of benchmarks/router.py. Each request has an id of its own, and so what 1,000 of them were
placed by is kept; what became of the blocks in events, which store 64 and drop 64, is remembered. Processor time, both
in turns: medians of decisions, means of events, one in 64 of which writes down what the others noted.
Goals: a decision over 64 + 64 workers takes at most 5 % more, an event at most 10 us; explaining when somebody asks
takes under 5 ms at 1,000 + 1,000 workers.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from statistics import fmean, median

import router as plain
from harness.report import goal, hardware, parser, record

from kvrouter.router import Router, RouterConfig
from messages.explain import ExplainPlacement
from messages.fleet import KvEvents
from messages.route import RequestEnded, RouteRequest

NUM_KEPT = 1000
MAX_SHARE = 1.05
MAX_ADDED_US = 10.0
MAX_EXPLAINING_MS = 5.0
OBSERVED = RouterConfig(explained_requests=NUM_KEPT, is_observed=True)


def fleet_of(config: RouterConfig, num_each: int, stores: list[tuple[str, bytes]]) -> tuple[Router, dict[str, int]]:
    """Make a router whose workers hold what they are to; return it with the number of each one's last event."""
    router, rng = Router(config), random.Random(plain.SEED)
    for number in range(num_each):
        plain.join(router, f"w{number}", "decode", rng, num_each)
        plain.join(router, f"p{number}", "prefill", rng, num_each)
    seqs = dict.fromkeys((worker for worker, _ in stores), 0)
    for worker, names in stores:
        seqs[worker] += 1
        router.on_event(KvEvents(worker_id=worker, seq=seqs[worker], stored=names), 0.0)
    return router, seqs


def in_turns(
    calls: list[Callable[[], object]], repeats: int, typical: Callable[[list[float]], float] = median
) -> list[float]:
    """Measure the typical seconds of each of `calls`, called in turns, in another order each time."""
    taken: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(repeats):
        random.shuffle(order)
        for number in order:
            started = time.thread_time()
            calls[number]()
            taken[number].append(time.thread_time() - started)
    return [typical(times) for times in taken]


def measure(num_each: int, num_blocks: int, repeats: int) -> dict[str, float]:
    """Measure decisions, events and explanations, with and without."""
    prompt, stores = plain.chains(num_blocks)
    routers = [fleet_of(config, num_each, stores) for config in (RouterConfig(), OBSERVED)]
    rng, ids = random.Random(plain.SEED), itertools.count()
    figures: dict[str, float] = {}
    size = plain.NAME_BYTES * plain.DECISION_BLOCKS
    for what, names in {"held": prompt[:size], "new": rng.randbytes(size)}.items():

        def decide(router: Router, names: bytes = names) -> None:
            request_id = f"r{next(ids)}"
            router.on_event(
                RouteRequest(
                    request_id=request_id,
                    names=names,
                    num_prompt_tokens=len(names) // plain.NAME_BYTES * plain.BLOCK_SIZE + 1,
                    max_tokens=100,
                ),
                0.0,
            )
            router.on_event(RequestEnded(request_id=request_id), 1.0)

        calls = [lambda router=router: decide(router) for router, _ in routers]
        without_s, with_s = in_turns(calls, repeats)
        figures |= {f"{num_each}_{what}_plain_us": 1e6 * without_s, f"{num_each}_{what}_us": 1e6 * with_s}

    names_of_events = itertools.cycle([rng.randbytes(plain.NAME_BYTES * plain.EVENT_BLOCKS) for _ in range(4001)])

    def fold(router: Router, seqs: dict[str, int]) -> None:
        seqs["w0"] += 1
        stored, removed = next(names_of_events), next(names_of_events)
        router.on_event(KvEvents(worker_id="w0", seq=seqs["w0"], stored=stored, removed=removed), 1.0)

    without_s, with_s = in_turns([lambda one=one: fold(*one) for one in routers], 3 * repeats, fmean)
    figures |= {f"{num_each}_event_plain_us": 1e6 * without_s, f"{num_each}_event_us": 1e6 * with_s}
    router, _ = routers[1]
    asked = ExplainPlacement(query_id="q", request_id=f"r{next(ids)}")
    router.on_event(RouteRequest(request_id=asked.request_id, names=b"", num_prompt_tokens=999, max_tokens=9), 1.0)
    assert len(router.explained(asked).placements) > 1
    (explaining_s,) = in_turns([lambda: router.explained(asked)], max(10, repeats // 10))
    return figures | {f"{num_each}_explaining_us": 1e6 * explaining_s}


def main() -> None:
    options = parser(__doc__, "explain", quick="a tenth of the repeats")
    args = options.parse_args()
    repeats = 300 if args.quick else 3000
    figures = measure(64, 100_000, repeats) | measure(1000, 100_000, repeats // 5)
    print(f"{hardware()}")
    for name, figure in figures.items():
        print(f"{name:28}{figure:14,.2f}")
    if args.record:
        record("explain", figures)
    for what in ("held", "new"):
        share = figures[f"64_{what}_us"] / figures[f"64_{what}_plain_us"]
        print(goal(f"a decision over one without, prompt {what}", share, under=MAX_SHARE, unit="x"))
    added_us = max(figures[f"{num}_event_us"] - figures[f"{num}_event_plain_us"] for num in (64, 1000))
    print(goal("what an event takes more", added_us, under=MAX_ADDED_US, unit=" us"))
    print(goal("explaining", figures["1000_explaining_us"] / 1e3, under=MAX_EXPLAINING_MS, unit=" ms"))


if __name__ == "__main__":
    main()
