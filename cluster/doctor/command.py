"""`kvray doctor`: what this node lacks, and what to do about it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from cluster import options
from cluster.client import AsJson
from cluster.config import KvrayConfig, load_config
from cluster.doctor.facts import ConfigFacts
from cluster.doctor.findings import Finding, of_config
from messages.errors import ConfigError

_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_ADVICE: Final = "     "  #: in front of it


def doctor(config: options.ConfigFile = None, as_json: AsJson = False) -> None:
    """Say what this node lacks, and what to do about it; exit code 1 where something that is needed is missing.

    Run it on each node, in the environment that its Ray has. It takes seconds, at most 15, whatever hangs.
    """
    from cluster.doctor.examination import EXAMINATIONS, examine  # what they load takes half a second

    logging.disable(logging.WARNING)  # findings say it
    settings, first = _read(config)
    found = [first, *examine(settings, EXAMINATIONS)]
    if as_json:
        document = {"node": os.uname().nodename, "findings": [finding._asdict() for finding in found]}
        print(json.dumps(document, indent=2))  # noqa: T201 - machine-readable output
    else:
        show(found, Console(highlight=False, soft_wrap=True, emoji=False))
    sys.stdout.flush()
    os._exit(int(any(finding.state == "fail" for finding in found)))  # whatever hangs is not waited for


def show(found: Sequence[Finding], out: Console) -> None:
    """Print findings for people: state, thing, what was seen; below it what to do."""
    width = max(len(finding.about) for finding in found)
    for finding in found:
        line = Text(f"{finding.state:4} ", style=_STYLES[finding.state])
        line.append(f"{finding.about.ljust(width)}  {finding.seen}", style="default")
        out.print(line)
        if finding.advice:
            out.print(Text(f"{_ADVICE}{' ' * width}  {finding.advice}", style="dim"))
    counts = {state: sum(finding.state == state for finding in found) for state in ("fail", "warn")}
    out.print(f"{counts['fail']} to mend, {counts['warn']} to look at, on {os.uname().nodename}", markup=False)


def _read(path: Path | None) -> tuple[KvrayConfig, Finding]:
    """Return the configuration that the node is judged by, and what is to be said of it: defaults where it is wrong."""
    try:
        config, error = load_config(path, {}), ""
    except ConfigError as failure:
        config, error = load_config(None, {}), failure.message
    source = "defaults" if path is None else str(path)
    return config, of_config(ConfigFacts(source=source, error=error))
