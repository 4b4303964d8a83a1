"""What a bench of the engine alone tells: a document for programs, a table and lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.table import Table

from cluster.bench.bare.batch import Workload
from cluster.bench.bare.figures import bound_s, figures, num_same
from cluster.bench.bare.machine import Machine
from cluster.bench.bare.running import Side
from cluster.bench.bare.work import ModelWork
from cluster.bench.figures import Figures, ratios, summary
from cluster.bench.tables import figure_table, spreads

_LABELS: Final = {
    "seconds": "seconds",
    "output_tokens_per_s": "output tokens/s",
    "of_bound": "  of the bound",
    "prefill_tokens_per_s": "prefill, prompt tokens/s",
    "prefill_of_rate": "  of the matrix rate",
    "decode_tokens_per_s": "decode, tokens/s",
    "decode_of_bandwidth": "  of the copy bandwidth",
    "decode_of_rate": "  of the matrix rate",
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p90": "TTFT p90, ms",
    "itl_ms_p50": "ITL p50, ms",
    "itl_ms_p90": "ITL p90, ms",
    "host_ms": "host's time of a decode step, ms",
    "idle_ms": "  not hidden, ms",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that was measured. What a contender did that failed on the way is left out."""

    model: dict[str, Any]  #: facts of it, for programs
    described: str  #: in words
    workload: Workload
    work: ModelWork
    machine: Machine
    sides: Sequence[Side]

    def document(self) -> dict[str, Any]:
        """Return all of it. Keys of figures carry their units; shares are of 1."""
        columns = self._columns()
        bound = bound_s(self.workload, self.work, self.machine)
        num_tokens = self.workload.batch_size * self.workload.output_len
        found: dict[str, Any] = {
            "model": self.model,
            "machine": asdict(self.machine),
            "workload": asdict(self.workload),
            "bound": {"seconds": bound, "output_tokens_per_s": num_tokens / bound},
            "engines": [
                {"name": name, "repeats": [one.values for one in repeats], "summary": spreads(summary(repeats))}
                for name, repeats in columns
            ],
        }
        if len(columns) == 2:
            found["ratios"] = spreads(ratios(*(repeats for _, repeats in columns)))
            same, total = self._same()
            found["same_tokens"] = {"sequences": same, "of": total}
        failures = {side.contender.name: side.failure for side in self.sides if side.failure}
        return found | ({"failures": failures} if failures else {})

    def table(self) -> Table:
        """Return figures as rows: of each contender, and of the first over the second."""
        columns = self._columns()
        compared = ratios(*(repeats for _, repeats in columns)) if len(columns) == 2 else {}
        shown = [(name, summary(repeats)) for name, repeats in columns]
        return figure_table(shown, compared, _LABELS.get, lambda name: "_of_" in name or name == "of_bound")

    def lines(self) -> Iterator[str]:
        """Yield what has to be said beside the table."""
        machine, workload = self.machine, self.workload
        threads = "" if machine.num_threads is None else f", {machine.num_threads} threads"
        yield self.described
        yield (
            f"{machine.name}{threads}: copies at {machine.copy_bytes_per_s / 1e9:,.1f} GB/s read and written, "
            f"products at {machine.flops_per_s / 1e9:,.0f} GFLOP/s"
        )
        yield f"{workload.batch_size} sequences, {workload.input_len} tokens in, {workload.output_len} out"
        for side in self.sides:
            if side.failure:
                yield f"{side.contender.name}: {side.failure}"
        columns = self._columns()
        if len(columns) == 2:
            same, total = self._same()
            yield f"{same} of {total} sequences got the same tokens from both"
        if not any("decode_tokens_per_s" in one.values for _, repeats in columns for one in repeats):
            yield "decode is not told apart: sequences ended before the last prompt was computed (--output-len)"

    def _columns(self) -> list[tuple[str, list[Figures]]]:
        return [
            (
                side.contender.name,
                [figures(one.prefill, one.whole, self.workload, self.work, self.machine) for one in side.repeats],
            )
            for side in self.sides
            if not side.failure
        ]

    def _same(self) -> tuple[int, int]:
        first, second = ([repeat.whole for repeat in side.repeats] for side in self.sides if not side.failure)
        return num_same(first, second)
