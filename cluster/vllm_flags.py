"""Flags of `vllm serve`: taken where kvray has the same, else answered by a line that says what to use.

What is the same under another name is renamed; what is always so here is dropped; a value that asks for nothing else
than what is done anyway is dropped too. All other flags that vLLM knows are refused by name, all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

#: the same under another name
_RENAMED: Final = {
    "--kv-cache-memory-bytes": "--kv-cache-memory",
    "--disable-uvicorn-access-log": "--no-access-log",
    "-O": "--optimization-level",
    "-ac": "--attention-config",
    "-cc": "--compilation-config",
    "-dcp": "--decode-context-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpb": "--data-parallel-backend",
    "-dpl": "--data-parallel-size-local",
    "-ep": "--enable-expert-parallel",
    "-n": "--nnodes",
    "-pcp": "--prefill-context-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "-r": "--node-rank",
    "-sc": "--speculative-config",
    "-tp": "--tensor-parallel-size",
}
#: values that have another name here
_VALUES: Final = {"--dtype": {"half": "float16", "float": "float32"}}
#: flags that take several values, each of which is given by itself here
_SEVERAL: Final = ("--served-model-name", "--api-key")
#: switches for what is always so, or changes nothing that a client sees
_ALWAYS: Final = frozenset(
    {
        "--async-scheduling",
        "--disable-log-requests",
        "--disable-log-stats",
        "--enable-auto-tool-choice",
        "--enable-chunked-prefill",
        "--enable-offline-docs",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--enable-reasoning",
        "--enable-request-id-headers",
        "--enable-tokenizer-info-endpoint",
        "--enforce-eager",
        "--no-async-scheduling",
        "--no-enable-log-requests",
        "--no-enforce-eager",
    }
)
_BOOLEANS: Final = ("true", "false")
#: values that ask for what is done anyway
_AS_IT_IS: Final = {
    "--allowed-headers": ('["*"]', "*"),
    "--allowed-methods": ('["*"]', "*"),
    "--chat-template-content-format": ("auto",),
    "--config-format": ("auto", "hf"),
    "--convert": ("auto", "none"),
    "--data-parallel-size": ("1",),
    "--generation-config": ("auto",),
    "--kv-cache-dtype": ("auto",),
    "--load-format": ("auto", "safetensors"),
    "--model-impl": ("auto", "transformers"),
    "--nnodes": ("1",),
    "--pipeline-parallel-size": ("1",),
    "--runner": ("auto", "generate"),
    "--scheduling-policy": ("fcfs",),
    "--task": ("auto", "generate"),
    "--tensor-parallel-size": ("1",),
    "--tokenizer-mode": ("auto", "hf"),
}
_WORKERS: Final = "a worker computes on one accelerator, and more workers serve more requests: --prefill N, --decode N"
_NO_DOWNLOAD: Final = "nothing is downloaded: MODEL is a directory, with its tokenizer and without code of its own"
_TIERS: Final = "KV beside the workers' pools: --host-memory, --disk-dir, --remote"
_LEVEL: Final = "--log-level is that of all processes; a line for each request: --access-log"
_RAY: Final = "Ray places workers on the nodes of its cluster (RAY_ADDRESS): pools in the YAML file"
_PROXY: Final = "HTTP is served plain and from the root: put a proxy in front of it"
_NONE: Final = "there is none of it here"
#: what to use in place of a flag, or that there is nothing; all but the switches take a value
_HINTS: Final = {
    **dict.fromkeys(("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"), _WORKERS),
    "--data-parallel-size-local": _WORKERS,
    "--data-parallel-rank": _WORKERS,
    "--decode-context-parallel-size": _WORKERS,
    "--prefill-context-parallel-size": _WORKERS,
    "--shutdown-timeout": "workers that are stopped may finish what they have: pools.drain_timeout_s in the YAML file",
    "--stream-interval": "streams have an event for each step",
    "--num-gpu-blocks-override": "the room for KV, of each worker, is --kv-cache-memory",
    "--swap-space": _TIERS,
    "--cpu-offload-gb": f"weights stay on the accelerator; {_TIERS}",
    "--kv-offloading-size": "--host-memory, e.g. 8GiB, of each node",
    "--kv-offloading-backend": _TIERS,
    "--kv-transfer-config": "prefill and decode are disaggregated as they are (--prefill, --decode); " + _TIERS,
    "--kv-cache-dtype": "KV is kept in the dtype that the model computes in (--dtype)",
    "--max-num-queued-reqs": "who would wait too long is refused: http.max_ttft_s in the YAML file",
    "--long-prefill-token-threshold": "prompts are cut by engine.itl_target_ms in the YAML file",
    "--max-num-partial-prefills": "prompts are cut by engine.itl_target_ms in the YAML file",
    "--quantization": f"of weights, {_NONE}; the dtype is --dtype",
    **dict.fromkeys(
        (
            "--tokenizer",
            "--tokenizer-mode",
            "--tokenizer-revision",
            "--revision",
            "--code-revision",
            "--download-dir",
            "--hf-config-path",
            "--hf-token",
            "--load-format",
        ),
        _NO_DOWNLOAD,
    ),
    "--config-format": "a model is read from a transformers directory",
    "--model-impl": "any transformers model is served by its own code",
    "--hf-overrides": "change the model directory's config.json",
    "--rope-scaling": "change the model directory's config.json",
    "--generation-config": "defaults of requests are those of the model's generation_config.json",
    "--override-generation-config": "defaults of requests are those of the model's generation_config.json",
    "--chat-template-content-format": "how a template takes content is told from the template",
    "--default-chat-template-kwargs": "give chat_template_kwargs in requests",
    "--response-role": "it is always assistant",
    "--runner": "text is generated, and nothing else served",
    "--task": "text is generated, and nothing else served",
    "--convert": "text is generated, and nothing else served",
    "--seed": "give seed in a request: without, requests draw freely",
    "--max-logprobs": "give logprobs or top_logprobs in requests",
    "--logprobs-mode": _NONE,
    "--scheduling-policy": "priorities of requests count with http.client_priority: use in the YAML file",
    "--guided-decoding-backend": "grammars are llguidance's; http.grammar_timeout_s in the YAML file limits them",
    "--structured-outputs-config": "grammars are llguidance's; http.grammar_timeout_s in the YAML file limits them",
    "--allowed-headers": "pages that may call may send all of them",
    "--allowed-methods": "pages that may call may use all of them",
    "--sse-keep-alive-interval": "streams are kept alive as they are",
    "--api-server-count": "pools.ingress in the YAML file",
    "--uvicorn-log-level": _LEVEL,
    "--max-log-len": _LEVEL,
    "--log-config-file": _LEVEL,
    "--disable-access-log-for-endpoints": _LEVEL,
    "--distributed-executor-backend": _RAY,
    "--data-parallel-backend": _RAY,
    "--master-addr": _RAY,
    "--master-port": _RAY,
    "--nnodes": _RAY,
    "--node-rank": _RAY,
    **dict.fromkeys(("--root-path", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--uds"), _PROXY),
    **dict.fromkeys(
        (
            "--additional-config",
            "--allowed-local-media-path",
            "--attention-backend",
            "--attention-config",
            "--collect-detailed-traces",
            "--compilation-config",
            "--cudagraph-capture-sizes",
            "--default-mm-loras",
            "--eplb-config",
            "--io-processor-plugin",
            "--kv-events-config",
            "--limit-mm-per-prompt",
            "--logits-processors",
            "--lora-dtype",
            "--lora-modules",
            "--max-cpu-loras",
            "--max-cudagraph-capture-size",
            "--max-lora-rank",
            "--max-loras",
            "--max-parallel-loading-workers",
            "--media-io-kwargs",
            "--middleware",
            "--mm-processor-cache-gb",
            "--mm-processor-kwargs",
            "--model-loader-extra-config",
            "--moe-backend",
            "--optimization-level",
            "--otlp-traces-endpoint",
            "--performance-mode",
            "--pooler-config",
            "--prefix-caching-hash-algo",
            "--profiler-config",
            "--reasoning-parser-plugin",
            "--scheduler-cls",
            "--speculative-config",
            "--tool-parser-plugin",
            "--tool-server",
            "--worker-cls",
            "--worker-extension-cls",
        ),
        _NONE,
    ),
}
_SWITCHES: Final = {
    "--trust-remote-code": "a model's own code is never run",
    "--no-enable-prefix-caching": "what was computed is always used again; cache_salt in a request keeps it apart",
    "--no-enable-chunked-prefill": "prompts are always computed in chunks, of --max-num-batched-tokens at most",
    "--trust-request-chat-template": "http.client_chat_template: use in the YAML file",
    "--enable-log-requests": _LEVEL,
    "--enable-log-outputs": _LEVEL,
    "--enable-force-include-usage": "give stream_options: {include_usage: true} in requests",
    "--return-tokens-as-token-ids": "give return_tokens_as_token_ids in requests",
    "--disable-fastapi-docs": "/docs tells nothing of this server but its version",
    "--enable-expert-parallel": _WORKERS,
    "--allow-credentials": "keys come in the Authorization header, and nothing in cookies",
    "--headless": _RAY,
    **dict.fromkeys(
        (
            "--disable-cascade-attn",
            "--disable-custom-all-reduce",
            "--disable-sliding-window",
            "--enable-eplb",
            "--enable-lora",
            "--enable-mm-embeds",
            "--enable-prompt-embeds",
            "--enable-sleep-mode",
            "--fully-sharded-loras",
            "--skip-tokenizer-init",
        ),
        _NONE,
    ),
    "--language-model-only": "nothing but text is served as it is",
}


@dataclass(frozen=True, slots=True)
class Translation:
    """The arguments of `kvray serve` that say the same, and a line for each flag that has no equal there."""

    arguments: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def translated(arguments: Sequence[str], known: Mapping[str, bool]) -> Translation:
    """Say in kvray's flags what `arguments` say in vLLM's; what are no flags of vLLM's stays as it is.

    `known` are kvray's own flags, and whether each takes a value. They may be spelled with underscores, as vLLM's may.
    """
    done = Translation()
    pending = list(arguments)
    has_model = any(word.partition("=")[0] == "--model" for word in pending)
    while pending:
        word = pending.pop(0)
        if word == "--":
            done.arguments.extend([word, *pending])
            break
        if not word.startswith("-"):
            has_model = True
            done.arguments.append(word)
            continue
        flag, values = _named(word)
        takes_value = known.get(flag, flag in _HINTS or flag == "--model")
        if not values and pending and _is_value(pending[0], flag, takes_value=takes_value, is_known=flag in known):
            values.append(pending.pop(0))
        if flag in known and values and not takes_value:
            done.arguments.append(word)  # --access-log=false, which is refused, and never taken for a model
        elif flag in known:
            done.arguments.extend([flag, *(_VALUES.get(flag, {}).get(value, value) for value in values)])
            while flag in _SEVERAL and has_model and "=" not in word and pending and not pending[0].startswith("-"):
                done.arguments.extend([flag, pending.pop(0)])
        elif flag == "--model":
            done.arguments.extend(values)
        elif (refusal := _refusal(flag, values)) is not None:
            done.refusals.append(f"{flag}: {refusal}")
        elif not _is_vllms(flag):
            done.arguments.append(word)
    return done


def _named(word: str) -> tuple[str, list[str]]:
    """Return the flag that `word` is, by its long name, and the value that comes in the same word, if there is one."""
    flag, equals, inline = word.partition("=")
    if flag.startswith("-O") and flag[2:].isdecimal():
        flag, equals, inline = "-O", "=", flag[2:]
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    whole, _, field_of_json = flag.partition(".")  # --speculative-config.method=ngram is a part of a JSON value
    whole = _RENAMED.get(whole, whole)
    return flag if field_of_json and whole not in _HINTS else whole, [inline] if equals else []


def _is_value(word: str, flag: str, *, takes_value: bool, is_known: bool) -> bool:
    """Tell whether `word`, which follows `flag`, is its value."""
    if takes_value:
        return is_known or not word.startswith("--")
    return (
        not is_known and flag in _ALWAYS | _SWITCHES.keys() and word.lower() in _BOOLEANS
    )  # as older releases have it


def _refusal(flag: str, values: Sequence[str]) -> str | None:
    """Say what to use in place of a flag of vLLM's; None: it asks for what is done anyway, or is none of vLLM's."""
    is_off = bool(values) and values[0].lower() == "false"
    if flag in _ALWAYS:
        return "it is always so here" if is_off else None
    if flag in _SWITCHES:
        return None if is_off else _SWITCHES[flag]
    if values and values[0] in _AS_IT_IS.get(flag, ()):
        return None
    return _HINTS.get(flag)


def _is_vllms(flag: str) -> bool:
    """Tell whether vLLM knows a flag that is not kvray's; --no-... turns most of its switches off."""
    return flag in _ALWAYS or flag in _HINTS or flag.replace("--no-", "--", 1) in _SWITCHES
