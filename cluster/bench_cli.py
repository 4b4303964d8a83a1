"""The command line: kvray bench serve. Options have the names of `vllm bench serve` where they mean the same."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.bench_engine_cli import engine
from cluster.client import ApiKey, ApiKeyFile, AsJson, Server, Url, server_of
from cluster.credentials import api_keys
from messages.errors import ConfigError

if TYPE_CHECKING:
    from cluster.bench.running import Plan, Side, Workloads

bench_app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure a server, or the engine alone.",
)
bench_app.command()(engine)

_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

_INTERRUPTED = 130
_SERVERS, _LOAD, _PACE, _JUDGED, _DEADLINES = "Servers", "Workload", "Pace", "What is told", "Deadlines"


def _option(flags: str | tuple[str, ...], text: str, panel: str, default: str | None = None, **more: Any) -> Any:
    names = (flags,) if isinstance(flags, str) else flags
    shown: str | bool = True if default is None else default
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=shown, **more)


@bench_app.callback()
def everywhere() -> None:
    """Measure a server, or the engine alone."""


@bench_app.command()
def serve(
    url: Url = None,
    base_url: Annotated[str | None, _option("--base-url", "vLLM's name of --url.", _SERVERS, "--url")] = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    against: Annotated[
        str | None,
        _option("--against", "A second server: asked the same, in turn; ratios are shown.", _SERVERS, "none"),
    ] = None,
    against_api_key_file: Annotated[
        Path | None, _option("--against-api-key-file", "Its API keys; the first is used.", _SERVERS, "none: no key")
    ] = None,
    model: Annotated[str | None, _option("--model", "Which model is asked.", _SERVERS, "the first there")] = None,
    against_model: Annotated[
        str | None, _option("--against-model", "Of the second server.", _SERVERS, "the same, else its first")
    ] = None,
    endpoint: Annotated[
        Literal["/v1/completions", "/v1/chat/completions", "/v1/responses"],
        _option("--endpoint", "Where drawn prompts are posted.", _SERVERS),
    ] = "/v1/completions",
    prompts: Annotated[
        Literal["ids", "text"], _option("--prompts", "As token ids, or as a made-up word for each.", _SERVERS)
    ] = "ids",
    ignore_eos: Annotated[
        bool, _option("--ignore-eos/--no-ignore-eos", "Answers are as long as asked for, or shorter.", _SERVERS)
    ] = True,
    extra_body: Annotated[
        str, _option("--extra-body", "JSON that every request has besides.", _SERVERS, "none")
    ] = "{}",
    dataset_name: Annotated[
        Literal["random", "agents"],
        _option("--dataset-name", "Drawn prompts, or drawn sessions of a coding agent.", _LOAD),
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        _option("--dataset-path", "A trace: Mooncake's JSONL, agents' sessions, requests; .xz, .gz.", _LOAD, "none"),
    ] = None,
    num_prompts: Annotated[
        int, _option("--num-prompts", "Requests of a repeat, at most.", _LOAD, min=1, max=10_000_000)
    ] = 100,
    random_input_len: Annotated[
        int, _option("--random-input-len", "Tokens of a turn.", _LOAD, min=1, max=2**24)
    ] = 1024,
    random_output_len: Annotated[
        int, _option("--random-output-len", "Tokens of an answer.", _LOAD, min=1, max=2**24)
    ] = 128,
    random_range_ratio: Annotated[
        float, _option("--random-range-ratio", "Lengths differ by this share, at most.", _LOAD, min=0.0, max=1.0)
    ] = 0.0,
    random_prefix_len: Annotated[
        int, _option("--random-prefix-len", "Tokens that sessions share, before.", _LOAD, min=0, max=2**24)
    ] = 0,
    num_prefixes: Annotated[int, _option("--num-prefixes", "Different ones of these.", _LOAD, min=1)] = 1,
    turns: Annotated[
        int | None,
        _option("--turns", "Of a session, at most.", _LOAD, "1; of agents 25; of a trace all", min=1),
    ] = None,
    think_time_s: Annotated[
        float, _option("--think-time-s", "From an answer to the next turn, of drawn prompts.", _LOAD, min=0.0)
    ] = 0.0,
    num_sessions: Annotated[
        int | None, _option("--num-sessions", "Sessions, at most.", _LOAD, "as many as --num-prompts make", min=1)
    ] = None,
    block_tokens: Annotated[
        int | None,
        _option("--block-tokens", "Tokens that a block of a trace becomes; outputs likewise.", _LOAD, "its own", min=1),
    ] = None,
    max_prompt_len: Annotated[
        int, _option("--max-prompt-len", "Longer prompts of a trace are cut.", _LOAD, "none", min=1)
    ] = 2**31,
    max_output_len: Annotated[
        int, _option("--max-output-len", "Longer answers of a trace are cut.", _LOAD, "none", min=1)
    ] = 2**31,
    vocab_size: Annotated[
        int, _option("--vocab-size", "Token ids are drawn below it.", _LOAD, min=200, max=2**31)
    ] = 1000,
    seed: Annotated[int, _option("--seed", "Of all that is drawn; each repeat has prompts of its own.", _LOAD)] = 0,
    request_rate: Annotated[
        float, _option("--request-rate", "Sessions that begin in a second; inf: at once.", _PACE, "inf", min=1e-6)
    ] = math.inf,
    arrivals: Annotated[
        Literal["poisson", "constant"], _option("--arrivals", "How they come at that rate.", _PACE)
    ] = "poisson",
    speed: Annotated[
        float,
        _option("--speed", "A trace's own times, so many times as fast; inf: no pauses.", _PACE, "inf", min=1e-6),
    ] = math.inf,
    max_concurrency: Annotated[
        int | None, _option("--max-concurrency", "Sessions at once.", _PACE, "all whose time has come", min=1)
    ] = None,
    repeats: Annotated[int, _option("--repeats", "How often it is all done.", _PACE, min=1)] = 1,
    num_warmups: Annotated[int, _option("--num-warmups", "Requests before, which do not count.", _PACE, min=0)] = 1,
    ttft: Annotated[float | None, _option("--ttft", "Target, ms.", _JUDGED, "none", min=0.0)] = None,
    itl: Annotated[
        float | None, _option("--itl", "Target, ms, of the mean of a request's gaps.", _JUDGED, "none", min=0.0)
    ] = None,
    percentiles: Annotated[
        str, _option(("--metric-percentiles", "--percentiles"), "Which are told.", _JUDGED)
    ] = "50,90,99",
    output: Annotated[
        Path | None, _option(("--output", "-o", "--result-filename"), "A file for the document.", _JUDGED, "none")
    ] = None,
    detailed: Annotated[
        bool, _option(("--save-detailed/--no-save-detailed",), "Each request in the document.", _JUDGED)
    ] = False,
    plot: Annotated[
        Path | None, _option("--plot", "An SVG file of the distributions (wants kvray[bench]).", _JUDGED, "none")
    ] = None,
    timeout_s: Annotated[float, _option("--timeout-s", "Of one answer.", _DEADLINES, min=0.01)] = 600.0,
    silence_s: Annotated[float, _option("--silence-s", "Of nothing in an answer.", _DEADLINES, min=0.01)] = 60.0,
    max_seconds: Annotated[float, _option("--max-seconds", "Of a repeat.", _DEADLINES, min=0.01)] = 3600.0,
    ready_check_timeout_sec: Annotated[
        float, _option("--ready-check-timeout-sec", "Until a server answers at all.", _DEADLINES, min=0.0)
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Ask an OpenAI-compatible server as many clients would, and tell what it was like for them.

    TTFT: from sending to the first event with tokens; ITL: gaps between such events; TPOT: mean time of a further
    token; goodput: requests/s that met all targets. The exit code is 1 if any request failed. docs/BENCH.md has more.
    """
    from cluster.bench.figures import Targets
    from cluster.bench.from_trace import Scale
    from cluster.bench.playing import Pace
    from cluster.bench.plots import check_can_plot, check_can_write
    from cluster.bench.running import Plan
    from cluster.bench.sending import Deadlines
    from cluster.bench.synthetic import RandomWorkload
    from cluster.bench.workload import num_requests
    from cluster.bench.workloads import Wanted, workloads

    if url is not None and base_url is not None:
        raise ConfigError("--base-url: wanted either it or --url, which is the same, saw both")
    if dataset_path is not None and dataset_name != "random":
        raise ConfigError(f"--dataset-name: wanted either it or --dataset-path, saw {dataset_name} and {dataset_path}")
    if plot is not None:
        check_can_plot(plot)
    if output is not None:
        check_can_write("--output", output)
    wanted = Wanted(
        dataset=dataset_path or dataset_name,
        num_prompts=num_prompts,
        num_sessions=num_sessions,
        turns=turns,
        random=RandomWorkload(
            num_sessions=1,
            input_len=random_input_len,
            output_len=random_output_len,
            range_ratio=random_range_ratio,
            prefix_len=random_prefix_len,
            num_prefixes=num_prefixes,
            think_s=think_time_s,
            vocab_size=vocab_size,
        ),
        scale=Scale(
            block_tokens=block_tokens,
            max_prompt_tokens=max_prompt_len,
            max_output_tokens=max_output_len,
            max_turns=turns,
            speed=speed,
            vocab_size=vocab_size,
        ),
        request_rate=request_rate,
        arrivals=arrivals,
        seed=seed,
    )
    plan = Plan(
        repeats=repeats,
        num_warmups=num_warmups,
        pace=Pace(max_concurrency=max_concurrency, limit_s=max_seconds),
        deadlines=Deadlines(request_s=timeout_s, silence_s=silence_s, ready_s=ready_check_timeout_sec),
        targets=Targets(None if ttft is None else ttft / 1e3, None if itl is None else itl / 1e3),
        percentiles=_ranks(percentiles),
        salt=secrets.token_hex(8),
    )
    first = server_of(url or base_url, api_key, api_key_file)
    servers = [(first, model)]
    if against is not None:
        keys = api_keys(str(against_api_key_file)) if against_api_key_file is not None else ()
        servers.append((Server(against.rstrip("/"), next(iter(keys), None)), against_model or model))
    style = _Style(endpoint, prompts, ignore_eos, _object("--extra-body", extra_body))
    make = workloads(wanted)
    total = num_requests(make(-1))  # what is wrong with a workload is told before a server is asked
    try:
        sides = asyncio.run(_measured(servers, style, make, plan, total))
    except KeyboardInterrupt:
        _err.print("kvray: stopped")
        raise typer.Exit(_INTERRUPTED) from None
    given = {
        "dataset": str(wanted.dataset),
        "num_prompts": num_prompts,
        "num_sessions": num_sessions,
        "turns": turns,
        "request_rate": None if math.isinf(request_rate) else request_rate,
        "max_concurrency": max_concurrency,
        "seed": seed,
        "ttft_ms": ttft,
        "itl_ms": itl,
    }
    _tell(sides, given, _Telling(output=output, plot=plot, is_detailed=detailed, as_json=as_json))


