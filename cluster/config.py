"""Configuration: one YAML document into frozen, composed values. The only reader of os.environ.

    model:   the model that is served
    engine:  how one worker computes
    pools:   how many workers of each kind, and what they reserve
    http:    where clients are served, and what a request may ask for
    connections:  what clients may hold of an ingress
    responses:    what an ingress keeps of /v1/responses
    network: the channels between processes, and the roads between pools
    tiers:   where KV goes that no pool has room for
    tenants: who shares the cluster and not the cache, and how much of the tiers each may take
    log:     how much is logged, and in which form
    observability: what is counted, for whom
    autoscaling:  how many workers there may be beyond those of pools, and what for

An unknown key is an error that names it. What counts, first to last: flags of the command line, the KVRAY_... variables
beside them (`cluster/options.py`), the file, defaults.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from cluster.config_refusals import refusal, shown
from cluster.openai.call_formats import FORMATS
from cluster.openai.thought_formats import THOUGHT_FORMATS
from messages.errors import ConfigError
from text.llama_tokenizer import TokenizerRules

DEMO_MODEL = Path(__file__).parent / "demo" / "kvray-demo"  #: shipped with the package; the default of `kvray serve`

_CORES_FOR_TWO_INGRESSES = 4

AUTO_SIZE = "auto"  #: a size that is told on the spot
_SIZE_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s,*]+")

_ENDPOINT = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")

_Port = Annotated[int, Meta(ge=1, le=65535)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the document; an unknown key in it is an error."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, "***" if name == "api_keys" else getattr(self, name)) for name in self.__struct_fields__]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class ModelConfig(_Section, frozen=True):
    """The model that is served, and under which names."""

    path: str = str(DEMO_MODEL)  #: a transformers model directory, a GGUF file, or smollm2
    served_names: tuple[str, ...] = ()  #: names clients may use; empty: the directory's name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  #: auto: as stored, where the CPU computes in it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: tokens of prompt and output together; None: what the model was made for
    max_model_len: Annotated[int, Meta(ge=1, le=2**30)] | None = None
    #: how it writes tool calls, by vLLM's names (`kvray serve --help`); None: as its chat template shows it
    tool_parser: str | None = None
    #: how it writes thoughts, by vLLM's names; None: as its chat template shows it
    reasoning_parser: str | None = None
    chat_template: str | None = None  #: a file, read where an ingress runs; None: the model's own
    #: how texts are tokenized where transformers' class says otherwise than tokenizer.json, as LlamaTokenizer does
    tokenizer_rules: TokenizerRules = "transformers"

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which clients may call the model; never empty."""
        return self.served_names or (Path(self.path).resolve().name,)


class EngineSection(_Section, frozen=True):
    """How one worker computes."""

    block_size: Annotated[int, Meta(ge=1, le=1024)] = 16  #: tokens
    kv_cache_memory: str | None = None  #: per worker, e.g. "2GiB"; None: by one of the two below
    #: of the memory that is free when a worker on CPUs starts, where no size is given
    kv_cache_share: Annotated[float, Meta(ge=0.001, le=0.95)] = 0.25
    #: of a GPU's memory (or a worker's share of it), what a worker uses in all; KV gets what weights and steps leave
    gpu_memory_utilization: Annotated[float, Meta(ge=0.01, le=1)] = 0.9
    #: auto: as the model computes; fp8: float8 (e4m3), half of bfloat16, less exact: workers say by how much
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_num_seqs: Annotated[int, Meta(ge=1, le=65536)] = 256
    max_num_batched_tokens: Annotated[int, Meta(ge=1, le=2**20)] = 2048  #: budget of a step
    #: prefill chunks are cut so that running sequences wait no longer, where possible
    itl_target_ms: Annotated[float, Meta(ge=0.1, le=1e6)] = 50.0
    #: CPU threads of a step, at most; None: the node's cores, which its workers share by who has something to compute
    num_threads: Annotated[int, Meta(ge=1, le=4096)] | None = None
    kernels: Literal["auto", "off"] = "auto"  #: of our own: C++ on CPUs where built, Triton on GPUs; off: torch's


