"""Activations whose bits do not depend on how many threads compute them."""

from __future__ import annotations

from torch import nn

from engine.model.experts import RowInvariantBlock

#: Where transformers' models have theirs from.
_MODULES = ("transformers.activations", "torch.nn.modules.activation")


def fix_activations(model: nn.Module) -> int:
    """Give a loaded model's activations in float32 on a CPU another forward, in place; classes and module trees stay.

    Torch computes some of them in vectors, and what is left at the end of each thread's share one by one, with other
    bits (`engine.model.experts`). What was fused does not call them any more (`engine.model.fused`).

    Returns:
        How many there are.
    """
    found = [module for module in model.modules() if type(module).__module__ in _MODULES]
    for module in found:
        module.forward = RowInvariantBlock(module, None)
    return len(found)
