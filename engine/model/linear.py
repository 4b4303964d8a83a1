"""Linear layers on the CPU over packed weights: fast, and each row's bits independent of its batch.

bfloat16 goes to the kernels' own linears, whose order of summation is fixed (`engine/kernels/cpu/linear.h`). float32,
and bfloat16 where no kernels were built, goes to oneDNN. `F.linear` in float32 gives a row other bits in a batch of 1,
of 2-3 and of 4 or more rows; a weight packed for oneDNN gives the same bits in any batch of at least two rows (measured
2026-11: torch 2.13, 1 and 2 threads, 21 shapes), and with one row too unless the inner dimension is large.
`PackedLinear` doubles a lone row for weights where that shows. With AMX oneDNN cuts bfloat16 by the number of rows and
threads, but calls of 32 rows gave the same bits at every depth that was tried: there it gets 32 at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.cpu.native import NativeKernels

#: The batch size that oneDNN's packed layout is chosen for; any batch is computed right.
_TYPICAL_ROWS = 16

#: Up to here a lone row got the bits it gets in a batch; from 1,536 on it did not (2026-11; the module says how).
_MAX_LONE_FEATURES = 1024

#: Rows that oneDNN gets per call in bfloat16 where it computes with AMX.
_AMX_ROWS = 32

#: Columns of a block of packed words: `linear.h`.
_BLOCK_COLUMNS = 32


class NativeLinear(nn.Module):
    """A bfloat16 linear layer of the compiled kernels. CPU, inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: NativeKernels) -> None:
        """Pack `weight [out_features, in_features]` (copied) and `bias [out_features]` (kept)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.kernels = kernels
        #: As `NativeKernels.pack_weights` gives them; a `MergedLinear` puts its own in their place.
        self.words = kernels.pack_weights(weight.detach()[None])

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, unpacked anew at each access: for models that look at a weight directly."""
        return self.kernels.unpack_weights(self.words, self.out_features, self.in_features)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn `x [..., in_features]` into `[..., out_features]`."""
        rows = x.reshape(-1, self.in_features)
        out = self.kernels.linear(rows, self.words, self.bias, self.out_features)
        return out.view(*x.shape[:-1], self.out_features)


class MergedLinear:
    """Native linears over the same rows as one: what they give, one behind the other, or gated. The same bits.

    Its words take the place of theirs: each goes on with its part of them.
    """

    def __init__(self, linears: Sequence[NativeLinear]) -> None:
        """Merge `linears`, of which `can_merge` said that it may be done."""
        self._kernels = linears[0].kernels
        self._in_features = linears[0].in_features
        self._widths = [linear.out_features for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        counts = [linear.words.shape[1] for linear in linears]
        self._words = torch.cat([linear.words for linear in linears], 1)
        for linear, words in zip(linears, torch.split(self._words, counts, 1), strict=True):
            linear.words = words

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn `x [..., in_features]` into each linear's `[..., out_features]`, side by side in memory."""
        return torch.split(self._multiply(x, sum(self._widths), None), self._widths, -1)

    def gated(self, x: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
        """Turn `x [..., in_features]` into what `NativeKernels.gate` makes of two linears' results."""
        return self._multiply(x, self._widths[0], is_gelu)

    def _multiply(self, x: torch.Tensor, width: int, is_gelu: bool | None) -> torch.Tensor:
        rows = x.reshape(-1, self._in_features)
        out = self._kernels.linear(rows, self._words, self._bias, width, is_gelu=is_gelu)
        return out.view(*x.shape[:-1], width)


def can_merge(modules: Sequence[object]) -> TypeGuard[Sequence[NativeLinear]]:
    """Tell whether these can be one `MergedLinear`: native, of the same rows, without gaps between their columns."""
    linears = [module for module in modules if isinstance(module, NativeLinear)]
    return (
        len(linears) == len(modules)
        and len({(linear.in_features, linear.bias is None) for linear in linears}) == 1
        and all(linear.out_features % _BLOCK_COLUMNS == 0 for linear in linears[:-1])
    )


class PackedLinear(nn.Module):
    """A linear layer over a weight in oneDNN's own layout. CPU, inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack `weight [out_features, in_features]` (copied) and `bias [out_features]` (kept)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = _pack(weight.detach())
        self._doubles_lone_row = _lone_row_differs(self.out_features, self.in_features, weight.dtype)
        has_amx = torch.cpu._is_amx_tile_supported()  # noqa: SLF001  # the public form came with torch 2.13
        self._max_rows = _AMX_ROWS if has_amx and weight.dtype is torch.bfloat16 else None

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, unpacked anew at each access: for models that look at a weight directly."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn `x [..., in_features]` into `[..., out_features]`, of x's dtype."""
        if self._max_rows is not None:
            rows = x.reshape(-1, self.in_features)
            out = _in_equal_calls(self._apply_packed, rows, self._max_rows, self.out_features)
            return out.view(*x.shape[:-1], self.out_features)
        if self._doubles_lone_row and x.numel() == self.in_features:
            rows = x.reshape(1, self.in_features).expand(2, -1)
            return self._apply_packed(rows)[:1].view(*x.shape[:-1], self.out_features)
        return self._apply_packed(x)

    def _apply_packed(self, x: torch.Tensor) -> torch.Tensor:
        return _linear_pointwise(x, self._packed, self.bias, "none", [], "")


def _in_equal_calls(
    multiply: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, size: int, out_features: int
) -> torch.Tensor:
    """Call `multiply` with exactly `size` rows at a time, the last of them padded with zeros."""
    out = rows.new_empty(len(rows), out_features)
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        whole = nn.functional.pad(part, (0, 0, 0, size - len(part)))
        out[begin : begin + size] = multiply(whole)[: len(part)]
    return out


@functools.cache
def _lone_row_differs(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Tell whether one row alone gets other bits of oneDNN than within a batch, by weights of this shape."""
    if in_features > _MAX_LONE_FEATURES:
        return True  # in bf16 rounding hides it from all but a few of the outputs
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, in_features, generator=generator).to(dtype)
    packed = _pack(torch.randn(out_features, in_features, generator=generator).to(dtype))
    batch = _linear_pointwise(rows, packed, None, "none", [], "")
    return any(
        not torch.equal(_linear_pointwise(rows[i : i + 1], packed, None, "none", [], ""), batch[i : i + 1])
        for i in range(8)
    )


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's packed linears in `dtype` work here (the operators are private ones of torch)."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(48, 64, generator=generator))
        rows = torch.randn(3, 64, generator=generator).to(dtype)
        try:
            got = PackedLinear(linear.weight, linear.bias)(rows)
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        return torch.allclose(got.float(), linear(rows).float(), rtol=2e-2, atol=2e-2)


def linear_name(dtype: torch.dtype, kernels: NativeKernels | None) -> str:
    """Name what computes linear layers in `dtype` here: tiles, dot or fma (`linear.h`), onednn, or torch."""
    if kernels is not None and kernels.linear_path is not None and dtype is torch.bfloat16:
        return kernels.linear_path
    return "onednn" if can_pack(dtype) else "torch"


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None, kernels: NativeKernels | None) -> nn.Module:
    """Make a layer of `weight [out_features, in_features]`, where `linear_name` of its dtype is not torch."""
    if kernels is not None and linear_name(weight.dtype, kernels) == kernels.linear_path:
        return NativeLinear(weight, bias, kernels)
    return PackedLinear(weight, bias)


class GroupedLinear:
    """Linear layers of one shape, one per group of rows: the experts of a layer. CPU, inference only."""

    def __init__(self, weights: torch.Tensor, biases: torch.Tensor | None, kernels: NativeKernels | None) -> None:
        """Pack `weights [num_groups, out_features, in_features]` (copied), with `biases [num_groups, out_features]`."""
        self.out_features = weights.shape[1]
        self._biases = None if biases is None else biases.detach().contiguous()
        self._kernels = kernels
        self._words: torch.Tensor | None = None
        self._linears: list[nn.Module] = []
        if kernels is not None and linear_name(weights.dtype, kernels) == kernels.linear_path:
            self._words = kernels.pack_weights(weights.detach())
        else:
            each = [None] * len(weights) if biases is None else biases.detach().unbind()
            self._linears = [PackedLinear(*pair) for pair in zip(weights, each, strict=True)]

    def __call__(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Turn `x [num_rows, in_features]` into `[num_rows, out_features]`: the next `counts[g]` rows are group g's."""
        if self._kernels is not None and self._words is not None:
            return self._kernels.linear(x, self._words, self._biases, self.out_features, counts)
        parts = [linear(rows) for linear, rows in zip(self._linears, torch.split(x, counts), strict=True) if len(rows)]
        return torch.cat(parts) if parts else x.new_empty(0, self.out_features)


def pack_linears(model: nn.Module, kernels: NativeKernels | None = None) -> int:
    """Replace every plain linear layer of `model` by one over a packed weight; the originals are freed one by one.

    `nn.Linear` and gpt2's Conv1D, a linear with its weight transposed; subclasses compute something else and stay.
    A weight shared with an embedding table stays for the table; the linear gets a packed copy, since logits too must
    not depend on the batch.

    Returns:
        How many were replaced.
    """
    packed: dict[int, nn.Module] = {}  # by id of the linear: a module used in two places stays one
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, Conv1D):
                continue
            if id(child) not in packed:
                linear: Any = child
                weight = linear.weight if type(child) is nn.Linear else linear.weight.t()
                packed[id(child)] = pack_linear(weight, linear.bias, kernels)
            setattr(parent, name, packed[id(child)])
    return len(packed)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    reorder: Any = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001  # see can_pack
    packed: torch.Tensor = reorder(weight.contiguous(), _TYPICAL_ROWS)
    return packed


def _linear_pointwise(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, post: str, scalars: list[float], algorithm: str
) -> torch.Tensor:
    multiply: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001  # see can_pack
    out: torch.Tensor = multiply(x, packed, bias, post, scalars, algorithm)
    return out