class PoolsConfig(_Section, frozen=True):
    """How many workers, and what each reserves from Ray."""

    prefill: Annotated[int, Meta(ge=0, le=4096)] = 1
    decode: Annotated[int, Meta(ge=1, le=4096)] = 1
    ingress: Annotated[int, Meta(ge=1, le=4096)] | None = None  #: None: 2, so that one may be lost, or 1 on few cores
    cpus_per_worker: Annotated[float, Meta(ge=0, le=4096)] = 0.0  #: of Ray's, which counts them and binds to none
    gpus_per_worker: Annotated[float, Meta(ge=0, le=64)] = 0.0  #: of Ray's, which shows a worker no others
    drain_timeout_s: Annotated[float, Meta(ge=0, le=86400)] = 120.0  #: a worker that is stopped may finish what it has
    #: load: without regard for who holds what of a prompt, and each worker on its own; to measure what `cache` brings
    routing: Literal["cache", "load"] = "cache"
    prefill_labels: dict[str, str] = {}  #: Ray label selector of the nodes for prefill workers
    decode_labels: dict[str, str] = {}  #: likewise, for decode workers


class HttpConfig(_Section, frozen=True):
    """Where clients are served, and what a request may ask for."""

    host: str = "127.0.0.1"
    port: _Port = 8000
    #: on a Ray of our own only: elsewhere a file, or KVRAY_API_KEY; none at all: open
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None  #: one key a line, read where an ingress runs; None: KVRAY_API_KEY of its node
    requires_api_key: bool = False  #: an ingress that finds no key does not start, where it would serve everybody
    #: whose pages may call from a browser (CORS): scheme://host[:port], or * for all; empty: none
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: Annotated[int, Meta(ge=1024, le=2**40)] = 8 * 2**20  #: of a request
    #: of a text that /tokenize takes, in UTF-8: it may give as many tokens, all of which are answered
    max_tokenize_bytes: Annotated[int, Meta(ge=1024, le=2**40)] = 768 * 2**10
    max_choices: Annotated[int, Meta(ge=1, le=4096)] = 128  #: largest n
    #: what requests say of keeping what is cached (`kvray.cache`); of tenants each one's own setting counts
    cache_hints: Literal["refuse", "use"] = "refuse"
    #: a request's priority: whoever may send one can put others behind, so that it counts only where clients agree
    client_priority: Literal["ignore", "use"] = "ignore"
    #: a request's own chat_template: a program that runs here without limits, so that it wants clients that are trusted
    client_chat_template: Literal["refuse", "use"] = "refuse"
    grammar_timeout_s: Annotated[float, Meta(ge=0.001, le=3600)] = 2.0  #: of processor time, to compile a grammar
    #: of structured output: compact, without a space; or with spaces, lines and indents, as the model writes it
    json_layout: Literal["compact", "pretty"] = "compact"
    #: a request whose first token is predicted to come later is refused (429), with or without a router
    max_ttft_s: Annotated[float, Meta(ge=0.1, le=1e7)] = 20.0
    request_timeout_s: Annotated[float, Meta(ge=0.1, le=1e7)] = 600.0  #: by then a request is ended, with an error
    access_log: bool = True  #: a line for each request, at info


class ConnectionsConfig(_Section, frozen=True):
    """What clients may hold of one ingress, where no proxy stands before it."""

    max_connections: Annotated[int, Meta(ge=1, le=2**20)] = 4096  #: that may be open at a time
    max_header_bytes: Annotated[int, Meta(ge=1024, le=2**24)] = 64 * 2**10  #: of a request's first line and headers
    #: of bodies that have begun to arrive and are not there as a whole, all together
    max_receiving_bytes: Annotated[int, Meta(ge=1024, le=2**40)] = 64 * 2**20
    header_timeout_s: Annotated[int, Meta(ge=1, le=3600)] = 10  #: from connecting, or a request's first byte
    body_timeout_s: Annotated[int, Meta(ge=1, le=86400)] = 60  #: from the end of the headers
    idle_timeout_s: Annotated[int, Meta(ge=1, le=86400)] = 90  #: after an answer; longer than clients keep theirs
    #: for which a client reads nothing of an answer that waits for it; then its request is cancelled
    unread_timeout_s: Annotated[int, Meta(ge=1, le=86400)] = 30


