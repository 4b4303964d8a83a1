"""The command line: kvray explain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from cluster.client import ApiKey, ApiKeyFile, AsJson, Url, asked, server_of

_out = Console(highlight=False, emoji=False)

_TIMEOUT_S = 30.0
_PARTS = ("wait_s", "load_s", "queue_s", "compute_s", "handoff_s", "crowding_s", "displaced_s")


def explain(
    request_id: Annotated[str, typer.Argument(help="The id in a reply, or its x-request-id.", show_default="needed")],
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show why a request went where it went, and what came of it."""
    path = f"/v1/route/{quote(request_id, safe='')}"
    with asked(server_of(url, api_key, api_key_file), path, "explanation", _TIMEOUT_S) as response:
        document: dict[str, Any] = json.load(response)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    for line in _head(document):
        _out.print(line, markup=False, soft_wrap=True)
    for table in (_candidates(document["predicted"]), _runs(document["runs"])):
        if table.row_count:
            _out.print(table)
    for sentence in document["sentences"]:
        _out.print(sentence, markup=False)


def _head(document: Mapping[str, Any]) -> list[str]:
    where = document["decode_worker"] or "no worker yet"
    if document["prefill_worker"]:
        where += f", prompt computed by {document['prefill_worker']}"
    lines = [
        f"request {document['request_id']}: {document['num_prompt_tokens']} prompt tokens, {document['state']}",
        f"placed on {where}, by {document['placed_by'] or 'nobody yet'}",
    ]
    if document["num_placements"] > 1:
        lines.append(f"placed {document['num_placements']} times: its worker was lost or failed it")
    if document["error"]:
        lines.append(f"error: {document['error']}")
    return lines


def _candidates(predicted: Mapping[str, Any]) -> Table:
    """Show the placements that were priced, in milliseconds; parts that cost nothing anywhere are left out."""
    candidates: Sequence[Mapping[str, Any]] = predicted["candidates"]
    title = f"{len(candidates)} of {predicted['num_possible']} placements, in ms"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    parts = [part for part in _PARTS if any(one["parts"][part] for one in candidates)]
    table.add_column("")
    for column in ("DECODE", "PREFILL"):
        table.add_column(column, overflow="fold", min_width=16)
    for column in ("COST", "TTFT", *(part.removesuffix("_s").upper() for part in parts)):
        table.add_column(column, justify="right")
    table.add_column("HELD TOKENS")
    for one in candidates:
        held = ", ".join(f"{tokens} {place}" for place, tokens in one["matched_tokens"].items())
        table.add_row(
            "*" if one["is_chosen"] else "",
            one["decode_worker"],
            one["prefill_worker"] or "-",
            _ms(one["cost_s"]),
            _ms(one["ttft_s"]),
            *(_ms(one["parts"][part]) for part in parts),
            held or "-",
        )
    return table


def _runs(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="What the prompt's tokens came from", title_justify="left", box=None, pad_edge=False)
    table.add_column("TOKENS", justify="right")
    for column in ("FROM", "AT", "WHY COMPUTED", "LAST HELD BY"):
        table.add_column(column, overflow="fold")
    for run in runs:
        table.add_row(
            f"{run['begin']}-{run['end']}", run["source"], run["holder"], run["why"] or "-", run["missed_holder"] or "-"
        )
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
