"""The command line: kvray cache ..., but export and import, which are in cluster.prefix_cli."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cluster.client import ApiKey, ApiKeyFile, AsJson, Server, Url, asked, server_of
from messages.errors import ConfigError, WorkerError

cache_app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Show and steer what is cached where.",
)

_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

TIMEOUT_S = 120.0  #: between two signs of life: a store has up to a minute for what it is asked
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_KIB = 1024

_ALL_TIERS = "all of them"
_NEEDED = "none"
_PROMPT_NEEDED = "what --file holds"

Text = Annotated[str | None, typer.Argument(help="A prompt; -: from standard input.", show_default=_PROMPT_NEEDED)]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="JSON with `prompt` (text, token ids) or `messages`, as the API takes them.",
        show_default="TEXT",
    ),
]
CacheSalt = Annotated[
    str | None, typer.Option("--cache-salt", help="Of the requests that are meant.", show_default="none")
]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Whose blocks.", show_default="the API key's own")]
TierNames = Annotated[
    list[str] | None,
    typer.Option("--tier", help="device, host, disk, remote; once for each.", show_default=_ALL_TIERS),
]
DryRun = Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Only say what would go.")]


@cache_app.command()
def lookup(
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show which tokens of a prompt lie where."""
    body = prompt_body(text, file, cache_salt, tenant)
    found = _answer(server_of(url, api_key, api_key_file), "/v1/cache/lookup", body)
    if as_json:
        print_json(found)
        return
    by_tier = ", ".join(f"{tokens} on {tier}" for tier, tokens in found["tokens"].items())
    _say(f"{found['held_tokens']} of {found['num_tokens']} tokens are held{f': {by_tier}' if by_tier else ''}")
    for run in found["runs"]:
        holders = ", ".join(f"{one['worker_id']} ({one['tier']})" for one in run["holders"])
        _say(f"  {run['begin']}-{run['end']}: {holders}")


@cache_app.command()
def stats(url: Url = None, api_key: ApiKey = None, api_key_file: ApiKeyFile = None, as_json: AsJson = False) -> None:
    """Show what workers and node caches hold, by tier."""
    document = _answer(server_of(url, api_key, api_key_file), "/v1/cache/stats")
    if as_json:
        print_json(document)
        return
    rows = [("OWNER", "NODE", "TIER", "BLOCKS", "BYTES", "CAPACITY", "HITS", "EVICTIONS")]
    for owner in [*document["workers"], *document["caches"]]:
        rows += [
            (
                *(owner["worker_id"], owner["node"], tier, _shown(one["blocks"])),
                *(_size(one["bytes"]), _size(one["capacity_bytes"]), _shown(one["hits"]), _shown(one["evictions"])),
            )
            for tier, one in owner["tiers"].items()
        ]
    _print_rows(rows)
    used = [
        (name, owner["worker_id"], tier, _size(one["bytes"]), _size(one["quota_bytes"]))
        for owner in [*document["workers"], *document["caches"]]
        for name, tiers in owner["tenants"].items()
        for tier, one in tiers.items()
    ]
    if used:
        _say("")
        _print_rows([("TENANT", "OWNER", "TIER", "BYTES", "QUOTA"), *used])


@cache_app.command()
def table(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file.", show_default="standard output")
    ] = None,
    table_format: Annotated[str, typer.Option("--format", help="arrow (a stream), parquet, json.")] = "json",
    tier: Annotated[
        str | None, typer.Option("--tier", help="device, host, disk, remote.", show_default=_ALL_TIERS)
    ] = None,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose blocks.", show_default="all that may be seen")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """List the blocks that workers' pools and node caches hold."""
    if output is None and table_format != "json" and sys.stdout.isatty():
        raise ConfigError(f"{table_format} on a terminal; a file is wanted (--output)")
    query = {"format": table_format, "tier": tier, "tenant": tenant}
    path = f"/v1/cache/table?{urlencode({name: value for name, value in query.items() if value is not None})}"
    with asked(server_of(url, api_key, api_key_file), path, "cache", TIMEOUT_S) as response:
        if output is None:
            shutil.copyfileobj(response, sys.stdout.buffer)
            return
        try:
            with output.open("wb") as stream:
                shutil.copyfileobj(response, stream)
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error.strerror}") from None
        say_aside(f"{response.headers['X-Num-Rows']} blocks in {output}")


