"""Figures of repeats as a table for people, and as a document for programs: a median and how far it spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from rich.table import Table

from cluster.bench.figures import Spread

Column = tuple[str, Mapping[str, Spread]]  #: who was measured, and the figures


def figure_table(
    columns: Sequence[Column],
    compared: Mapping[str, Spread],
    label: Callable[[str], str | None],
    is_share: Callable[[str], bool],
) -> Table:
    """Return figures as rows, of everybody who was measured, with a column of ratios where two are compared.

    `label` says how people call a figure, None: it is not shown; of which `is_share` a percentage is written.
    """
    made = Table(box=None, pad_edge=False)
    made.add_column("")
    for name, _ in columns:
        made.add_column(name, justify="right")
    if compared:
        made.add_column("ratio", justify="right")
    for name in dict.fromkeys(name for _, column in columns for name in column):
        text = label(name)
        if text is not None:
            cells = [_cell(column.get(name), is_share=is_share(name)) for _, column in columns]
            made.add_row(text, *cells, *([_cell(compared.get(name))] if compared else ()))
    return made


def spreads(found: Mapping[str, Spread]) -> dict[str, dict[str, float]]:
    """Return figures for JSON."""
    return {name: asdict(spread) for name, spread in found.items()}


def _cell(spread: Spread | None, *, is_share: bool = False) -> str:
    """Write a median, with the lowest and the highest where they differ."""
    if spread is None:
        return "-"
    if spread.low == spread.high:
        return _shown(spread.median, is_share)
    return f"{_shown(spread.median, is_share)} ({_shown(spread.low, is_share)}-{_shown(spread.high, is_share)})"


def _shown(value: float, is_share: bool) -> str:
    if is_share:
        return f"{100 * value:.1f} %"
    if value >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"
