"""The command line: kvray serve, demo, status, cache, config, version."""

from __future__ import annotations

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

from cluster import prefix_cli
from cluster.cache_cli import cache_app
from cluster.client import DEFAULT_URL, ApiKey, ApiKeyFile, AsJson, Url, asked, key_of
from cluster.config import KvrayConfig, load_config, num_ingresses
from cluster.credentials import api_keys
from cluster.logs import configure_logging
from cluster.openai.call_formats import FORMATS
from cluster.openai.thought_formats import THOUGHT_FORMATS
from messages.errors import ConfigError, KvrayError

logger = logging.getLogger("cluster.cli")  # not __name__, which is __main__ under python -m

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Show or check a configuration.")
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")
cache_app.command("export")(prefix_cli.export)
cache_app.command("import")(prefix_cli.take_in)

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

_STATUS_TIMEOUT_S = 10.0

_ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; flags override it.")]


def main() -> None:
    """Run the command line; a ConfigError is one line on stderr and exit code 2."""
    try:
        app()
    except KvrayError as error:
        sys.exit(_complain(error))


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="A transformers model directory; default: the demo.")] = None,
    config: _ConfigFile = None,
    prefill: Annotated[int | None, typer.Option("--prefill", help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option("--decode", help="Decode workers.")] = None,
    host: Annotated[str | None, typer.Option("--host")] = None,
    port: Annotated[int | None, typer.Option("--port")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda.")] = None,
    max_model_len: Annotated[int | None, typer.Option("--max-model-len", help="Tokens, prompt and output.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option("--served-model-name")] = None,
    api_key: Annotated[list[str] | None, typer.Option("--api-key", help="Every user sees it in `ps`.")] = None,
    api_key_file: ApiKeyFile = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origins",
            help="Whose pages may call from a browser (CORS): https://chat.example.com, or *; several times, or as a"
            " JSON list; default: none.",
        ),
    ] = None,
    block_size: Annotated[int | None, typer.Option("--block-size", help="Tokens per KV block.")] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option("--kv-cache-memory", help="Per worker, e.g. 2GiB; default: a share of what is free.")
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory", help="KV kept in memory of each node, e.g. 8GiB; auto: a tenth of it, up to 1GiB."
        ),
    ] = None,
    disk_dir: Annotated[Path | None, typer.Option("--disk-dir", help="KV kept on disk of each node, there.")] = None,
    disk_capacity: Annotated[
        str | None, typer.Option("--disk-capacity", help="Of --disk-dir; default: 100GiB.")
    ] = None,
    remote: Annotated[
        str | None,
        typer.Option("--remote", help="KV kept where all nodes reach it: a directory, s3://bucket/prefix, gs://..."),
    ] = None,
    remote_compression: Annotated[
        str | None,
        typer.Option("--remote-compression", help="off, lossless (the default), int8 (changes KV a little)."),
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option("--max-num-seqs", help="Running sequences per worker.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option("--max-num-batched-tokens")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads per worker.")] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            "--tool-call-parser", help=f"How it writes tool calls; default: as its template does. {', '.join(FORMATS)}."
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(
            "--reasoning-parser",
            help=f"How it writes thoughts; default: as its template does. {', '.join(THOUGHT_FORMATS)}.",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="A Jinja file instead of the model's own template.")
    ] = None,
    log_level: Annotated[str | None, typer.Option("--log-level")] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="text or json.")] = None,
) -> None:
    """Serve MODEL over the OpenAI API, disaggregated; in the foreground until Ctrl-C."""
    chosen = _overrides(
        {
            ("model", "path"): None if model is None else str(Path(model).resolve()),
            ("model", "dtype"): dtype,
            ("model", "device"): device,
            ("model", "max_model_len"): max_model_len,
            ("model", "served_names"): served_model_name or None,
            ("model", "tool_parser"): tool_call_parser,
            ("model", "reasoning_parser"): reasoning_parser,
            ("model", "chat_template"): None if chat_template is None else str(chat_template.resolve()),
            ("engine", "block_size"): block_size,
            ("engine", "kv_cache_memory"): kv_cache_memory,
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
        }
    )
    _run(load_config(config, chosen), _serve_until_stopped)


@app.command()
def demo(
    port: Annotated[int, typer.Option("--port")] = 8000,
    prefill: Annotated[int, typer.Option("--prefill")] = 1,
    decode: Annotated[int, typer.Option("--decode")] = 1,
) -> None:
    """Start, hold a conversation of three turns, show where each prompt's tokens came from, and exit."""
    overrides = {"http": {"port": port}, "pools": {"prefill": prefill, "decode": decode}}
    _run(load_config(None, overrides), functools.partial(_hold_conversation, api_key=next(iter(api_keys(None)), None)))


