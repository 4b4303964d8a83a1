"""The command line: kvray serve, demo, status, cache, explain, plan, bench, dashboard, doctor, config, version."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
import yaml
from rich.console import Console
from rich.markup import escape
from typer import core

from cluster import explain_cli, options, prefix_cli
from cluster.bench_cli import bench_app
from cluster.cache_cli import cache_app
from cluster.client import ApiKey, ApiKeyFile, AsJson, Interval, Server, Url, Watch, asked, server_of
from cluster.config import KvrayConfig, drop_service_links, load_config
from cluster.credentials import api_keys
from cluster.doctor.command import doctor
from cluster.log_tail import terminal_line
from cluster.logs import configure_logging
from cluster.plan_cli import plan_command
from cluster.ray_dashboard.cli import dashboard_app
from cluster.ready_lines import ready_lines
from cluster.vllm_flags import translated
from messages.errors import ConfigError, KvrayError

logger = logging.getLogger("cluster.cli")  # not __name__, which is __main__ under python -m

_SETTINGS: Any = {"no_args_is_help": True, "context_settings": {"help_option_names": ["-h", "--help"]}}
app = typer.Typer(**_SETTINGS, pretty_exceptions_enable=False)
config_app = typer.Typer(**_SETTINGS, help="Show or check a configuration.")
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")
app.add_typer(dashboard_app, name="dashboard")
app.command("plan")(plan_command)
app.add_typer(bench_app, name="bench")
cache_app.command("export")(prefix_cli.export)
cache_app.command("import")(prefix_cli.take_in)
app.command()(explain_cli.explain)
app.command()(doctor)

_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

_STATUS_TIMEOUT_S = 10.0


class _ServeCommand(core.TyperCommand):
    """`kvray serve`, which takes the flags of `vllm serve` that mean the same, and answers the others."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what the arguments mean here."""
        known = {
            name: not getattr(parameter, "is_flag", False)
            for parameter in self.get_params(ctx)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        said = translated(args, known)
        if said.refusals and not ctx.resilient_parsing:
            for line in said.refusals:
                _err.print(f"kvray: {line}", markup=False)
            raise typer.Exit(2)
        return super().parse_args(ctx, said.arguments)


def main() -> None:
    """Run the command line; a ConfigError is one line on stderr and exit code 2."""
    drop_service_links()
    try:
        app(prog_name="kvray")
    except KvrayError as error:
        sys.exit(_complain(error))


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"kvray {package_version('kvray')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def everywhere(
    *,
    is_version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            help="Print the version, and exit.",
            callback=_show_version,
            is_eager=True,
            show_default="no",
        ),
    ] = False,
) -> None:
    """Serve large language models on a Ray cluster, prefill and decode disaggregated, over the OpenAI API."""


@app.command(cls=_ServeCommand)
def serve(
    model: options.Model = None,
    config: options.ConfigFile = None,
    served_model_name: options.ServedNames = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_model_len: options.MaxModelLen = None,
    tool_call_parser: options.ToolCallParser = None,
    reasoning_parser: options.ReasoningParser = None,
    chat_template: options.ChatTemplate = None,
    tokenizer_rules: options.TokenizerRules = None,
    prefill: options.Prefill = None,
    decode: options.Decode = None,
    threads: options.Threads = None,
    block_size: options.BlockSize = None,
    kv_cache_memory: options.KvCacheMemory = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    host_memory: options.HostMemory = None,
    disk_dir: options.DiskDir = None,
    disk_capacity: options.DiskCapacity = None,
    remote: options.Remote = None,
    remote_compression: options.RemoteCompression = None,
    host: options.Host = None,
    port: options.Port = None,
    api_key: options.ServerApiKey = None,
    api_key_file: options.ServerApiKeyFile = None,
    allowed_origins: options.AllowedOrigins = None,
    access_log: options.AccessLog = None,
    log_level: options.LogLevel = None,
    log_format: options.LogFormat = None,
) -> None:
    """Serve MODEL over the OpenAI API, disaggregated; in the foreground until Ctrl-C.

    What counts, first to last: flags, KVRAY_... variables, the YAML file (--config), defaults. Flags of `vllm serve`
    are taken where they mean the same. All settings: `kvray config show`.
    """
    chosen = _overrides(
        {
            ("model", "path"): model,
            ("model", "dtype"): dtype,
            ("model", "device"): device,
            ("model", "max_model_len"): max_model_len,
            ("model", "served_names"): served_model_name or None,
            ("model", "tool_parser"): tool_call_parser,
            ("model", "reasoning_parser"): reasoning_parser,
            ("model", "chat_template"): None if chat_template is None else str(chat_template.resolve()),
            ("model", "tokenizer_rules"): tokenizer_rules,
            ("engine", "block_size"): block_size,
            ("engine", "kv_cache_memory"): kv_cache_memory,
            ("engine", "gpu_memory_utilization"): gpu_memory_utilization,
            ("tiers", "host_memory"): host_memory,
            ("tiers", "disk_dir"): None if disk_dir is None else str(disk_dir.resolve()),
            ("tiers", "disk_capacity"): disk_capacity,
            ("tiers", "remote"): remote,
            ("tiers", "remote_compression"): remote_compression,
            ("engine", "max_num_seqs"): max_num_seqs,
            ("engine", "max_num_batched_tokens"): max_num_batched_tokens,
            ("engine", "num_threads"): threads,
            ("pools", "prefill"): prefill,
            ("pools", "decode"): decode,
            ("http", "host"): host,
            ("http", "port"): port,
            ("http", "api_keys"): api_key or None,
            ("http", "api_key_file"): None if api_key_file is None else str(api_key_file.resolve()),
            ("http", "allowed_origins"): _listed("--allowed-origins", allowed_origins or ()) or None,
            ("log", "level"): log_level,
            ("log", "format"): log_format,
            ("http", "access_log"): access_log,
        }
    )
    _run(load_config(config, chosen), _serve_until_stopped)


