"""Which models the engine can run: by their configuration, by a probe, and by comparison with eager attention.

Nothing here knows a family by name. A model works when every layer calls the attention interface once per forward,
and when its logits through a paged pool equal those of its own eager attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.kernels.protocol import AttentionKernels, LayerUse, PrefillSpan, PrefillSpans
from engine.memory.kv_pool import KvPool, LayerSpec
from engine.model.attention import ATTENTION_NAME, LayerAttention, StepAttention, step_attention
from engine.model.float8 import FLOAT8, kept_dtype
from messages.errors import ConfigError, first_line
from text.json_file import read_json

_PROBE_NAME = "kvray_probe"

#: What a forward of a model that was not made for this can raise.
_MODEL_ERRORS = (TypeError, RuntimeError, ValueError, LookupError, AttributeError, AssertionError)

#: Trial of `check_against_eager`: so many tokens as one prefill chunk, then so many as decode rows.
_TRIAL_PREFILL = 13
_TRIAL_DECODE = 6

#: Largest median over rows of |ours - eager| / |eager| that passes.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
#: With KV in float8: what is said at load, and not more than tells that something is wrong. Of 64 small random models
#: most came to 0.05 and all but one with 128 experts to less than 0.2 (2026-11).
_FLOAT8_TOLERANCE = 0.75


def read_model_config(directory: Path) -> PretrainedConfig:
    """Read the configuration of a text decoder that transformers itself has.

    Raises:
        ConfigError: the directory or its config.json is missing or unreadable, or the model is none we can serve;
            the message names the family and the reason.
    """
    if not directory.is_dir():
        raise ConfigError(f"no model directory at {directory}")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} is no model directory: it has no config.json")
    raw = read_json(directory / "config.json")
    family = str(raw.get("model_type") or "")
    reason = _refusal(raw, family)
    if reason:
        raise ConfigError(f"{family or 'this model'} cannot be served: {reason}")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # config classes validate with errors of many libraries
        raise ConfigError(f"{directory / 'config.json'} is refused by transformers: {first_line(error)}") from error
    return config


def _refusal(raw: dict[str, Any], family: str) -> str:
    """Tell why a model with this config.json cannot be served; "" where nothing speaks against it."""
    if not family:
        return "its config.json names no model_type"
    if family not in CONFIG_MAPPING_NAMES:
        if "auto_map" in raw:
            return "it wants to run code from its own directory, which is never done"
        return "this version of transformers does not know the family"
    if raw.get("is_encoder_decoder"):
        return "it is an encoder-decoder, wanted a decoder"
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "it is not a decoder (transformers has no causal language model of this family)"
    architectures = [str(name) for name in raw.get("architectures") or []]
    if architectures and not set(architectures) & _causal_classes(family):
        return f"its architecture is {architectures[0]}, wanted {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}"
    parts = [name for name in ("vision_config", "audio_config") if raw.get(name)]
    if parts:
        return f"it has a {parts[0].removesuffix('_config')} part, wanted text only"
    if raw.get("quantization_config") and family != "bitnet":
        entries = raw["quantization_config"]
        method = entries.get("quant_method", "unknown") if isinstance(entries, dict) else "unknown"
        return f"its weights are quantised ({method}), wanted float32, bfloat16 or float16"
    if raw.get("index_topk"):
        return "its layers pick keys with an indexer (sparse attention)"
    return ""


def _causal_classes(family: str) -> set[str]:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return {names} if isinstance(names, str) else set(names)


def probe_layers(model: nn.Module, family: str) -> tuple[list[LayerUse], int]:
    """Run two tokens and record how each layer calls the attention interface.

    Returns:
        One LayerUse per layer, and the width of the logits.

    Raises:
        ConfigError: a layer does not call the interface, calls it twice, passes a mask of its own, attends to later
            tokens, or the model keeps other state than keys and values.
    """
    config: Any = model.config
    if getattr(model, "_is_stateful", False):
        raise ConfigError(
            f"{family} cannot be served: it keeps recurrent state (state-space or linear attention), "
            "wanted attention in every layer"
        )
    calls: dict[int, list[LayerUse]] = {}
    faults: list[str] = []

    def probe(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        index = int(getattr(module, "layer_idx", -1))
        if attention_mask is not None:
            faults.append(f"layer {index} attends under a mask that the model makes itself")
        if getattr(module, "is_causal", True) is False:
            faults.append(f"layer {index} attends to later tokens")
        calls.setdefault(index, []).append(
            LayerUse(
                LayerSpec(key.shape[1], key.shape[3], value.shape[3]),
                query.shape[1],
                window=sliding_window,
                chunk=attention_chunk(getattr(module, "config", config), index),
                softcap=softcap,
                has_sinks=s_aux is not None,
            )
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_PROBE_NAME, probe)
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    try:
        model.set_attn_implementation(_PROBE_NAME)  # type: ignore[operator]
        with torch.inference_mode():
            logits = model(
                input_ids=tokens,
                position_ids=torch.arange(2, device=device)[None],
                use_cache=False,
                logits_to_keep=torch.zeros(1, dtype=torch.int64, device=device),
            ).logits
    except _MODEL_ERRORS as error:
        raise ConfigError(f"{family} cannot be served: its forward fails here: {first_line(error)}") from error
    if logits.shape[1] != 1:
        faults.append("it computes logits for tokens that nobody asked for (no logits_to_keep)")
    layers = [calls.get(index, []) for index in range(config.get_text_config().num_hidden_layers)]
    silent = [str(index) for index, layer in enumerate(layers) if not layer]
    if silent:
        faults.append(
            f"layers {', '.join(silent)} of {len(layers)} do not use the attention interface "
            "(state-space, linear, convolution or built-in attention)"
        )
    twice = [str(index) for index, layer in enumerate(layers) if len(layer) > 1]
    if twice:
        faults.append(f"layers {', '.join(twice)} attend more than once per forward")
    if faults:
        raise ConfigError(f"{family} cannot be served: {faults[0]}")
    return [layer[0] for layer in layers], int(logits.shape[-1])


def attention_chunk(config: Any, layer_index: int) -> int | None:
    """Return the tokens of the aligned chunks that a layer attends within, which transformers passes with no call.

    None where the layer attends to everything before.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and 0 <= layer_index < len(kinds) and kinds[layer_index] == "chunked_attention":
        return int(config.attention_chunk_size)
    return None


