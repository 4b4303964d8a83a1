"""The options of `kvray serve`: what each is called, says, and is where nothing is given.

A flag has the variable KVRAY_ and its name, in capitals, beside it. What counts, first to last: the flag, the variable,
the YAML file, the default, which is the configuration's own (`cluster/config.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cluster.config import KvrayConfig
from cluster.openai.call_formats import FORMATS
from cluster.openai.thought_formats import THOUGHT_FORMATS

_DEFAULTS: Final = KvrayConfig()
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}

_MODEL: Final = "Model"
_WORKERS: Final = "Workers"
_ENGINE: Final = "Engine"
_TIERS: Final = "Cache tiers"
_HTTP: Final = "HTTP"
_LOG: Final = "Logs"


def variable(flag: str) -> str:
    """Return the variable of the environment beside `flag`: KVRAY_MAX_MODEL_LEN for --max-model-len."""
    return f"KVRAY_{flag.removeprefix('--').replace('-', '_').upper()}"


def _option(flag: str, text: str, panel: str, default: str | None, **more: Any) -> Any:
    """Make an option that says `default`; None: what the configuration's setting named in `place` is by default."""
    flags = [flag, *more.pop("also", ())]
    place = more.pop("place", None)
    if default is None:
        section, _, key = place.partition(".")
        default = str(getattr(getattr(_DEFAULTS, section), key))
    return typer.Option(
        *flags, help=text, rich_help_panel=panel, show_default=default, envvar=variable(flag.partition("/")[0]), **more
    )


def _setting(place: str, flag: str, text: str, panel: str, default: str | None = None, **more: Any) -> Any:
    """Make the option for the configuration's `place`, section.key."""
    return _option(flag, text, panel, default, place=place, **more)


