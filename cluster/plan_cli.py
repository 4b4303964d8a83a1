"""The command line: kvray plan: how many workers a trace wants, and how much cache pays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cluster.client import ApiKey, ApiKeyFile, AsJson, Url, asked, server_of
from cluster.config import parse_size
from messages.errors import ConfigError
from messages.price import ComputePrice

_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
_TIMEOUT_S = 10.0
_PAIRS_OF_A_TOKEN = 32_768  #: keys with which attention takes as long as all else, where nothing was measured


def plan_command(
    trace: Annotated[Path, typer.Argument(help="Mooncake's JSONL, sessions of agents, or requests; .xz and .gz too.")],
    ttft: Annotated[
        float, typer.Option("--ttft", min=0.001, help="Seconds to the first token, for nine of ten requests.")
    ] = 2.0,
    itl: Annotated[
        float, typer.Option("--itl", min=0.01, help="Milliseconds between tokens, for nine of ten requests.")
    ] = 50.0,
    sessions: Annotated[
        int, typer.Option("--sessions", min=1, max=100_000, help="Clients at once, of a trace that does not say.")
    ] = 32,
    max_sessions: Annotated[
        int | None, typer.Option("--max-sessions", min=1, help="Read so many sessions.", show_default="all")
    ] = None,
    prefill_tokens_per_s: Annotated[
        float | None, typer.Option("--prefill-tokens-per-s", min=1e-3, help="Of a worker.", show_default="measured")
    ] = None,
    step_ms: Annotated[
        float | None,
        typer.Option("--step-ms", min=1e-3, help="A worker's decode step with one sequence.", show_default="measured"),
    ] = None,
    row_ms: Annotated[
        float | None,
        typer.Option("--row-ms", min=0.0, help="What each sequence more adds to it.", show_default="measured"),
    ] = None,
    kv_bytes_per_token: Annotated[
        int | None, typer.Option("--kv-bytes-per-token", min=1, help="Of the model.", show_default="the server's")
    ] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option("--kv-cache-memory", help="Of a worker, as 40GiB.", show_default="the server's")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", min=1, help="Of a worker.", show_default="the server's, else 256")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Tell how many prefill and decode workers TRACE wants, and what host memory and disk pay.

    What a worker can do is what a kvray that serves measured (--url), or what the options say. The answer is that of a
    model of the fleet, without faults and handoffs: a place to begin, which autoscaling goes on from.
    """
    from cluster.planning import Wishes, plan
    from cluster.traces import read_trace

    chosen = {
        "--prefill-tokens-per-s": prefill_tokens_per_s,
        "--step-ms": step_ms,
        "--kv-bytes-per-token": kv_bytes_per_token,
        "--kv-cache-memory": kv_cache_memory,
    }
    told: dict[str, Any] = {}
    if None in chosen.values():
        try:
            with asked(server_of(url, api_key, api_key_file), "/status", "status", _TIMEOUT_S) as response:
                told = _a_worker(json.loads(response.read()))
        except ConfigError as error:
            unsaid = ", ".join(name for name, value in chosen.items() if value is None)
            raise ConfigError(f"nothing says what a worker can do: give {unsaid}, or --url ({error.message})") from None
    price = _price(told.get("compute"), prefill_tokens_per_s, step_ms, row_ms)
    token_bytes = kv_bytes_per_token or told["block_bytes"] // told["block_size_tokens"]
    memory_bytes = parse_size(kv_cache_memory) if kv_cache_memory else told["num_blocks"] * told["block_bytes"]
    with _err.status("reading") as shown:
        from cluster.fleet_model import WorkerShape

        shape = WorkerShape(
            compute=price,
            max_num_seqs=max_num_seqs or told.get("max_num_seqs", 256),
            kv_tokens=max(1, memory_bytes // token_bytes),
        )
        wishes = Wishes(ttft_s=ttft, itl_s=itl / 1000, num_at_once=sessions, kv_bytes_per_token=token_bytes)
        made = plan(read_trace(trace, max_sessions), shape, wishes, shown.update)
    if as_json:
        _out.print_json(json.dumps(dataclasses.asdict(made)))
        return
    _show(made)


def _a_worker(status: dict[str, Any]) -> dict[str, Any]:
    """Return one worker of a status, of which all are alike.

    Raises:
        ConfigError: none is there, or what answers is no kvray.
    """
    workers = status.get("workers") if isinstance(status, dict) else None
    if not isinstance(workers, list) or not workers:
        raise ConfigError("what answers there has no workers")
    worker: dict[str, Any] = workers[0]
    missing = [name for name in ("block_bytes", "block_size_tokens", "num_blocks") if name not in worker]
    if missing:
        raise ConfigError(f"what answers there says of its workers no {missing[0]}: is it a kvray?")
    return worker


def _price(
    measured: Any, prefill_tokens_per_s: float | None, step_ms: float | None, row_ms: float | None
) -> ComputePrice:
    price = ComputePrice() if measured is None else msgspec.convert(measured, ComputePrice)
    if prefill_tokens_per_s is not None:
        token_s = 1.0 / prefill_tokens_per_s
        price = msgspec.structs.replace(price, token_s=token_s, pair_s=token_s / _PAIRS_OF_A_TOKEN)
    if step_ms is not None:
        price = msgspec.structs.replace(price, step_s=step_ms / 1000, row_s=0.0, row_key_s=0.0)
    if row_ms is not None:
        price = msgspec.structs.replace(price, row_s=row_ms / 1000)
    if not price.token_s or not price.step_s + price.row_s:
        raise ConfigError("the server has measured nothing yet: give --prefill-tokens-per-s and --step-ms")
    return price


def _show(made: Any) -> None:
    gib = 2**30
    _out.print(
        f"{made.num_requests} requests, {made.num_prompt_tokens / 1e6:.1f} M prompt tokens, of which a cache without "
        f"end has {made.endless_hit_share:.1%}"
    )
    table = Table("CACHE GIB", "M TOKENS", "HITS", "COMPUTING S", "OF WHAT IS SAVED", box=None)
    for column in table.columns:
        column.justify = "right"
    for point in made.curve:
        table.add_row(
            f"{point.bytes / gib:.1f}",
            f"{point.tokens / 1e6:.2f}",
            f"{point.hit_share:.1%}",
            f"{point.computing_s:.0f}",
            f"{point.saved_share:.0%}",
        )
    _out.print(table)
    disk = f"{made.disk_bytes / gib:.1f} GiB of disk" if not made.disk_why else f"no disk ({made.disk_why})"
    _out.print(f"tiers that pay, of all nodes together: {made.host_bytes / gib:.1f} GiB of host memory, {disk}")
    _out.print(
        f"workers: {made.num_prefill} prefill, {made.num_decode} decode: TTFT p50 {made.ttft_p50_s:.2f} s, p90 "
        f"{made.ttft_p90_s:.2f} s, ITL p90 {1e3 * made.itl_p90_s:.1f} ms"
    )