@app.command()
def demo(
    port: options.Port = None,
    prefill: options.Prefill = None,
    decode: options.Decode = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON line for each question.", show_default="for people")
    ] = False,
) -> None:
    """Start, hold a conversation of three turns, show where each prompt's tokens came from, and exit."""
    chosen = _overrides(
        {
            ("http", "port"): port,
            ("pools", "prefill"): prefill,
            ("pools", "decode"): decode,
            ("http", "access_log"): False,
        }
    )
    api_key = next(iter(api_keys(None)), None)
    _run(load_config(None, chosen), functools.partial(_hold_conversation, api_key=api_key, as_json=as_json))


@app.command()
def status(
    url: Url = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
    is_watching: Watch = False,
    interval_s: Interval = 2.0,
) -> None:
    """Show what is running where: workers, tiers, hits, the queue."""
    server = server_of(url, api_key, api_key_file)
    if is_watching:
        from cluster.status_watch import watch

        watch(functools.partial(_fetch_status, server), server.url, _out, interval_s, as_json=as_json)
        return
    document = _fetch_status(server)
    if as_json:
        _print_json(document)
    else:
        from cluster.status import status_table

        _out.print(status_table(document), markup=False)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version of this package."""
    if as_json:
        _print_json({"version": package_version("kvray")})
    else:
        print(package_version("kvray"))  # noqa: T201


@config_app.command("show")
def config_show(config: options.ConfigFile = None, as_json: AsJson = False) -> None:
    """Print the whole configuration, defaults filled in; keys are masked."""
    document = msgspec.to_builtins(load_config(config, {}))
    document["http"]["api_keys"] = ["***" for _ in document["http"]["api_keys"]]
    if as_json:
        _print_json(document)
    else:
        print(yaml.safe_dump(_plain(document), sort_keys=False), end="")  # noqa: T201


@config_app.command("check")
def config_check(
    config: Annotated[Path, typer.Argument(help="YAML file.", show_default="none")], as_json: AsJson = False
) -> None:
    """Say whether a configuration file is good; exit code 2 if not."""
    load_config(config, {})
    if as_json:
        _print_json({"file": str(config), "is_good": True})
    else:
        _out.print(f"{config}: good")


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))  # noqa: T201 - machine-readable output


def _fetch_status(server: Server) -> dict[str, Any]:
    """Return the status document that the kvray there gives.

    Raises:
        ConfigError: nobody answers there, or something that is no kvray.
    """
    with asked(server, "/status", "status", _STATUS_TIMEOUT_S) as response:
        document = json.load(response)
    if not isinstance(document, dict) or not {"workers", "routers", "is_routing_by_cache"} <= document.keys():
        raise ConfigError(f"no status from {server.url}: what answers there is not kvray; where does it serve? (--url)")
    return document


def _listed(flag: str, values: Sequence[str]) -> list[str]:
    """Return what a flag was given: values, each of which may be a JSON list of them.

    Raises:
        ConfigError: one begins as such a list does, and is none.
    """
    found: list[str] = []
    joined = " ".join(values)  # a variable is taken apart at its spaces
    if joined.startswith("["):
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(joined, type=list[str])
    for value in values:
        if not value.startswith("["):
            found.append(value)
            continue
        try:
            found += msgspec.json.decode(value, type=list[str])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{flag}: wanted a JSON list of strings, saw {value}: {error}") from None
    return found


def _overrides(flags: dict[tuple[str, str], Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for (section, key), value in flags.items():
        if value is not None:
            document.setdefault(section, {})[key] = value
    return document


def _plain(value: Any) -> Any:
    """Turn tuples into lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _run(config: KvrayConfig, body: Callable[[KvrayConfig, Any, Any], None]) -> NoReturn:
    """Check, start, do `body` while it serves, end everything, and leave with the exit code."""
    configure_logging(config.log.level, config.log.format)
    from cluster.launch import Stopped, running, stop_signals
    from cluster.model_argument import model_directory
    from cluster.span_export import check_exporter

    code = 0
    with stop_signals() as stop:
        try:
            check_exporter(config.observability.otlp_endpoint)
            with _Progress(config.log.format) as progress:
                directory = model_directory(config.model.path, stop, progress.show)
                model = msgspec.structs.replace(config.model, path=str(directory))
                config = msgspec.structs.replace(config, model=model)
                check_model_files(directory, config.model.chat_template)
                with running(config, stop, progress.show, progress.show_line) as launched:
                    progress.clear()
                    body(config, launched, stop)
        except Stopped:
            _err.print("kvray: stopped while starting")
        except KvrayError as error:
            code = _complain(error)
        except Exception:  # the edge: a bug ends with its traceback in the log and exit code 1
            logger.exception("unexpected")
            code = 1
    sys.exit(code)


