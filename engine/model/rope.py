"""Rotary frequencies that do not depend on who else is in the step.

transformers' longrope looks at the largest position of the forward pass: past the model's original length all rows get
other frequencies. In a packed step that would be the neighbour's length, and KV already stored would not match. So the
choice is made once, at load, by the longest sequence that may come. Its "dynamic" type changes only past
max_position_embeddings, which no sequence of ours reaches: it need not look at positions either, for which a GPU's
host would wait in every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

_LENGTH_DEPENDENT = "longrope"
_FAR = "dynamic"  #: transformers asks whether it is within the type's name


def original_length(config: PretrainedConfig) -> int | None:
    """Return up to how many tokens the model has the frequencies it was first trained with; None: at any length."""
    parameters: Any = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]
    lengths = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == _LENGTH_DEPENDENT]
    return min(lengths, default=None)


def fix_frequencies(model: nn.Module, max_model_len: int) -> None:
    """Let `model` use, at every length, the frequencies that it has for a sequence of `max_model_len` tokens."""
    device = next(model.parameters()).device
    last = torch.tensor([[max_model_len - 1]], device=device)
    x = torch.zeros(1, device=device)
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind = getattr(module, "rope_type", None)
        if kind == _LENGTH_DEPENDENT:
            module(x, last)  # sets the frequencies of that length, which stay when the type stops asking
            module.rope_type = "default"
        elif isinstance(kind, str) and _FAR in kind:
            module.rope_type = "default"
        elif isinstance(kind, dict):
            for layer_type in [name for name, value in kind.items() if value == _LENGTH_DEPENDENT]:
                module(x, last, layer_type)
                kind[layer_type] = "default"
            for layer_type in [name for name, value in kind.items() if _FAR in value]:
                kind[layer_type] = "default"
