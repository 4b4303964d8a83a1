"""What the placement page costs: of the servers that answer it, and when nobody looks at it.

    python benchmarks/placement_page.py             200 simulated workers, 2 million names
    python benchmarks/placement_page.py --quick     the same, fewer updates, within 60 s
    python benchmarks/placement_page.py --record    also append to benchmarks/results/placement_page.jsonl

One update: an ingress asks 200 workers and the router, in a process of their own, and writes the page's JSON; each
time anew, as what workers told is good for a second. Clock, processor time of the ingress, and for how long the
router's loop is held. When nobody looks the router sets its gauges every 5 s, and counts a prefix with each request.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

import msgspec
from harness.paged_fleet import SECRET, paged_fleet, router_figures
from harness.report import goal, parser, record

from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.openai.callers import NOBODY, Callers
from cluster.openai.metrics import HttpMetrics
from cluster.placement_page.endpoints import PlacementPage
from kvrouter.gauges import PERIOD_S
from transport.channel import ChannelConfig

NUM_WORKERS = 200
NUM_NAMES = 2_000_000
MAX_UPDATE_MS = 200.0
MAX_IDLE_PERCENT = 1.0
_STATS_AGE_S = 1.05


async def figures(num_updates: int) -> dict[str, Any]:
    """Measure updates of the page."""
    with paged_fleet(NUM_WORKERS, NUM_NAMES) as (infos, address, connection):
        metrics = HttpMetrics("ingress-1")
        options = DispatchOptions(
            ingress_id="ingress-1", secret=SECRET, channel=ChannelConfig(), request_timeout_s=60.0, max_ttft_s=20.0
        )
        dispatcher = Dispatcher(options, metrics.values)
        for role in ("decode", "prefill"):
            dispatcher.set_workers(role, [info for info in infos if info.role == role])
        dispatcher.set_routers([address])
        surface: Any = SimpleNamespace(
            tokenizer=None, metrics=metrics, model=SimpleNamespace(name="model"), callers=Callers()
        )
        page = PlacementPage(dispatcher, surface, 0)
        while not (document := await page.document(NOBODY)).has_router:  # noqa: ASYNC110 - it connects
            await asyncio.sleep(0.1)
        clock_ms, cpu_ms, num_bytes = [], [], 0
        for _ in range(num_updates):
            await asyncio.sleep(_STATS_AGE_S)
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            document = await page.document(NOBODY)
            num_bytes = len(msgspec.json.encode(document))
            clock_ms.append(1e3 * (time.perf_counter() - begin_s))
            cpu_ms.append(1e3 * (time.process_time() - begin_cpu_s))
            assert all(owner.is_answering for owner in document.owners), "every worker is on the page"
            assert len(document.prefixes) == 20
        dispatcher.close()
        return {"clock_ms": clock_ms, "cpu_ms": cpu_ms, "bytes": num_bytes, **router_figures(connection)}


def main() -> None:
    options = parser(__doc__, "placement_page", quick="five updates").parse_args()
    found = asyncio.run(figures(5 if options.quick else 20))
    clock_ms = median(found["clock_ms"])
    print(f"{NUM_WORKERS} workers, {found['names']:,.0f} names: an update of {found['bytes'] / 1024:.0f} KiB")
    print(f"  clock {clock_ms:.0f} ms (largest {max(found['clock_ms']):.0f}), ingress {median(found['cpu_ms']):.0f} ms")
    print(f"  router held for {found['view_ms']:.1f} ms; a prefix counted in {found['count_us']:.1f} us")
    idle_percent = 100 * found["gauges_ms"] / 1e3 / PERIOD_S
    print(f"  nobody looks: gauges {found['gauges_ms']:.1f} ms every {PERIOD_S:g} s, {idle_percent:.2f} % of a core")
    if options.record:
        record("placement_page", {**found, "idle_percent": idle_percent})
    print(goal("update of the page, 200 workers, 2 M names", clock_ms, under=MAX_UPDATE_MS, unit=" ms"))
    print(goal("router's processor time when nobody looks", idle_percent, under=MAX_IDLE_PERCENT, unit=" %"))


if __name__ == "__main__":
    main()
