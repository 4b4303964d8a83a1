"""Linear layers on the CPU with weights packed for oneDNN: faster, and each row's bits independent of its batch.

`F.linear` in fp32 gives a row other bits in a batch of 1, of 2-3 and of 4 or more rows; a packed weight gives the same
bits in any batch of at least two rows (measured 2026-11: torch 2.13, 1 and 2 threads, 21 shapes), and with one row
too unless the inner dimension is large. `PackedLinear` doubles a lone row for weights where that shows. With AMX none
of this holds, so oneDNN is kept from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.cpu.instruction_set import cap_onednn

cap_onednn()  # when this is imported, nothing of ours has computed yet

#: Part of the kernel path in block names.
PACKED_NAME = "onednn-1"

#: The batch size that the packed layout is chosen for; any batch is computed right.
_TYPICAL_ROWS = 16

#: Up to here a lone row got the bits it gets in a batch; from 1,536 on it did not (2026-11; the module says how).
_MAX_LONE_FEATURES = 1024


class PackedLinear(nn.Module):
    """A linear layer over a weight in oneDNN's own layout. CPU, inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack `weight [out_features, in_features]` (copied) and `bias [out_features]` (kept)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = _pack(weight.detach())
        self._doubles_lone_row = self._lone_row_differs(weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, unpacked anew at each access: for models that look at a weight directly."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn `x [..., in_features]` into `[..., out_features]`, of x's dtype."""
        if self._doubles_lone_row and x.numel() == self.in_features:
            rows = x.reshape(1, self.in_features).expand(2, -1)
            return self._apply_packed(rows)[:1].view(*x.shape[:-1], self.out_features)
        return self._apply_packed(x)

    def _apply_packed(self, x: torch.Tensor) -> torch.Tensor:
        return _linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def _lone_row_differs(self, dtype: torch.dtype) -> bool:
        """Tell whether one row alone gets other bits than within a batch."""
        if self.in_features > _MAX_LONE_FEATURES:
            return True  # in bf16 rounding hides it from all but a few of the outputs
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(8, self.in_features, generator=generator).to(dtype)
        batch = self._apply_packed(rows)
        return any(not torch.equal(self._apply_packed(rows[i : i + 1]), batch[i : i + 1]) for i in range(8))


def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether packed linears in `dtype` work here (the operators are private ones of torch)."""
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


def pack_linears(model: nn.Module) -> int:
    """Replace every plain linear layer of `model` by a PackedLinear; the originals are freed one by one.

    `nn.Linear` and gpt2's Conv1D, a linear with its weight transposed; subclasses compute something else and stay.
    A weight shared with an embedding table stays for the table; the linear gets a packed copy, since logits too must
    not depend on the batch.

    Returns:
        How many were replaced.
    """
    packed: dict[int, PackedLinear] = {}  # by id of the linear: a module used in two places stays one
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, Conv1D):
                continue
            if id(child) not in packed:
                linear: Any = child
                weight = linear.weight if type(child) is nn.Linear else linear.weight.t()
                packed[id(child)] = PackedLinear(weight, linear.bias)
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
