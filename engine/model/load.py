"""Loads a transformers decoder, unmodified, to run over a paged pool."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from engine.kernels.capability import heads_refusal
from engine.kernels.cpu.memory import keep_freed_buffers, use_huge_pages
from engine.kernels.cpu.native import load_kernels
from engine.kernels.protocol import AttentionKernels, LayerOperators, LayerUse
from engine.memory.device_room import CudaReader, check_weights_fit
from engine.memory.kv_pool import LAYOUT_VERSION, LayerSpec
from engine.model.activations import fix_activations
from engine.model.attention import choose_kernels
from engine.model.bits import path_digest
from engine.model.checkpoint import stored_dtype, weight_files, weights_digest
from engine.model.devices import check_device, choose_device
from engine.model.drawn import draw_model
from engine.model.experts import pack_experts
from engine.model.families import PagedTrial, check_against_eager, eager_trial, probe_layers, read_model_config
from engine.model.float8 import FLOAT8, kept_dtype, scales_of
from engine.model.fused import fuse_modules
from engine.model.fused_layer import fuse_layers
from engine.model.linear import can_pack, linear_name, pack_linears
from engine.model.rope import fix_frequencies, original_length
from messages.errors import ConfigError
from text.json_file import read_json
from transport.memory import total_bytes

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = ("auto", "fp8")
_STORED_DTYPES = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}

#: Of the machine's memory, what weights may take as float32 that are stored as bfloat16.
_WIDENED_SHARE = 0.25

#: Entries of config.json that do not change what the weights compute.
_IDLE_CONFIG_KEYS = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for a Runner, and what others need to know of it."""

    model: nn.Module
    family: str  #: transformers' model_type
    layers: tuple[LayerUse, ...]
    kernels: tuple[AttentionKernels, ...]  #: one per layer
    dtype: torch.dtype  #: of weights, and of KV unless that is kept as float8
    device: torch.device
    vocab_size: int  #: width of the logits
    num_embeddings: int  #: token ids of inputs are below it
    max_model_len: int  #: tokens, prompt and output together
    eos_token_ids: tuple[int, ...]
    fingerprint: bytes  #: 32 bytes; equal only where KV blocks are interchangeable
    num_parameters: int
    kernel_path: str  #: which linears and attention compute it, e.g. "cpu/dot/fused-9-4-4-4/native-16-bf16dot"
    has_kernels: bool = False  #: the C++ kernels for CPUs were there to be used

    @property
    def layer_specs(self) -> list[LayerSpec]:
        """Shapes of what each layer keeps per token."""
        return [layer.spec for layer in self.layers]

    @property
    def kv_dtype(self) -> torch.dtype:
        """What KV is kept as."""
        return kept_dtype(self.layers, self.dtype)


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    num_threads: int | None = None,
    max_model_len: int | None = None,
    kv_cache_dtype: str = "auto",
    use_kernels: bool = True,
    drawn_seed: int | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load the decoder in directory `path`. Reads safetensors only, runs no code out of the directory, uses no network.

    Args:
        path: a transformers model directory.
        dtype: "float32", "bfloat16", "float16", or "auto": as stored, but on a CPU float16 as float32, and bfloat16 too
            where the CPU would emulate it and the weights as float32 take at most a quarter of its memory.
        device: "cpu", a CUDA device, or "auto": the accelerator, where there is one.
        num_threads: torch's threads from now on; None leaves them.
        max_model_len: tokens at most; None: as many as the model has positions for, or as it was first trained
            with where its rotary frequencies change after that. Asking for more then gives all lengths the
            frequencies of long ones.
        kv_cache_dtype: "auto": as weights; "fp8": float8, half the bytes of bfloat16 (`engine.model.float8`). How far
            logits of a trial are from eager attention's is then said.
        use_kernels: the C++ kernels, where they were built for this machine, or Triton's on a GPU; False: plain torch.
        drawn_seed: weights are drawn with it where they will lie, not read: `path` needs no more than a config.json.
        on_progress: called with a line for people as loading goes on.

    Raises:
        ConfigError: the model cannot be served; one line that says why.
    """
    say = on_progress or _log.info
    if kv_cache_dtype not in _KV_DTYPES:
        raise ConfigError(f"kv_cache_dtype is {kv_cache_dtype!r}, wanted {' or '.join(_KV_DTYPES)}")
    target = choose_device(device, say)
    if target.type == "cuda":
        torch.cuda.set_device(target)  # whose streams, graphs and kernels are meant from now on
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    config, files, length = check_model(path, max_model_len=max_model_len, is_drawn=drawn_seed is not None)
    family = str(config.model_type)
    chosen = _choose_dtype(dtype, config, files, target)
    check_device(target, chosen, kv_cache_dtype, use_kernels=use_kernels)
    if drawn_seed is None:
        num_bytes = sum(file.stat().st_size for file in files)
        say(f"hashing {num_bytes / 1e6:,.0f} MB of weights")
        digest = weights_digest(files)
        say(f"loading {family} as {str(chosen).removeprefix('torch.')}")
        model = _load(path, config, chosen)
        if target.type == "cuda":
            tensors = (*model.parameters(), *model.buffers())
            check_weights_fit(sum(tensor.nbytes for tensor in tensors), CudaReader(target))
        model = model.to(target).eval()
    else:
        digest = blake3(f"drawn on {target.type} with {drawn_seed}".encode()).digest()
        say(f"drawing the weights of a {family} as {str(chosen).removeprefix('torch.')}")
        model = draw_model(config, chosen, target, drawn_seed)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    fix_frequencies(model, length)
    layers, vocab_size = probe_layers(model, family)
    trial = eager_trial(model, vocab_size, length)
    native = load_kernels() if use_kernels and target.type == "cpu" else None
    linears = linear_name(chosen, native) if target.type == "cpu" else "torch"
    names = [target.type, linears]
    if linears != "torch":
        say("packing linear layers")
        pack_linears(model, native)
        pack_experts(model, native)
    candidates: list[AttentionKernels] = [native] if native else []
    operators: LayerOperators | None = native
    if target.type == "cuda" and use_kernels:
        triton_kernels, operators = _gpu_kernels(family, layers)
        candidates.append(triton_kernels)
    if operators:
        names.append(f"{fuse_modules(model, operators).name}-{fuse_layers(model)}")
    if target.type == "cpu" and chosen is torch.float32:
        fix_activations(model)
    if target.type == "cpu":
        use_huge_pages()
        keep_freed_buffers()
    kernels = choose_kernels(layers, chosen, target, candidates)
    found = check_against_eager(model, family, layers, kernels, chosen, trial)
    if kv_cache_dtype == "fp8":
        layers = _with_scales(layers, found)
        kernels = choose_kernels(layers, chosen, target, candidates)
        exact, found = found, check_against_eager(model, family, layers, kernels, chosen, trial)
        names.append("kv-fp8")
        say(
            f"KV in float8 (e4m3): a trial's logits are {found.distance:.2g} of their size from eager attention's, "
            f"{exact.distance:.2g} with KV in {str(chosen).removeprefix('torch.')}"
        )
        if target.type == "cpu":
            say("KV in float8 is computed with by torch's operators on a CPU: several times slower than without")
    names += sorted({kernel.name for kernel in kernels})
    if not found.is_row_invariant:
        names.append("batch-dependent")
        say(f"{family}: a token's bits depend on its batch here, so a request may get other tokens beside others")
    kernel_path = "/".join(names)
    say(f"{family} ready: {num_parameters / 1e6:,.1f} M parameters, {kernel_path}")
    return LoadedModel(
        model=model,
        family=family,
        layers=tuple(layers),
        kernels=tuple(kernels),
        dtype=chosen,
        device=next(model.parameters()).device,
        vocab_size=vocab_size,
        num_embeddings=_num_embeddings(model),
        max_model_len=length,
        eos_token_ids=_eos_token_ids(path, config),
        fingerprint=_fingerprint(
            digest, config, chosen, path_digest(found.bits, layers, kernels, chosen, target, native), length, layers
        ),
        num_parameters=num_parameters,
        kernel_path=kernel_path,
        has_kernels=native is not None,
    )


def _with_scales(layers: list[LayerUse], trial: PagedTrial) -> list[LayerUse]:
    """Return the layers as those that keep float8, by the sizes of a trial's keys and values."""
    scales = scales_of(trial.keys, trial.values)
    return [replace(layer, scales=one) for layer, one in zip(layers, scales, strict=True)]


