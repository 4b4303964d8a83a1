"""Whole decoder layers on fused modules, and the last layer for those rows only whose logits anybody wants.

    x = hidden + attention(norm(hidden));  x + mlp(norm(x))

`fuse_layers` gives layers of this form, made of modules that `engine.model.fused` has fused, a forward that adds and
norms in one pass and does without the way through each module's call. An instance is fused only after that forward
gave, bit for bit, what its own gives; of fewer rows a GPU's products may round otherwise. The last layer must store the
keys and values of all rows, but what follows its attention is needed for the step's `kept_rows` alone: of a prefill
step, a handful.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.model.attention import StepAttention
from engine.model.fused import (
    MODULE_ERRORS,
    PROBE_NAME,
    TRIAL_ROWS,
    FusedAttention,
    FusedGate,
    FusedNorm,
    agree,
    probe_result,
    run_trial,
)


class FusedLayer:
    """Stands for a decoder layer's forward."""

    def __init__(self, layer: Any, *, is_last: bool) -> None:
        self._forward = layer.forward
        self._norm: FusedNorm = layer.input_layernorm.forward
        self._attention: FusedAttention = layer.self_attn.forward
        self._inner_norm: FusedNorm = layer.post_attention_layernorm.forward
        self._mlp: FusedGate = layer.mlp.forward
        self._is_last = is_last

    def __call__(self, hidden_states: torch.Tensor, **keywords: Any) -> Any:
        """Compute what the layer's own forward computes; of the last layer, rows that nobody reads are zero."""
        is_ours = keywords.get("past_key_values") is None and hidden_states.shape[0] == 1
        if not is_ours or hidden_states.dtype != self._norm.dtype:
            return self._forward(hidden_states, **keywords)
        step = keywords.get("kv_step")
        rows = step.kept_rows if self._is_last and isinstance(step, StepAttention) else None
        if rows is None:
            return self.compute(hidden_states, None, keywords)
        out = torch.zeros_like(hidden_states)  # the other rows: nobody reads them
        out[:, rows] = self.compute(hidden_states, rows, keywords)
        return out

    def compute(self, hidden: torch.Tensor, rows: torch.Tensor | None, keywords: dict[str, Any]) -> torch.Tensor:
        """Turn `hidden [1, T, n]` into `[1, T, n]`, or `[1, r, n]` for `rows [r]`; all keys and values are stored."""
        attended, _ = self._attention(self._norm(hidden), kept_rows=rows, **keywords)
        residual = hidden if rows is None else hidden[:, rows]
        normed = self._inner_norm.of_sum(residual, attended)  # `attended` holds the sum now
        return self._mlp(normed).add_(attended)


def fuse_layers(model: nn.Module) -> int:
    """Fuse what can be fused of a model whose modules were fused, in place.

    Returns:
        How many layers were fused.
    """
    layers = [module for module in model.modules() if _is_made_of_fused(module)]
    if not layers:
        return 0
    total = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]
    with torch.inference_mode():
        asked = _layer_calls(model, layers)
        return sum(_fuse_layer(layer, *call, num_layers=total) for layer, call in asked.items())


def _is_made_of_fused(module: nn.Module) -> bool:
    kinds = {
        "input_layernorm": FusedNorm,
        "self_attn": FusedAttention,
        "post_attention_layernorm": FusedNorm,
        "mlp": FusedGate,
    }
    children = dict(module.named_children())
    return children.keys() == kinds.keys() and all(
        isinstance(vars(children[name]).get("forward"), kind) for name, kind in kinds.items()
    )


def _layer_calls(
    model: nn.Module, layers: list[nn.Module]
) -> dict[nn.Module, tuple[torch.Tensor, dict[str, Any], torch.Tensor]]:
    """Return what each layer got (hidden states, keywords) and gave in a trial forward with a probe for attention."""
    calls: dict[nn.Module, tuple[torch.Tensor, dict[str, Any], torch.Tensor]] = {}

    def after(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if len(args) == 1 and isinstance(output, torch.Tensor):
            calls[module] = (args[0], keywords, output)

    def probe(
        _: nn.Module, query: torch.Tensor, __: torch.Tensor, value: torch.Tensor, *___: Any, **____: Any
    ) -> tuple[torch.Tensor, None]:
        return probe_result(query, value), None

    return calls if run_trial(model, layers, probe, after) else {}


def _fuse_layer(
    layer: Any,
    hidden: torch.Tensor,
    keywords: dict[str, Any],
    want: torch.Tensor,
    *,
    num_layers: int,
) -> bool:
    fused = FusedLayer(layer, is_last=layer.self_attn.layer_idx == num_layers - 1)
    config = layer.self_attn.config
    before = config._attn_implementation  # noqa: SLF001
    config._attn_implementation = PROBE_NAME  # noqa: SLF001
    rows = torch.tensor([1, TRIAL_ROWS - 1], device=hidden.device)
    of_rows = torch.equal if hidden.device.type == "cpu" else agree
    try:
        is_same = torch.equal(fused(hidden, **keywords), want)
        is_same = is_same and of_rows(fused.compute(hidden, rows, keywords), want[:, rows])
    except MODULE_ERRORS:
        return False
    finally:
        config._attn_implementation = before  # noqa: SLF001
    if is_same:
        layer.forward = fused
    return is_same
