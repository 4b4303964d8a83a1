"""The command line: kvray cache export, import: a prompt's KV as a file that ships with a deployment."""

from __future__ import annotations

import contextlib
import http.client
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import msgspec
import typer

from cluster.cache_cli import (
    TIMEOUT_S,
    CacheSalt,
    PromptFile,
    Tenant,
    Text,
    print_json,
    progress,
    prompt_body,
    say_aside,
    show_work,
)
from cluster.client import ApiKey, ApiKeyFile, AsJson, Url, asked, server_of
from messages.errors import ConfigError, WorkerError


def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.", show_default="none")],
    text: Text = None,
    file: PromptFile = None,
    cache_salt: CacheSalt = None,
    tenant: Tenant = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a prompt's KV to an Arrow file, as far as it is held from the prompt's head on, and verify it there."""
    from cluster.prefix_file import PrefixFile

    unfinished = output.with_name(f"{output.name}.unfinished")
    body = prompt_body(text, file, cache_salt, tenant)
    try:
        with asked(server_of(url, api_key, api_key_file), "/v1/cache/export", "cache", TIMEOUT_S, body) as response:
            _copy(response, unfinished, output)
        with contextlib.closing(PrefixFile(unfinished)) as prefix, progress() as bars:
            task = bars.add_task("verified", total=prefix.num_rows)
            for piece in prefix.pieces():
                bars.advance(task, len(piece.checksums) // 8)
            told = {"blocks": prefix.num_rows, "tokens": prefix.num_rows * prefix.model.block_size, "file": str(output)}
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    if as_json:
        print_json(told)
    else:
        say_aside(f"{told['blocks']} blocks ({told['tokens']} tokens) in {output}")


def take_in(
    file: Annotated[Path, typer.Argument(help="What `export` wrote.", show_default="none")],
    cache_salt: Annotated[
        str | None, typer.Option("--cache-salt", help="Of the requests that are to find it.", show_default="none")
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="Whose requests are to find it.", show_default="the API key's own"),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            help="host, disk, remote: which may take it in; once for each.",
            show_default="all of them",
        ),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Put an exported prompt's KV into host memory of each node, and to its nearest store. For operators.

    What host memory has no room for goes to the store alone. All of the file is verified before the first block is
    sent, and each block again where it is to lie.
    """
    from cluster.prefix_file import PrefixFile

    query = {"cache_salt": cache_salt, "tenant": tenant}
    named = [(name, value) for name, value in query.items() if value is not None]
    path = f"/v1/cache/import?{urlencode([*named, *(('tier', one) for one in tier or ())])}"
    server = server_of(url, api_key, api_key_file)
    whole: dict[str, Any] = {}
    with contextlib.closing(PrefixFile(file)) as prefix, progress() as bars:
        task = bars.add_task("verified", total=prefix.num_rows)
        for piece in prefix.pieces():
            bars.advance(task, len(piece.checksums) // 8)
        task = bars.add_task("taken in", total=prefix.num_rows)
        for piece in prefix.pieces():
            with asked(server, path, "cache", TIMEOUT_S, msgspec.msgpack.encode(piece)) as response:
                whole = _added(whole, msgspec.json.decode(response.read()))
            bars.advance(task, len(piece.checksums) // 8)
    show_work(whole, "taken in", as_json=as_json)


def _copy(response: http.client.HTTPResponse, unfinished: Path, output: Path) -> None:
    try:
        with unfinished.open("wb") as stream, progress() as bars:
            task = bars.add_task("bytes received", total=None)
            while data := _next_bytes(response):
                stream.write(data)
                bars.advance(task, len(data))
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from None


def _next_bytes(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise WorkerError(
            f"the answer was cut off ({type(error).__name__}): a block is held no more, ask again"
        ) from None


def _added(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Add what was done with one piece to what was done before; a failure that goes on is told once."""
    if not whole:
        return part
    failures = [*whole["failures"], *(one for one in part["failures"] if one not in whole["failures"])]
    return {**part, "tiers": _summed(whole["tiers"], part["tiers"]), "failures": failures}


def _summed(one: Any, other: Any) -> Any:
    """Add numbers, and those of the same names in mappings."""
    if isinstance(one, int):
        return one + other
    return {**one, **{name: _summed(one[name], value) if name in one else value for name, value in other.items()}}