def _gpu_kernels(family: str, layers: list[LayerUse]) -> tuple[AttentionKernels, LayerOperators]:
    """Return what computes these layers on a GPU.

    Raises:
        ConfigError: it is not installed, or a layer has larger heads than it takes.
    """
    try:
        from engine.kernels.triton.kernels import MAX_HEAD_SIZE, TRITON_KERNELS
        from engine.kernels.triton.operators import TRITON_OPERATORS
    except ImportError:
        raise ConfigError(
            "triton is not installed, in which the kernels for GPUs are: pip install 'kvray[triton]', "
            "or engine.kernels: off, which computes with torch's operators, slowly"
        ) from None
    reason = heads_refusal([max(layer.spec.k_dim, layer.spec.v_dim) for layer in layers], MAX_HEAD_SIZE)
    if reason is not None:
        raise ConfigError(f"{family} cannot be served as it is: {reason}")
    return TRITON_KERNELS, TRITON_OPERATORS


def _num_embeddings(model: nn.Module) -> int:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # transformers' method, not a tensor
    return int(embedding.weight.shape[0])


def check_model(
    path: Path, *, max_model_len: int | None = None, is_drawn: bool = False
) -> tuple[PretrainedConfig, list[Path], int]:
    """Check the decoder in `path` as far as can be told before its weights are loaded.

    `max_model_len` is as in `load_model`; `is_drawn`: it needs no weight files.

    Returns:
        Its configuration, its weight files, and the tokens that a sequence may have.

    Raises:
        ConfigError: the model cannot be served; one line that says why.
    """
    config = read_model_config(path)
    files = [] if is_drawn else weight_files(path)
    return config, files, _context_length(config, max_model_len, path)