def eager_trial(model: nn.Module, vocab_size: int, max_model_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids `[n]` and the logits `[n, vocab_size]` float32 that the model's own eager attention gives."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    num_tokens = min(_TRIAL_PREFILL + _TRIAL_DECODE, max_model_len)
    tokens = torch.randint(vocab_size, (num_tokens,), generator=generator).to(device)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    positions = torch.arange(len(tokens), device=device)
    with torch.inference_mode():
        logits = model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=positions
        ).logits[0]
    return tokens, logits.float()


def check_against_eager(
    model: nn.Module,
    family: str,
    layers: list[LayerUse],
    kernels: list[AttentionKernels],
    dtype: torch.dtype,
    trial: tuple[torch.Tensor, torch.Tensor],
) -> PagedTrial:
    """Compute `trial` through a small pool, its last tokens as decode rows packed in front, and compare.

    Leaves the model with our attention set.

    Returns:
        What was found on the way.

    Raises:
        ConfigError: the logits differ by more than rounding explains.
    """
    tokens, wanted = trial
    num_tokens = len(tokens)
    num_decodes = min(_TRIAL_DECODE, num_tokens - 1)
    pool = _TrialPool(model, layers, kernels, dtype, tokens)
    positions = torch.arange(num_tokens, device=tokens.device).roll(num_decodes)  # decode rows come first
    try:
        got = pool.logits(positions, num_decodes)
        kv = pool.kv()
        rows = [(begin, size) for begin, size in ((0, 1), (1, 2), (3, 3)) if begin + size <= num_decodes]
        alone = [pool.logits(positions[begin : begin + size], size) for begin, size in rows]
    except _MODEL_ERRORS as error:
        raise ConfigError(f"{family} cannot be served: its forward fails here: {first_line(error)}") from error
    expected = wanted[positions]
    # a row at a time, and the median: an expert chosen the other way at a near-tie moves one row, not most
    distance = (got.float() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-6)
    tolerance = _TOLERANCE[dtype] if layers[0].scales is None else _FLOAT8_TOLERANCE
    if not float(distance.median()) <= tolerance:
        raise ConfigError(
            f"{family} cannot be served: its logits through the paged pool differ from its own attention's "
            f"by {float(distance.median()):.2g} of their size, at most {tolerance:.2g} is rounding"
        )
    return PagedTrial(
        logits=got,
        keys=tuple(kv[: len(layers)]),
        values=tuple(kv[len(layers) :]),
        distance=float(distance.median()),
        is_row_invariant=all(
            torch.equal(logits, got[begin : begin + size]) for (begin, size), logits in zip(rows, alone, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class PagedTrial:
    """What a trial through the paged pool tells beside that the model is served right."""

    logits: torch.Tensor
    keys: tuple[torch.Tensor, ...]  #: `[num_tokens, num_kv_heads, k_dim]` of each layer, as they are kept
    values: tuple[torch.Tensor, ...]  #: likewise
    distance: float  #: median over rows of |ours - eager| / |eager|, of logits
    is_row_invariant: bool  #: decode rows had the same bits alone, in twos and threes, and beside a prompt

    @property
    def bits(self) -> tuple[torch.Tensor, ...]:
        """What is the same wherever blocks may be shared."""
        return (self.logits, *self.keys, *self.values)


class _TrialPool:
    """A model over a small pool of its own that holds one sequence."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[LayerUse],
        kernels: list[AttentionKernels],
        dtype: torch.dtype,
        tokens: torch.Tensor,
    ) -> None:
        block_size = 16
        num_blocks = -(-len(tokens) // block_size)
        self._model: Any = model
        self._tokens = tokens
        self._block_size = block_size
        kept = kept_dtype(layers, dtype)
        self._pool = KvPool([layer.spec for layer in layers], block_size, kept, tokens.device, num_blocks=num_blocks)
        self._table = torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32, device=tokens.device)
        self._layers = [
            LayerAttention(k, v, kernel, layer.chunk, layer.scales)
            for k, v, kernel, layer in zip(self._pool.k, self._pool.v, kernels, layers, strict=True)
        ]
        model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]

    def logits(self, positions: torch.Tensor, num_decodes: int) -> torch.Tensor:
        """Return logits `[n, vocab_size]` of `positions [n]`: decode rows first, then one chunk from position 0."""
        num_rows, device = len(positions), positions.device
        num_prefills = num_rows - num_decodes
        kv_lens = (positions[:num_decodes] + 1).int()
        step = StepAttention(
            layers=self._layers,
            block_ids=self._table[positions // self._block_size].long(),
            offsets=positions % self._block_size,
            num_decode_rows=num_decodes,
            block_tables=self._table[None],
            slots=torch.zeros(num_decodes, dtype=torch.int64, device=device),
            kv_lens=kv_lens,
            max_kv_len=int(kv_lens.max()) if num_decodes else 0,
            spans=PrefillSpans.of([PrefillSpan(0, num_prefills, num_prefills, 0)], device) if num_prefills else None,
        )
        with torch.inference_mode(), step_attention(step):
            logits: torch.Tensor = self._model(
                input_ids=self._tokens[positions][None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=torch.arange(num_rows, device=device),
                kv_step=step,
            ).logits[0]
        return logits

    def kv(self) -> list[torch.Tensor]:
        """Return the keys, then the values of each layer, `[num_tokens, num_kv_heads, dim]`."""
        views = [*self._pool.k, *self._pool.v]
        if self._pool.dtype == FLOAT8:  # which torch does not index
            views = [view.view(torch.uint8) for view in views]
        return [view[self._table.long()].transpose(1, 2).flatten(0, 1)[: len(self._tokens)] for view in views]