class ResponsesConfig(_Section, frozen=True):
    """What each ingress keeps of /v1/responses, in memory, for requests that go on from them."""

    memory: str = "64MiB"  #: of all of them; who has most loses first what is oldest
    max_responses: Annotated[int, Meta(ge=0, le=2**30)] = 10_000  #: 0: none are kept
    max_age_s: Annotated[float, Meta(ge=1, le=1e9)] = 86400.0  #: since it was kept


class NetworkConfig(_Section, frozen=True):
    """The channels between processes, and the roads between pools."""

    #: of 64 hex digits, or two such lines while one secret follows another, read by each process on its node; None:
    #: KVRAY_SECRET_FILE or KVRAY_SECRET of the node, else drawn at start on a Ray of our own
    secret_file: str | None = None
    host: str | None = None  #: where channels listen; None: the node's address, or loopback on a Ray of our own
    heartbeat_s: Annotated[float, Meta(ge=0.05, le=60)] = 0.5  #: between two words of a process that has nothing to say
    lost_after_s: Annotated[float, Meta(ge=0.2, le=600)] = 3.0  #: of silence
    #: how long prefill holds blocks for a decode worker that says nothing
    lease_s: Annotated[float, Meta(ge=0.5, le=3600)] = 15.0
    stall_s: Annotated[float, Meta(ge=0.05, le=3600)] = 5.0  #: a pull is given up when nothing arrived for so long
    #: what may be used
    roads: tuple[Literal["shm", "ucx", "socket", "plasma"], ...] = ("shm", "ucx", "socket", "plasma")
    port_range: tuple[_Port, _Port] = (20000, 20999)  #: roads listen within it, both ends included
    ucx_transports: str | None = None  #: as UCX_TLS; None: tcp, and what moves GPU memory where there is a GPU
    ucx_devices: tuple[str, ...] = ()  #: network devices of UCX beside the host's interface, e.g. mlx5_0:1
    #: from asking a prefill worker to its last handoff
    prefill_timeout_s: Annotated[float, Meta(ge=0.1, le=1e6)] = 120.0


class TiersConfig(_Section, frozen=True):
    """Where KV goes that no worker's pool has room for. What is not set costs nothing."""

    #: of each node, e.g. 8GiB; "auto": a tenth of what is free, at most 1 GiB; None: none, or auto above other tiers
    host_memory: str | None = None
    disk_dir: str | None = None  #: on each node: a directory for the blocks of this node
    disk_capacity: str = "100GiB"  #: of that directory, on each node
    remote: str | None = None  #: a URI that all nodes reach: a directory, s3://bucket/prefix, gs://bucket/prefix
    #: of what is written there. int8 changes KV a little, and what was kept without it is not used, in any tier
    remote_compression: Literal["off", "lossless", "int8"] = "lossless"

    @property
    def is_wanted(self) -> bool:
        """Whether there is any tier."""
        return any(value is not None for value in (self.host_memory, self.disk_dir, self.remote))


class TenantConfig(_Section, frozen=True):
    """One who shares no cached block with others. Quotas are of what its blocks take; None: no limit of its own."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  #: its blocks' names follow from it
    api_key_file: str  #: one key a line, several while one follows another; read where an ingress runs
    role: Literal["member", "operator"] = "member"  #: operators manage and see all that is cached
    cache_hints: Literal["refuse", "use"] = "refuse"  #: whether it may say in requests what is to be kept
    host_quota: str | None = None  #: of each node's host memory
    disk_quota: str | None = None  #: of each node's disk
    remote_quota: str | None = None  #: of the remote store, whoever wrote it there


class TenantsConfig(_Section, frozen=True):
    """Who shares the cluster and not the cache. Keys that are no member's are an operator's."""

    #: 64 hexadecimal digits, read where an ingress runs; None: KVRAY_TENANT_SALT_FILE or KVRAY_TENANT_SALT of its
    #: node. The same wherever one remote store is shared; with another one all that tenants have cached is lost to them
    salt_file: str | None = None
    members: tuple[TenantConfig, ...] = ()  #: one entry each


class LogConfig(_Section, frozen=True):
    """How much is logged, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class ObservabilityConfig(_Section, frozen=True):
    """What is gathered for people and their dashboards."""

    #: off: nothing is gathered that serving does not need, and there is no /metrics
    level: Literal["on", "off"] = "on"
    #: of so many requests each ingress, and the router, keeps what explains them, the newest ones; 0: of none
    explained_requests: Annotated[int, Meta(ge=0, le=100_000)] = 1000
    #: so many tenants, the first ones of tenants.members, are counted by name, all others together; 0: none is
    tenant_metrics: Annotated[int, Meta(ge=0, le=1000)] = 0
    #: of the beginnings of prompts that the placement page shows to who may see them; 0: no text is kept
    prompt_preview_chars: Annotated[int, Meta(ge=0, le=2000)] = 0
    #: where spans of requests go, whatever the level: OTLP over HTTP, http://HOST:4318 or a whole URL, by kvray[otel]
    otlp_endpoint: str | None = None


