"""What a bench tells: a document for programs, a table and lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.table import Table

from cluster.bench.figures import Outcome, ratios, summary
from cluster.bench.running import Repeat, Side
from cluster.bench.tables import figure_table, spreads

_LABELS: Final = {
    "requests": "requests",
    "failed": "failed",
    "seconds": "seconds",
    "requests_per_s": "requests/s",
    "prompt_tokens_per_s": "prompt tokens/s",
    "output_tokens_per_s": "output tokens/s",
    "goodput_per_s": "goodput, requests/s",
    "good_share": "requests that meet the targets",
    "hit_share": "prompt tokens cached",
}
_METRICS: Final = {"ttft_ms": "TTFT", "itl_ms": "ITL", "tpot_ms": "TPOT", "e2e_ms": "E2E"}
_SHARES: Final = ("good_share", "hit_share")
_BUSY_CLIENT: Final = 0.8
_LATE_MS: Final = 50.0


def document(sides: Sequence[Side], workload: dict[str, Any], *, is_detailed: bool) -> dict[str, Any]:
    """Return all that was measured. Keys of figures carry their units; shares are of 1."""
    found: dict[str, Any] = {"workload": workload, "servers": [_side_document(side, is_detailed) for side in sides]}
    if len(sides) == 2:
        found["ratios"] = spreads(ratios(*(_figures(side.repeats) for side in sides)))
    return found


def table(sides: Sequence[Side]) -> Table:
    """Return figures as rows: of each server, and of the first over the second."""
    columns = [(side.name, summary(_figures(side.repeats))) for side in sides]
    compared = ratios(*(_figures(side.repeats) for side in sides)) if len(sides) == 2 else {}
    return figure_table(columns, compared, _label, _is_share)


def lines(sides: Sequence[Side]) -> Iterator[str]:
    """Yield what has to be said beside a table: what failed, and what figures are not."""
    for side in sides:
        of_whom = f"{side.name}: " if len(sides) > 1 else ""
        yield from (f"{of_whom}{line}" for line in _of_side(side))


def num_failed(sides: Sequence[Side]) -> int:
    """Return how many requests failed."""
    return sum(round(repeat.figures.values["failed"]) for side in sides for repeat in side.repeats)


def _of_side(side: Side) -> Iterator[str]:
    found = _figures(side.repeats)
    num_requests = round(sum(one.values["requests"] for one in found))
    kinds = dict.fromkeys(kind for one in found for kind in one.faults)
    for kind in kinds:
        count = sum(one.faults.get(kind, 0) for one in found)
        example = next(one.examples[kind] for one in found if kind in one.examples)
        yield f"{count} of {num_requests} requests failed: {kind}{f' ({example})' if example else ''}"
    for remark in dict.fromkeys(remark for one in found for remark in one.remarks):
        yield f"{sum(one.remarks.get(remark, 0) for one in found)} of {num_requests} answers: {remark}"
    if not any("hit_share" in one.values for one in found) and any("requests_per_s" in one.values for one in found):
        yield "cache hits: the server does not tell them (usage.prompt_tokens_details.cached_tokens)"
    busy = max(one.values["client_cpu_share"] for one in found)
    if busy > _BUSY_CLIENT:
        yield f"this client used {busy:.0%} of a core: its own time is in these figures"
    late_ms = max(one.values.get("late_ms_p99", 0.0) for one in found)
    if late_ms > _LATE_MS:
        yield f"requests were sent {late_ms:,.0f} ms (p99) after their time: the workload is less than was asked for"


def _side_document(side: Side, is_detailed: bool) -> dict[str, Any]:
    repeats = [
        {**asdict(repeat.figures), **({"requests": [_request(one) for one in repeat.outcomes]} if is_detailed else {})}
        for repeat in side.repeats
    ]
    return {
        "name": side.name,
        "url": side.url,
        "model": side.writing.model,
        "repeats": repeats,
        "summary": spreads(summary(_figures(side.repeats))),
    }


def _request(outcome: Outcome) -> dict[str, Any]:
    return {**asdict(outcome), "remarks": sorted(outcome.remarks)}


def _figures(repeats: Sequence[Repeat]) -> list[Any]:
    return [repeat.figures for repeat in repeats]


def _label(name: str) -> str | None:
    """Return how people call a figure; None: it is not shown."""
    if name.startswith("from_"):
        return f"  from {name.removeprefix('from_')}"
    metric, _, rank = name.rpartition("_")
    if metric in _METRICS:
        return f"{_METRICS[metric]} {rank}, ms"
    return _LABELS.get(name)


def _is_share(name: str) -> bool:
    return name in _SHARES or name.startswith("from_")