class _Style(NamedTuple):
    """How drawn turns are written, whoever is asked."""

    path: str
    form: Literal["ids", "text"]
    ignores_eos: bool
    extra: dict[str, Any]


class _Telling(NamedTuple):
    """Where results go."""

    output: Path | None
    plot: Path | None
    is_detailed: bool
    as_json: bool


async def _measured(
    servers: Sequence[tuple[Server, str | None]], style: _Style, make: Workloads, plan: Plan, num_requests: int
) -> list[Side]:
    """Find the models, and measure the servers; a bar shows how far it is."""
    from cluster.bench.running import run

    sides = [await _side(server, model, style, plan) for server, model in servers]
    if len(sides) == 2 and sides[0].name == sides[1].name:
        raise ConfigError(f"--against: wanted another server than {sides[0].url}, saw the same")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task = bar.add_task("warming up", total=num_requests * plan.repeats * len(sides))
        failed: Counter[tuple[str, int]] = Counter()

        def on_progress(name: str, number: int, num_done: int, num_failed: int) -> None:
            failed[name, number] = num_failed
            said = f", {failed.total()} failed" if failed.total() else ""
            where = f"{name}, " if len(sides) > 1 else ""
            bar.update(task, description=f"{where}{number + 1} of {plan.repeats}{said}", advance=min(1, num_done))

        await run(sides, make, plan, on_progress)
    return sides