def _load(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # corrupt files fail in safetensors, torch or transformers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the weights in {path} cannot be loaded: {reason[:300]}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(f"the weights in {path} lack {len(missing)} tensors, first {missing[0]}")
    loaded: nn.Module = model
    return loaded


def _choose_dtype(dtype: str, config: Any, files: list[Path], device: torch.device) -> torch.dtype:
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, wanted auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    named = getattr(config, "dtype", None)
    name = str(named).removeprefix("torch.") if named is not None else _STORED_DTYPES.get(stored_dtype(files), "")
    if device.type == "cpu" and (name == "float16" or (name == "bfloat16" and _widens_bfloat16(files))):
        name = "float32"  # CPUs compute float16 slower than float32, and bfloat16 would round the weights
    return _DTYPES.get(name, torch.float32)


def _widens_bfloat16(files: list[Path]) -> bool:
    """Tell whether weights stored as bfloat16 are to be computed in float32.

    Where oneDNN has no bfloat16 products torch emulates them, and float32 is many times faster, if there is room.

    Judged by all memory, not by what is free of it: the workers of a node have to agree.
    """
    num_bytes = 2 * sum(file.stat().st_size for file in files)
    return not can_pack(torch.bfloat16) and num_bytes <= _WIDENED_SHARE * total_bytes()


def _context_length(config: PretrainedConfig, wanted: int | None, path: Path) -> int:
    positions: Any = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None and positions is None:
        raise ConfigError(f"{path / 'config.json'} names no max_position_embeddings: give max_model_len")
    if wanted is None:
        return int(min(positions, original_length(config) or positions))
    if wanted < 1 or (positions is not None and wanted > positions):
        raise ConfigError(f"max_model_len is {wanted}, wanted 1 to {positions} (the model's positions)")
    return wanted


def _eos_token_ids(path: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """Return the end tokens that `generate` would stop at: generation_config.json's, else config.json's."""
    found: Any = None
    if (path / "generation_config.json").is_file():
        found = read_json(path / "generation_config.json").get("eos_token_id")
    if found is None:
        found = getattr(config.get_text_config(), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(int(token) for token in (found if isinstance(found, list) else [found]))


def _fingerprint(
    weights: bytes,
    config: PretrainedConfig,
    dtype: torch.dtype,
    path: bytes,
    max_model_len: int,
    layers: list[LayerUse],
) -> bytes:
    """Hash to 32 bytes all that decides the bits of a block but its tokens and its size, which block names add."""
    facts = {key: value for key, value in config.to_dict().items() if key not in _IDLE_CONFIG_KEYS}
    has_long_rope = max_model_len > (original_length(config) or max_model_len)
    kept = [[str(FLOAT8), layer.scales.k, layer.scales.v] for layer in layers if layer.scales is not None]
    description = json.dumps([facts, str(dtype), LAYOUT_VERSION, has_long_rope, *kept], sort_keys=True, default=str)
    return blake3(weights + path + description.encode()).digest()
