"""`kvray status --watch`: the status again and again, on a terminal in place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.status import status_table
from messages.errors import KvrayError

_STYLES: Final = {"WORKER ": "bold", "no router": "yellow", "no workers": "red"}  #: of lines, by how they begin


class _Seen(NamedTuple):
    """A status, and when it was asked for, by the monotonic clock."""

    document: dict[str, Any]
    asked_s: float


def watch(fetch: Callable[[], dict[str, Any]], url: str, out: Console, interval_s: float, *, as_json: bool) -> None:
    """Show what `fetch` gives every `interval_s`, until Ctrl-C; a server that is gone is said, and asked again.

    Raises:
        KvrayError: the first time, nobody answers as kvray does.
    """
    try:
        seen = _Seen(fetch(), time.monotonic())
        if as_json or not out.is_terminal:
            _print_forever(fetch, seen, out, interval_s, as_json=as_json)
        with Live(console=out, screen=True, auto_refresh=False) as live:
            before: _Seen | None = None
            problem = ""
            while True:
                live.update(_screen(seen, before, f"{url}, every {interval_s:g} s; Ctrl-C ends", problem), refresh=True)
                time.sleep(interval_s)
                try:
                    before, seen = seen, _Seen(fetch(), time.monotonic())
                    problem = ""
                except KvrayError as error:
                    problem = f"no answer for {time.monotonic() - seen.asked_s:.0f} s: {error.message}"
    except KeyboardInterrupt:
        return


def _print_forever(
    fetch: Callable[[], dict[str, Any]], seen: _Seen, out: Console, interval_s: float, *, as_json: bool
) -> None:
    """Print each status as it comes, one JSON document a line or a table after an empty line."""
    before: _Seen | None = None
    while True:
        if as_json:
            print(json.dumps(seen.document), flush=True)  # noqa: T201 - machine-readable output
        else:
            elapsed_s = 0.0 if before is None else seen.asked_s - before.asked_s
            out.print(status_table(seen.document, before and before.document, elapsed_s), markup=False, end="\n\n")
        time.sleep(interval_s)
        before, seen = seen, _Seen(fetch(), time.monotonic())


def _screen(seen: _Seen, before: _Seen | None, title: str, problem: str) -> Text:
    """Write a status for a terminal: what it is about, what is wrong, the table."""
    elapsed_s = 0.0 if before is None else seen.asked_s - before.asked_s
    text = Text(f"{time.strftime('%H:%M:%S')}  {title}\n", style="dim")
    if problem:
        text.append(f"{problem}\n", style="bold red")
    for line in status_table(seen.document, before and before.document, elapsed_s).splitlines():
        style = next((style for begin, style in _STYLES.items() if line.startswith(begin)), "none")
        text.append(f"{line}\n", style="red" if line.endswith("no answer") else style)
    return text
