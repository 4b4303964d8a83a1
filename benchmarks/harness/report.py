"""How every benchmark is asked, kept and judged: options, rows of benchmarks/results/*.jsonl, goal lines.

options = parser(__doc__, "shm", quick="two cells").parse_args()
...
if options.record:
    record("shm", results)
print(goal("loop lag", 1.2, under=20.0, unit=" ms"))
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: Models, peers' environments: whatever a benchmark makes once and keeps.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvray"

_LOAD_AT_START = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def parser(doc: str | None, name: str, *, quick: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks have. `quick` says what --quick measures."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=f"{quick}, within 60 s")
    made.add_argument("--record", action="store_true", help=f"append to benchmarks/results/{name}.jsonl")
    return made


def hardware() -> str:
    """Describe CPU, cores and memory in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.machine()
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores of {cpu}, {memory_gb:.0f} GB"


def cpu_flags() -> set[str]:
    """Return the instructions that the kernel says the CPU has; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def commit() -> str:
    """Return the commit measured; with a plus sign where files differ from it."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # on a machine that was lent for a GPU
        return ""
    return done.stdout.strip()


def record(name: str, results: Any, **facts: Any) -> None:
    """Append a run to benchmarks/results/`name`.jsonl, with when, where and how. `load`: when this process began."""
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "load": round(_LOAD_AT_START, 2),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        **facts,
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def goal(
    name: str, figure: float | None, *, at_least: float | None = None, under: float | None = None, unit: str = ""
) -> str:
    """Write the line of one goal. `figure` None: not measured, which is never met."""
    assert (at_least is None) != (under is None), "a goal is one of the two"
    wanted = f"under {under:,g}{unit}" if under is not None else f"at least {at_least:,g}{unit}"
    if figure is None:
        return f"goal {name}: not measured (goal {wanted}) not measured"
    is_met = figure < under if under is not None else figure >= (at_least or 0.0)
    return f"goal {name}: {_shown(figure)}{unit} (goal {wanted}) {'met' if is_met else 'missed'}"


def _shown(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"
