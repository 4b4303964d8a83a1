"""Draws distributions as SVG, by matplotlib, which kvray does not need otherwise (extra `bench`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from cluster.bench.running import Side
from messages.errors import ConfigError

_COLOURS: Final = ("#1f77b4", "#d95f02")
_MAX_POINTS: Final = 500  #: of a line: more cannot be seen


def check_can_plot(path: Path) -> None:
    """Check, before anything is measured, that a plot can be drawn and lie at `path`.

    Raises:
        ConfigError: matplotlib is not installed, or the file would be none.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: wanted matplotlib, which is not installed: pip install 'kvray[bench]'")
    if path.suffix != ".svg":
        raise ConfigError(f"--plot: wanted a file that ends in .svg, saw {path}")
    check_can_write("--plot", path)


def check_can_write(option: str, path: Path) -> None:
    """Check, before anything is measured, that a file can lie at `path`.

    Raises:
        ConfigError: its directory is not there.
    """
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: wanted a file in a directory that is there, saw {path}")


def plot(sides: Sequence[Side], path: Path) -> None:
    """Write to `path` how TTFT, ITL and E2E are distributed: a line for each repeat, a colour for each server.

    Raises:
        ConfigError: the file cannot be written.
    """
    made, axes = drawing(1, 3, (12.0, 3.6))
    for axis, (title, name) in zip(axes, (("TTFT", "ttft_s"), ("ITL", "gaps_s"), ("E2E", "e2e_s")), strict=True):
        for side, colour in zip(sides, _COLOURS, strict=False):
            for number, repeat in enumerate(side.repeats):
                answered = (outcome for outcome in repeat.outcomes if outcome.fault is None)
                values = sorted(1e3 * value for outcome in answered for value in _values(getattr(outcome, name)))
                if values:
                    places = [round(i * (len(values) - 1) / _MAX_POINTS) for i in range(_MAX_POINTS + 1)]
                    ranks = [100 * place / max(1, len(values) - 1) for place in places]
                    label = side.name if number == 0 else None
                    axis.plot([values[place] for place in places], ranks, color=colour, linewidth=1, label=label)
        axis.set(title=title, xlabel="ms", ylabel="% of them, at most" if name == "ttft_s" else None, ylim=(0, 100))
        axis.grid(visible=True, alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    save(made, path)


def drawing(num_rows: int, num_columns: int, inches: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure of matplotlib, and its axes: without a display, and the same file each time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kvray"
    from matplotlib import pyplot

    made, axes = pyplot.subplots(num_rows, num_columns, figsize=inches, layout="constrained")
    return made, axes


def save(made: Any, path: Path) -> None:
    """Write a figure of `drawing` to `path`.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        made.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _values(value: float | Iterable[float]) -> Iterable[float]:
    return (value,) if isinstance(value, float) else value