class AutoscalingConfig(_Section, frozen=True):
    """More workers while the load wants them, fewer again when it does not, never fewer than `pools` says."""

    max_prefill: Annotated[int, Meta(ge=1, le=4096)] | None = None  #: None: as many as pools.prefill, always
    max_decode: Annotated[int, Meta(ge=1, le=4096)] | None = None  #: None: as many as pools.decode, always
    ttft_s: Annotated[float, Meta(ge=0.01, le=3600)] = 2.0  #: time to first token that is aimed at, queue included
    itl_ms: Annotated[float, Meta(ge=0.1, le=1e5)] = 50.0  #: gap between tokens that is aimed at
    grow_after_s: Annotated[float, Meta(ge=0, le=3600)] = 3.0  #: for which more workers must have been wanted
    shrink_after_s: Annotated[float, Meta(ge=1, le=86400)] = 180.0  #: for which fewer must have done

    @property
    def is_wanted(self) -> bool:
        """Whether any number of workers follows the load."""
        return self.max_prefill is not None or self.max_decode is not None


class KvrayConfig(_Section, frozen=True):
    """The whole configuration document."""

    model: ModelConfig = ModelConfig()
    engine: EngineSection = EngineSection()
    pools: PoolsConfig = PoolsConfig()
    http: HttpConfig = HttpConfig()
    connections: ConnectionsConfig = ConnectionsConfig()
    responses: ResponsesConfig = ResponsesConfig()
    network: NetworkConfig = NetworkConfig()
    tiers: TiersConfig = TiersConfig()
    tenants: TenantsConfig = TenantsConfig()
    log: LogConfig = LogConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()


