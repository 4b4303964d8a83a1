"""Mixtures of experts whose rows do not depend on their batch: who gets a token, what they say, and the sum of it.

Transformers multiplies all tokens of an expert at once, and how many there are depends on the batch; float32 rounds
differently with it. `pack_experts` gives single *instances* another `forward`; classes and module trees stay:

* Experts kept as 3-D weights (every family that has transformers' `use_experts_implementation`) multiply by packed
  linears. An instance is replaced only after it gave on trial input what its own forward gives.
* The block around them, its router included, runs under a mode in which `F.linear` over one of its weights goes to a
  packed linear, and functions that torch computes otherwise at the end of a tensor than within it to compositions of
  operators for which that makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from engine.kernels.cpu.native import NativeKernels
from engine.model.fused import MODULE_ERRORS, agree
from engine.model.linear import GroupedLinear, pack_linear

#: What transformers' decorator leaves on an instance, and the weights that it takes for granted.
_EXPERTS_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj", "_apply_gate", "config")

_TRIAL_TOKENS = 9

#: Largest |ours - theirs| / |theirs| that rounding explains: sums run in another order.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def pack_experts(model: nn.Module, kernels: NativeKernels | None) -> int:
    """Make the mixtures of experts of a loaded model on the CPU row-invariant, in place, as far as they can be.

    Call it after `pack_linears`. Weights that were packed are freed layer by layer.

    Returns:
        How many blocks with experts were made so.
    """
    count = 0
    with torch.inference_mode():
        for block in list(model.modules()):
            for experts in block.children():
                if _are_experts(experts) and _pack(experts, kernels):
                    block.forward = RowInvariantBlock(block, kernels)
                    count += 1
    return count


def _are_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _EXPERTS_ATTRIBUTES) and isinstance(module.down_proj, nn.Parameter)


def _pack(experts: Any, kernels: NativeKernels | None) -> bool:
    """Replace the forward of experts and free their weights; False where that would change what they compute."""
    weight: torch.Tensor = experts.down_proj
    if weight.dim() != 3 or weight.dtype not in _TOLERANCE:
        return False
    hidden = weight.shape[2] if experts.is_transposed else weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_TRIAL_TOKENS, hidden, generator=generator).to(weight.dtype)
    num_chosen = min(2, experts.num_experts)
    shares, chosen = torch.rand(_TRIAL_TOKENS, experts.num_experts, generator=generator).topk(num_chosen)
    try:
        packed = PackedExperts(experts, kernels)
        got = packed(tokens, chosen, shares.to(weight.dtype))
        want = experts(tokens, chosen, shares.to(weight.dtype))
    except MODULE_ERRORS:
        return False
    if not float((got - want).float().norm()) <= _TOLERANCE[weight.dtype] * float(want.float().norm()):
        return False
    for name in packed.weight_names:
        setattr(experts, name, None)
    experts.forward = packed
    return True


class PackedExperts:
    """Stands for the forward of experts that are kept as 3-D weights."""

    def __init__(self, experts: Any, kernels: NativeKernels | None) -> None:
        """Pack the weights of `experts`, which stay as they are."""
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        self.weight_names = (up_name, "down_proj")
        self._experts = experts
        self._kernels = kernels
        self._up = self._packed(up_name)
        self._down = self._packed("down_proj")
        self._mode = RowInvariant({})
        self._fused_gate = self._find_gate()

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Send each of `hidden_states [T, n]` to its experts `top_k_index [T, k]`; add up with `top_k_weights`."""
        num_tokens, num_chosen = top_k_index.shape
        order = torch.argsort(top_k_index.reshape(-1), stable=True)  # rows of one expert side by side
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self._experts.num_experts).tolist()
        rows = self._up(hidden_states[order // num_chosen], counts)
        rows = self._down(self._activate(rows), counts)
        if getattr(self._experts, "has_post_expert_norm", False):
            rows = self._experts.post_expert_norm(rows)
        rows = rows * top_k_weights.reshape(-1)[order, None]
        parts = torch.empty_like(rows)
        parts[order] = rows
        parts = parts.view(num_tokens, num_chosen, -1)
        total = parts[:, 0].float()
        for i in range(1, num_chosen):  # in the order of the router's choice
            total = total + parts[:, i]
        return total.to(hidden_states.dtype)

    def _packed(self, name: str) -> GroupedLinear:
        experts = self._experts
        weight: torch.Tensor = getattr(experts, name)
        bias: torch.Tensor | None = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return GroupedLinear(weight.transpose(1, 2) if experts.is_transposed else weight, bias, self._kernels)

    def _activate(self, rows: torch.Tensor) -> torch.Tensor:
        if self._fused_gate is not None:
            return self._fused_gate(rows)
        activate = self._experts._apply_gate if self._experts.has_gate else self._experts.act_fn  # noqa: SLF001
        with self._mode:
            out: torch.Tensor = activate(rows)
        return out

    def _find_gate(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return the compiled operator that computes these experts' gate; None where there is none."""
        kernels = self._kernels
        if kernels is None or not self._experts.has_gate:
            return None
        generator = torch.Generator().manual_seed(1)
        trial = torch.randn(64, self._up.out_features, generator=generator)
        for is_gelu in (False, True):

            def gate(rows: torch.Tensor, *, is_gelu: bool = is_gelu) -> torch.Tensor:
                opened, raised = rows.chunk(2, dim=-1)
                return kernels.gate(opened.contiguous(), raised.contiguous(), is_gelu=is_gelu)

            # In float32: bfloat16 does not tell gelu's two forms apart.
            if agree(gate(trial), self._experts._apply_gate(trial)):  # noqa: SLF001
                return gate
        return None


# ---------------------------------------------------------------------------------------------------------- the block


class RowInvariantBlock:
    """Stands for the forward of a block with experts: the same, in `RowInvariant`."""

    def __init__(self, block: nn.Module, kernels: NativeKernels | None) -> None:
        self._forward = block.forward
        weights = [module._parameters.get("weight") for module in block.modules()]  # noqa: SLF001  # none that is made anew
        self._mode = RowInvariant({tuple(w.shape): w for w in weights if w is not None and w.dim() == 2}, kernels)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Compute what the block's own forward computes."""
        with self._mode:
            return self._forward(*args, **keywords)


class RowInvariant(TorchFunctionMode):
    """While it is entered, a row's results in what the module says do not depend on the batch that it is in."""

    def __init__(self, weights: dict[tuple[int, ...], torch.Tensor], kernels: NativeKernels | None = None) -> None:
        """`weights` are what `F.linear` may be called over, by shape, also as copies in another dtype."""
        super().__init__()
        self._weights = weights
        self._kernels = kernels
        self._packed: dict[tuple[tuple[int, ...], torch.dtype], nn.Module | None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute what `func` computes."""
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        same = _SAME_EVERYWHERE.get(func)
        return func(*args, **kwargs) if same is None else same(*args, **kwargs)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        key = (tuple(weight.shape), weight.dtype)
        if key not in self._packed:
            known = self._weights.get(key[0])
            is_known = known is not None and torch.equal(known.to(weight.dtype), weight)
            self._packed[key] = pack_linear(weight, None, self._kernels) if is_known else None
        packed = self._packed[key]
        if packed is None:
            return functional.linear(x, weight, bias)
        out: torch.Tensor = packed(x)
        return out if bias is None else out + bias


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.reciprocal(1 + torch.exp(-x.float())).to(x.dtype)


def _silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:  # noqa: ARG001  # torch's signature
    return (x.float() / (1 + torch.exp(-x.float()))).to(x.dtype)


def _gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    wide = x.float()
    if approximate == "tanh":
        return (0.5 * wide * (1 + torch.tanh(0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)))).to(x.dtype)
    return (0.5 * wide * (1 + torch.erf(0.7071067811865476 * wide))).to(x.dtype)


#: In float32 torch computes these in vectors, and what is left at the end of a tensor or of a thread's share of it one
#: by one, with other bits (2.13; exp, tanh, erf and arithmetic: the same).
_SAME_EVERYWHERE: dict[Any, Callable[..., torch.Tensor]] = {
    torch.sigmoid: _sigmoid,
    torch.Tensor.sigmoid: _sigmoid,
    functional.sigmoid: _sigmoid,
    functional.silu: _silu,
    functional.gelu: _gelu,
}