async def _side(server: Server, wanted: str | None, style: _Style, plan: Plan) -> Side:
    from cluster.bench.bodies import Writing
    from cluster.bench.running import Side, found_model

    if not server.url.startswith(("http://", "https://")):
        raise ConfigError(f"wanted a URL such as http://127.0.0.1:8000, saw {server.url!r}")
    where = urlsplit(server.url)
    if where.username or where.password:
        raise ConfigError("wanted a URL without a name and password, which results would show: --api-key is for keys")
    name, owner = await found_model(server.url, server.api_key, wanted, plan.deadlines)
    writing = Writing(
        model=name,
        path=style.path,
        form=style.form,
        ignores_eos=style.ignores_eos,
        has_token_ids=owner in ("kvray", "vllm"),
        has_sources=owner == "kvray",
        extra=style.extra,
    )
    return Side(where.netloc, server.url, server.api_key, writing)


def _tell(sides: Sequence[Side], given: dict[str, Any], telling: _Telling) -> None:
    """Print and write what was found; leave with 1 if any request failed."""
    from cluster.bench import report

    document = report.document(sides, given, is_detailed=telling.is_detailed)
    if telling.output is not None:
        try:
            telling.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output: {telling.output} cannot be written: {error.strerror}") from None
    if telling.plot is not None:
        from cluster.bench.plots import plot

        plot(sides, telling.plot)
    if telling.as_json:
        print(json.dumps(document, indent=2))  # noqa: T201 - machine-readable output
    else:
        _out.print(report.table(sides))
    for line in report.lines(sides):
        _err.print(f"kvray: {line}", markup=False)
    if report.num_failed(sides):
        raise typer.Exit(1)


def _ranks(text: str) -> tuple[float, ...]:
    try:
        ranks = tuple(float(part) for part in text.split(","))
    except ValueError:
        ranks = (-1.0,)
    if not all(0 <= rank <= 100 for rank in ranks):
        raise ConfigError(f"--metric-percentiles: wanted numbers from 0 to 100, with commas between, saw {text!r}")
    return ranks


def _object(flag: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: wanted a JSON object, saw {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{flag}: wanted a JSON object, saw {text!r}")
    return found