@cache_app.command()
def clear(
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="All blocks, in place of a prompt's.", show_default="a prompt's")
    ] = False,
    tier: TierNames = None,
    dry_run: DryRun = True,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Drop a prompt's blocks from all caches, or a tenant's, or one salt's, or all. First look, then --no-dry-run."""
    body = {**prompt_body(text, file, cache_salt, tenant), **_tiers(tier), "everything": everything, "dry_run": dry_run}
    done = _answer(server_of(url, api_key, api_key_file), "/v1/cache/clear", body)
    show_work(done, "would be dropped" if dry_run else "dropped", as_json=as_json)


@cache_app.command()
def evict(
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    tier: TierNames = None,
    dry_run: DryRun = True,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Drop a prompt's blocks as `clear` does, but those that are pinned."""
    body = {**prompt_body(text, file, cache_salt, tenant), **_tiers(tier), "dry_run": dry_run}
    done = _answer(server_of(url, api_key, api_key_file), "/v1/cache/evict", body)
    show_work(done, "would be dropped" if dry_run else "dropped", as_json=as_json)


@cache_app.command()
def pin(
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    ttl_s: Annotated[float | None, typer.Option("--ttl", help="Seconds.", show_default="for good")] = None,
    priority: Annotated[int, typer.Option("--priority", help="-2 to 2: each doubles or halves the worth.")] = 0,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep a prompt's blocks in host memory, as far as they lie there."""
    more = {"priority": priority} | ({} if ttl_s is None else {"ttl_s": ttl_s})
    body = prompt_body(text, file, cache_salt, tenant) | more
    show_work(_answer(server_of(url, api_key, api_key_file), "/v1/cache/pin", body), "pinned", as_json=as_json)


@cache_app.command()
def unpin(
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep a prompt's blocks no longer than others."""
    body = prompt_body(text, file, cache_salt, tenant)
    show_work(_answer(server_of(url, api_key, api_key_file), "/v1/cache/unpin", body), "unpinned", as_json=as_json)


@cache_app.command()
def move(
    source: Annotated[str, typer.Option("--from", help="host, disk, remote.", show_default=_NEEDED)],
    target: Annotated[str, typer.Option("--to", help="host, disk, remote.", show_default=_NEEDED)],
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Bring a prompt's blocks from one tier to another, on each node: copied and verified, then dropped there."""
    body = prompt_body(text, file, cache_salt, tenant) | {"source": source, "target": target}
    done = _followed(server_of(url, api_key, api_key_file), "/v1/cache/move", body)
    show_work(done, f"moved to {target}", as_json=as_json)


@cache_app.command()
def warm(
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    worker: Annotated[
        str | None,
        typer.Option("--worker", help="Its id: and to the pool of this worker.", show_default="host memory only"),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Bring a prompt's blocks from disk or remote up to host memory, where they lie there; and to a worker's pool."""
    body = prompt_body(text, file, cache_salt, tenant) | ({} if worker is None else {"worker_id": worker})
    done = _followed(server_of(url, api_key, api_key_file), "/v1/cache/warm", body)
    show_work(done, "brought up", as_json=as_json)


@cache_app.command()
def gc(
    tier: Annotated[
        list[str] | None, typer.Option("--tier", help="disk, remote; once for each.", show_default="both of them")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Have disk and remote stores give back the room that dropped blocks take, now and not by and by."""
    done = _followed(server_of(url, api_key, api_key_file), "/v1/cache/gc", _tiers(tier))
    show_work(done, "collected", as_json=as_json)


@cache_app.command()
def check(
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    tier: TierNames = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Read and verify a prompt's blocks, or all; damaged ones are dropped. Exit code 1 where there were any."""
    body = {**prompt_body(text, file, cache_salt, tenant), **_tiers(tier)}
    done = _followed(server_of(url, api_key, api_key_file), "/v1/cache/check", body)
    show_work(done, "verified", as_json=as_json)
    if any(one["damaged"] for one in done["tiers"].values()):
        raise typer.Exit(1)


def progress() -> Progress:
    """Make bars on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=_err, disable=not _err.is_terminal)


def _followed(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Have a long work done, and show how far it is, for each owner and tier; the answer to the whole."""
    tasks: dict[str, TaskID] = {}
    whole: dict[str, Any] | None = None
    with progress() as bars, asked(server, path, "cache", TIMEOUT_S, body) as response:
        for line in map(json.loads, response):
            if "held" not in line:
                whole = line
                continue
            title = f"{line['worker_id']} {line['tier']}"
            if title not in tasks:
                tasks[title] = bars.add_task(title)
            bars.update(tasks[title], completed=line["blocks"], total=line["held"])
    if whole is None:
        raise WorkerError("the answer was cut off: not all of it was done")
    return whole


def prompt_body(text: str | None, file: Path | None, cache_salt: str | None, tenant: str | None) -> dict[str, Any]:
    """Return the fields that say which prompt is meant, if any is, and whose."""
    named = {"cache_salt": cache_salt, "tenant": tenant}
    body: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if text is not None and file is not None:
        raise ConfigError("a prompt and --file; one of them is wanted")
    if text is not None:
        return body | {"prompt": sys.stdin.read() if text == "-" else text}
    if file is None:
        return body
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{file} holds no JSON object; one with `prompt` or `messages` is wanted")
    return document | body


def _tiers(names: list[str] | None) -> dict[str, Any]:
    return {"tiers": names} if names else {}


def _answer(server: Server, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    with asked(server, path, "cache", TIMEOUT_S, body) as response:
        document: dict[str, Any] = json.load(response)
    return document


def show_work(done: dict[str, Any], verb: str, *, as_json: bool) -> None:
    """Say what workers and node caches did; exit code 1 where one failed."""
    if as_json:
        print_json(done)
    else:
        if not done["num_caches"] and not done["num_workers"]:
            _say("there is no node cache")
        for tier, one in done["tiers"].items():
            _say(f"{tier}: {_counts(one, verb)}")
    for failure in done["failures"]:
        say_aside(f"kvray: {failure['worker_id']}: {failure['message']}")
    if done["failures"]:
        raise typer.Exit(1)


def _counts(one: dict[str, Any], verb: str) -> str:
    if verb == "collected":
        return f"{one['freed_files']} files or objects ({_size(one['freed_bytes'])}) given back"
    more = [f"{one['in_use']} in use stay"] if one["in_use"] else []
    more += [f"{one['damaged']} damaged"] if one["damaged"] else []
    more += [f"{count} of them to {tier} only" for tier, count in one["below"].items()]
    more += [f"{one['without_room']} without room"] if one["without_room"] else []
    more += [f"{one['above_quota']} above the quota"] if one["above_quota"] else []
    more += [f"{one['not_stored']} not stored"] if one["not_stored"] else []
    return ", ".join([f"{one['blocks']} blocks ({one['tokens']} tokens, {_size(one['bytes'])}) {verb}", *more])


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "-"
    for unit in _UNITS[:-1]:
        if num_bytes < _KIB:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= _KIB
    return f"{num_bytes:.4g} {_UNITS[-1]}"


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    _out.print(text, markup=False)


def say_aside(text: str) -> None:
    """Tell people something that is no part of the output."""
    _err.print(text, markup=False)


def print_json(document: dict[str, Any]) -> None:
    """Give programs the whole document."""
    print(json.dumps(document, indent=2))  # noqa: T201 - machine-readable output