@app.command()
def status(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what is running where."""
    document = _fetch_status(url.rstrip("/"), key_of(api_key, api_key_file))
    if as_json:
        print(json.dumps(document, indent=2))  # noqa: T201 - machine-readable output
    else:
        from cluster.status import status_table

        _out.print(status_table(document), markup=False)


@app.command()
def version() -> None:
    """Print the version of this package."""
    print(package_version("kvray"))  # noqa: T201


@config_app.command("show")
def config_show(config: _ConfigFile = None) -> None:
    """Print the whole configuration, defaults filled in; keys are masked."""
    document = msgspec.to_builtins(load_config(config, {}))
    document["http"]["api_keys"] = ["***" for _ in document["http"]["api_keys"]]
    print(yaml.safe_dump(_plain(document), sort_keys=False), end="")  # noqa: T201


@config_app.command("check")
def config_check(config: Annotated[Path, typer.Argument(help="YAML file.")]) -> None:
    """Say whether a configuration file is good; exit code 2 if not."""
    load_config(config, {})
    _out.print(f"{config}: good")


def _fetch_status(url: str, api_key: str | None) -> dict[str, Any]:
    """Return the status document that the kvray at `url` gives.

    Raises:
        ConfigError: nobody answers there, or something that is no kvray.
    """
    with asked(url, "/status", api_key, "status", _STATUS_TIMEOUT_S) as response:
        document = json.load(response)
    if not isinstance(document, dict) or not {"workers", "routers", "is_routing_by_cache"} <= document.keys():
        raise ConfigError(f"no status from {url}: what answers there is not kvray; where does it serve? (--url)")
    return document


def _listed(flag: str, values: Sequence[str]) -> list[str]:
    """Return what a flag was given: values, each of which may be a JSON list of them.

    Raises:
        ConfigError: one begins as such a list does, and is none.
    """
    found: list[str] = []
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

    code = 0
    with stop_signals() as stop:
        try:
            check_model_files(Path(config.model.path), config.model.chat_template)
            with _Progress() as progress, running(config, stop, progress.show) as launched:
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
    from cluster.openai.call_recognition import tool_format
    from text.tokenizer import Tokenizer

    # which says so where calls are not recognised: what ingresses log of it is not seen here
    tool_format(Tokenizer.load(config.model.path, chat_template=config.model.chat_template), config.model.tool_parser)
    name = config.model.names[0]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    _out.print(f"kvray serves {name} at {launched.url}/v1", markup=False)
    key = " -H 'Authorization: Bearer ...'" if launched.wants_api_key else ""
    _out.print(
        f"  curl {launched.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'", markup=False
    )
    where = "Ray started here" if launched.is_own_cluster else "the Ray cluster that was there"
    pools = config.pools
    _out.print(
        f"  {pools.prefill} prefill, {pools.decode} decode, 1 router, {num_ingresses(pools)} ingress on {where}; "
        "`kvray status` says more. Ctrl-C ends everything.",
        markup=False,
    )
    launched.wait(stop)
    logger.info("ending what was started")


def _hold_conversation(_config: KvrayConfig, launched: Any, stop: Any, *, api_key: str | None) -> None:
    from cluster.demo.conversation import hold_conversation

    hold_conversation(launched.url, api_key, _out, stop)


def check_model_files(path: Path, chat_template: str | None = None) -> None:
    """Check of a model directory, and of a chat template, what can be told without torch: most mistakes show at once.

    Raises:
        ConfigError: there is no directory, or files in it are missing or broken; one line that says which.
    """
    from engine.model.checkpoint import weight_files
    from text.json_file import read_json
    from text.tokenizer import Tokenizer

    try:
        if not path.exists():
            raise ConfigError(f"no model directory at {path}")
        if not path.is_dir():
            raise ConfigError(f"{path} is a file, wanted a transformers model directory")
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is no transformers model directory: it has no config.json")
        read_json(path / "config.json")
        Tokenizer.load(path, chat_template=chat_template)
        weight_files(path)
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be read: {error.strerror}") from None


class _Progress:
    """On a terminal one line that changes; elsewhere a log line per change."""

    def __init__(self) -> None:
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

    def clear(self) -> None:
        """Clear the line that changes: nothing more happens, or something else is to be printed."""
        if self._status is not None:
            self._status.stop()


if __name__ == "__main__":
    main()