def _complain(error: KvrayError) -> int:
    """Print one line about `error` on stderr; return the exit code."""
    _err.print(f"kvray: {' '.join(error.message.split())}", markup=False)
    return 2 if isinstance(error, ConfigError) else 1


def _serve_until_stopped(config: KvrayConfig, launched: Any, stop: Any) -> None:
    lines = ready_lines(
        config,
        launched.url,
        launched.workers,
        wants_api_key=launched.wants_api_key,
        is_own_cluster=launched.is_own_cluster,
        log_dir=launched.log_dir,
    )
    for line in lines:
        _out.print(line, markup=False)
    launched.wait(stop)
    logger.info("ending what was started")


def _hold_conversation(_config: KvrayConfig, launched: Any, stop: Any, *, api_key: str | None, as_json: bool) -> None:
    from cluster.demo.conversation import hold_conversation

    hold_conversation(launched.url, api_key, _out, stop, as_json=as_json)


def check_model_files(path: Path, chat_template: str | None = None) -> None:
    """Check of a model directory, and of a chat template, what can be told without torch: most mistakes show at once.

    Raises:
        ConfigError: files in it are missing or broken; one line that says which.
    """
    from engine.model.checkpoint import weight_files
    from text.json_file import read_json
    from text.tokenizer import Tokenizer

    try:
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is no transformers model directory: it has no config.json")
        read_json(path / "config.json")
        Tokenizer.load(path, chat_template=chat_template)
        weight_files(path)
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be read: {error.strerror}") from None


class _Progress:
    """On a terminal one line that changes, below what processes write; elsewhere a log line per change."""

    def __init__(self, style: str) -> None:
        self._style = style
        self._last = ""
        self._status = _err.status("") if _err.is_terminal else None

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Show `text`, which says what happens now."""
        if text == self._last:
            return
        self._last = text
        if self._status is not None:
            self._status.update(escape(text))
        else:
            logger.info("%s", text)

    def show_line(self, name: str, line: str) -> None:
        """Show a line that the process called `name` has written."""
        text = terminal_line(name, line, self._style)
        with contextlib.suppress(OSError):  # whoever read it went, and what serves goes on
            if self._status is not None:
                _err.print(text, markup=False)  # above the line that changes
            else:
                print(text, file=sys.stderr, flush=True)  # noqa: T201 - it is one log line, or a part of one

    def clear(self) -> None:
        """Clear the line that changes: nothing more happens, or something else is to be printed."""
        if self._status is not None:
            self._status.stop()
            self._status = None


if __name__ == "__main__":
    main()