def count(text: str) -> int:
    """Read a number of tokens, as vLLM does: 32k is 32,000, 32K is 32,768."""
    found = re.fullmatch(r"(-?\d{1,18}(?:\.\d{1,18})?)([kmgKMG]?)", text.strip())
    if found is None or (not found[2] and "." in found[1]):
        raise typer.BadParameter(f"wanted a number of tokens such as 4096, 32k or 32K, saw {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


Model = Annotated[
    str | None,
    typer.Argument(
        help="A transformers model directory, a GGUF file, or smollm2.",
        show_default="the demo model",
        envvar="KVRAY_MODEL",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of the configuration; variables override it, flags override both.",
        show_default="none",
        envvar=variable("--config"),
    ),
]

ServedNames = Annotated[
    list[str] | None,
    _setting(
        "model.served_names",
        "--served-model-name",
        "A name that clients may use; once for each (in the variable: with spaces between).",
        _MODEL,
        "the directory's name",
    ),
]
Dtype = Annotated[
    str | None,
    _setting(
        "model.dtype",
        "--dtype",
        "auto (as stored, or float32 on a CPU that would emulate it), float32, bfloat16, float16.",
        _MODEL,
    ),
]
Device = Annotated[str | None, _setting("model.device", "--device", "auto (a GPU if there is one), cpu, cuda.", _MODEL)]
MaxModelLen = Annotated[
    int | None,
    _setting(
        "model.max_model_len",
        "--max-model-len",
        "Tokens of prompt and output together; 32k is 32,000, 32K is 32,768.",
        _MODEL,
        "what the model was made for",
        parser=count,
        metavar="TOKENS",
    ),
]
ToolCallParser = Annotated[
    str | None,
    _setting(
        "model.tool_parser",
        "--tool-call-parser",
        f"How it writes tool calls: {', '.join(FORMATS)}.",
        _MODEL,
        "as its chat template shows",
    ),
]
ReasoningParser = Annotated[
    str | None,
    _setting(
        "model.reasoning_parser",
        "--reasoning-parser",
        f"How it writes thoughts: {', '.join(THOUGHT_FORMATS)}.",
        _MODEL,
        "as its chat template shows",
    ),
]
ChatTemplate = Annotated[
    Path | None,
    _setting(
        "model.chat_template", "--chat-template", "A Jinja file, for prompts of chats.", _MODEL, "the model's own"
    ),
]
TokenizerRules = Annotated[
    str | None,
    _setting(
        "model.tokenizer_rules",
        "--tokenizer-rules",
        "Of LlamaTokenizer: transformers, or file, as tokenizer.json says.",
        _MODEL,
        "transformers",
    ),
]

Prefill = Annotated[int | None, _setting("pools.prefill", "--prefill", "Prefill workers.", _WORKERS)]
Decode = Annotated[int | None, _setting("pools.decode", "--decode", "Decode workers.", _WORKERS)]
Threads = Annotated[
    int | None,
    _setting(
        "engine.num_threads",
        "--threads",
        "CPU threads of a worker's step, at most.",
        _WORKERS,
        "all cores, shared by who computes",
    ),
]

BlockSize = Annotated[int | None, _setting("engine.block_size", "--block-size", "Tokens per KV block.", _ENGINE)]
KvCacheMemory = Annotated[
    str | None,
    _setting(
        "engine.kv_cache_memory",
        "--kv-cache-memory",
        "For KV blocks, of each worker, e.g. 2GiB.",
        _ENGINE,
        f"{_DEFAULTS.engine.kv_cache_share:.0%} of what is free at the start; on GPUs by --gpu-memory-utilization",
    ),
]
GpuMemoryUtilization = Annotated[
    float | None,
    _setting(
        "engine.gpu_memory_utilization",
        "--gpu-memory-utilization",
        "Of a GPU's memory, what a worker uses in all, unless --kv-cache-memory is given.",
        _ENGINE,
    ),
]
MaxNumSeqs = Annotated[
    int | None, _setting("engine.max_num_seqs", "--max-num-seqs", "Running sequences per worker, at most.", _ENGINE)
]
MaxNumBatchedTokens = Annotated[
    int | None,
    _setting(
        "engine.max_num_batched_tokens",
        "--max-num-batched-tokens",
        "Tokens of one step, at most; 8k is 8,000, 8K is 8,192.",
        _ENGINE,
        parser=count,
        metavar="TOKENS",
    ),
]

HostMemory = Annotated[
    str | None,
    _setting(
        "tiers.host_memory",
        "--host-memory",
        "KV kept in memory of each node, e.g. 8GiB; auto: a tenth of what is free, up to 1GiB.",
        _TIERS,
        "none; auto above other tiers",
    ),
]
DiskDir = Annotated[
    Path | None, _setting("tiers.disk_dir", "--disk-dir", "KV kept on disk of each node, there.", _TIERS, "none")
]
DiskCapacity = Annotated[
    str | None, _setting("tiers.disk_capacity", "--disk-capacity", "Of --disk-dir, on each node.", _TIERS)
]
Remote = Annotated[
    str | None,
    _setting(
        "tiers.remote",
        "--remote",
        "KV kept where all nodes reach it: a directory, s3://bucket/prefix, gs://...",
        _TIERS,
        "none",
    ),
]
RemoteCompression = Annotated[
    str | None,
    _setting(
        "tiers.remote_compression",
        "--remote-compression",
        "Of what is written there: off, lossless, int8 (changes KV a little).",
        _TIERS,
    ),
]

Host = Annotated[
    str | None, _setting("http.host", "--host", "Address to listen on; 0.0.0.0: all of this machine's.", _HTTP)
]
Port = Annotated[int | None, _setting("http.port", "--port", "Port to listen on.", _HTTP)]
ServerApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        help="A key that clients must have; once for each. Every user sees it in `ps`.",
        rich_help_panel=_HTTP,
        show_default="KVRAY_API_KEY; without: everybody is served",
    ),
]
ServerApiKeyFile = Annotated[
    Path | None,
    _setting("http.api_key_file", "--api-key-file", "File of API keys, one a line.", _HTTP, "KVRAY_API_KEY"),
]
AllowedOrigins = Annotated[
    list[str] | None,
    _setting(
        "http.allowed_origins",
        "--allowed-origins",
        "Whose pages may call from a browser (CORS): https://chat.example.com, or *; several times, or as a JSON list.",
        _HTTP,
        "none",
    ),
]
AccessLog = Annotated[
    bool | None,
    _setting(
        "http.access_log",
        "--access-log/--no-access-log",
        "A line for each HTTP request.",
        _LOG,
        "access-log",
    ),
]
LogLevel = Annotated[
    str | None, _setting("log.level", "--log-level", "debug, info, warning, error: of all processes.", _LOG)
]
LogFormat = Annotated[
    str | None, _setting("log.format", "--log-format", "text, or json: an object for each line.", _LOG)
]