def parse_config(document: dict[str, Any]) -> KvrayConfig:
    """Make the configuration that `document` (from YAML or a serveConfigV2's args) describes.

    Raises:
        ConfigError: a key is unknown, a type wrong or a value impossible; says where, what was seen, what is wanted.
    """
    document = _spelled_out(document)
    try:
        config = msgspec.convert(document, KvrayConfig, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(refusal(KvrayConfig, document, str(error))) from None
    _check(config)
    return config


def load_config(path: Path | None, overrides: dict[str, Any]) -> KvrayConfig:
    """Read the file at `path` (None: all defaults) with `overrides` ({"http": {"port": 1}}) laid over it.

    Raises:
        ConfigError: there is no such file, it is not YAML, or `parse_config` refuses it.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"configuration file {path}: {error.strerror}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, no UTF-8, too deep
            raise ConfigError(f"configuration file {path} is not YAML: {' '.join(str(error).split())}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"configuration file {path}: wanted a mapping of sections, saw {shown(loaded)}")
        document = _spelled_out(loaded or {})
    for section, values in overrides.items():
        present = document.get(section)
        if present is None or isinstance(present, dict):  # anything else parse_config refuses
            document[section] = {**(present or {}), **values}
    return parse_config(document)


def _spelled_out(document: dict[str, Any]) -> dict[str, Any]:
    """Write `model: DIR`, as `serve run` passes it, as a section of `document`; leave out sections left empty.

    YAML reads `off` and `on` as false and true: where one of the words is wanted, it is meant.
    """
    document = {section: values for section, values in document.items() if values is not None}
    if isinstance(document.get("model"), str):
        document["model"] = {"path": document["model"]}
    sections = get_type_hints(KvrayConfig)
    for section, values in document.items():
        if isinstance(values, dict) and section in sections:
            kinds = get_type_hints(sections[section])
            document[section] = {name: _meant(value, kinds.get(name)) for name, value in values.items()}
    return document


def _meant(value: Any, kind: Any) -> Any:
    word = {False: "off", True: "on"}[value] if isinstance(value, bool) else None
    return word if word in get_args(kind) else value


_Credential = Literal[
    "KVRAY_SECRET", "KVRAY_SECRET_FILE", "KVRAY_API_KEY", "KVRAY_TENANT_SALT", "KVRAY_TENANT_SALT_FILE"
]


def environment_credential(name: _Credential) -> str | None:
    """Return what the environment of this process holds under `name`; None where it is unset or empty."""
    return os.environ.get(name) or None


def forget_credentials() -> None:
    """Take the credentials out of the environment, so that no process that is started from now on inherits them."""
    for name in get_args(_Credential):
        os.environ.pop(name, None)


def drop_service_links() -> None:
    """Take out of the environment what Kubernetes puts there of a Service named kvray, KVRAY_PORT=tcp://...."""
    for name, value in list(os.environ.items()):
        if name.startswith("KVRAY_") and re.match("(tcp|udp|sctp)://", value):
            del os.environ[name]


def parse_size(text: str) -> int:
    """Return the bytes that "512MiB", "2GiB", "1.5GB" or "1048576" stands for.

    Raises:
        ConfigError: `text` is no size.
    """
    unit = next((unit for unit in _SIZE_UNITS if text.endswith(unit)), "")
    try:
        value = float(text.removesuffix(unit)) * _SIZE_UNITS.get(unit, 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 2**60:
        raise ConfigError(f"wanted a size such as 512MiB or 2GiB, saw {text!r}")
    return int(value)


def num_ingresses(pools: PoolsConfig) -> int:
    """Return how many ingresses there are: as configured, else 2 where this machine has cores for them."""
    return pools.ingress or (2 if len(os.sched_getaffinity(0)) >= _CORES_FOR_TWO_INGRESSES else 1)


def prepare_environment(*, is_own_cluster: bool) -> None:
    """Set what Ray's processes need, before Ray is imported; what the operator has set stays.

    A cluster of our own authenticates by a token that only its processes' environment holds, and listens on loopback.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",  # Ray asks on the terminal otherwise
        "RAY_worker_niceness": "0",  # Ray runs its workers at niceness 15; ours are what the machine is for
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a call that comes after the end must fail, not start another Ray
    }
    if not is_own_cluster:
        defaults["RAY_DEDUP_LOGS"] = "0"  # what several workers say is not said for one of them
        defaults["RAY_COLOR_PREFIX"] = "0"
    if is_own_cluster:
        defaults["RAY_AUTH_MODE"] = "token"
        # What Ray has for Windows and macOS: a node's address is 127.0.0.1, where all of its servers then listen.
        defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            # Not the file in the home directory that other clusters share.
            defaults["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in defaults.items():
        if not os.environ.get(name):
            os.environ[name] = value


def named_ray_address() -> str | None:
    """Return the Ray cluster that the operator names, host:port; "local" wants one of our own; None: none is named.

    Raises:
        ConfigError: RAY_ADDRESS is not host:port.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto"):
        return None
    if address != "local" and not re.fullmatch(r"[^/]+:\d{1,5}", address):
        raise ConfigError(f"RAY_ADDRESS: wanted host:port of a Ray head, or local, saw {address!r}")
    return address


def ray_auth_mode() -> str:
    """Return what the operator wants of Ray's authentication: "token", "disabled", or "" where nothing is said."""
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def use_ray_token() -> None:
    """Let Ray, which was not imported yet, send the token that `ray_token` finds."""
    os.environ["RAY_AUTH_MODE"] = "token"


def ray_token() -> tuple[str, str] | None:
    """Return the token for a Ray cluster, looked for as Ray does, after where it was found; None without one.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return "RAY_AUTH_TOKEN", token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if named:
            reason = getattr(error, "strerror", None) or "not text"
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read: {reason}") from None
        return None
    return (str(path), token) if token else None


def recorded_ray_address() -> str | None:
    """Return the cluster that `ray start` wrote down on this machine, None without one. It may have crashed since.

    Ray's own address="auto" is not used: it also finds clusters by looking through the process list, and so would
    join, and take over, the private Ray of another `kvray serve`.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _check_origins(origins: tuple[str, ...]) -> None:
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"http.allowed_origins: wanted *, or scheme://host[:port] as a browser sends it, saw {shown(origin)}"
            )


def _check_numbers(config: KvrayConfig) -> None:
    for role in ("prefill", "decode"):
        least, most = getattr(config.pools, role), getattr(config.autoscaling, f"max_{role}")
        if most is not None and not 1 <= least <= most:
            wanted = "at least 1" if least < 1 else f"at most autoscaling.max_{role} ({most})"
            raise ConfigError(f"pools.{role}: wanted {wanted}, saw {least}")
    if config.engine.kv_cache_dtype == "fp8" and config.tiers.remote_compression == "int8":
        raise ConfigError("tiers.remote_compression: wanted off or lossless beside engine.kv_cache_dtype fp8, saw int8")


def _check_endpoint(endpoint: str | None) -> None:
    if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
        raise ConfigError(
            "observability.otlp_endpoint: wanted http://HOST:PORT or https://HOST/PATH, without a name and password, "
            f"saw {shown(endpoint)}"
        )


def _check(config: KvrayConfig) -> None:
    """Raise ConfigError for values that are in their ranges and make no sense beside each other."""
    if config.model.tool_parser is not None and config.model.tool_parser not in FORMATS:
        raise ConfigError(
            f"model.tool_parser: wanted one of {', '.join(FORMATS)}, saw {shown(config.model.tool_parser)}"
        )
    if config.model.reasoning_parser is not None and config.model.reasoning_parser not in THOUGHT_FORMATS:
        raise ConfigError(
            f"model.reasoning_parser: wanted one of {', '.join(THOUGHT_FORMATS)}, saw"
            f" {shown(config.model.reasoning_parser)}"
        )
    _check_numbers(config)
    first, last = config.network.port_range
    if first >= last:
        raise ConfigError(f"network.port_range: wanted the first port below the last, saw {first} and {last}")
    if not all(re.fullmatch(r"[^\s,]+", key) for key in config.http.api_keys):
        raise ConfigError("http.api_keys: wanted keys without white space and commas, saw another, or an empty one")
    if config.http.api_keys and config.http.api_key_file is not None:
        raise ConfigError("http.api_key_file: wanted either it or http.api_keys, saw both")
    _check_origins(config.http.allowed_origins)
    _check_endpoint(config.observability.otlp_endpoint)
    if config.connections.max_receiving_bytes < config.http.max_body_bytes:
        raise ConfigError(
            f"connections.max_receiving_bytes: wanted at least http.max_body_bytes ({config.http.max_body_bytes}), "
            f"saw {config.connections.max_receiving_bytes}"
        )
    if config.network.lost_after_s < 2 * config.network.heartbeat_s:
        raise ConfigError(
            f"network.lost_after_s: wanted at least twice heartbeat_s ({config.network.heartbeat_s:g}), "
            f"saw {config.network.lost_after_s:g}"
        )
    sizes = {
        "engine.kv_cache_memory": config.engine.kv_cache_memory,
        "tiers.host_memory": None if config.tiers.host_memory == AUTO_SIZE else config.tiers.host_memory,
        "tiers.disk_capacity": config.tiers.disk_capacity,
        "responses.memory": config.responses.memory,
    }
    names = [tenant.name for tenant in config.tenants.members]
    for number, tenant in enumerate(config.tenants.members):
        place = f"tenants.members[{number}]"
        if tenant.name in names[:number]:
            raise ConfigError(f"{place}.name: wanted each name once, saw {tenant.name} again")
        for tier in ("host", "disk", "remote"):
            sizes[f"{place}.{tier}_quota"] = getattr(tenant, f"{tier}_quota")
    for place, size in sizes.items():
        try:
            if size is not None:
                parse_size(size)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error.message}") from None
