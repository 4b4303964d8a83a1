"""What tokens weigh, on a GPU: each question reads the logits once, and writes what it adds up.

`device_weights.TorchWeights` says what is meant; both differ by the last bits of their exponential functions alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.sampling.device_weights import Sums
from engine.sampling.settings import UNIT

#: Logits of a program. Rows are cut, so that few of them fill a GPU.
BLOCK = 2048
_UNIT = tl.constexpr(UNIT)
_SIGN = tl.constexpr(2**31)


class TritonWeights:
    """`DrawWeights` by kernels that read nothing but logits."""

    def __init__(self, logits: Tensor, tops: Tensor, temperature: Tensor) -> None:
        self.logits = logits
        self._of_rows = (logits, tops.contiguous(), temperature.contiguous())

    def sums(self, min_p: Tensor) -> Sums:
        """Do as `DrawWeights` says."""
        found = self._zeros(4)
        self._launch(_sum_up, min_p, found)
        return Sums(*found.unbind(1))

    def units(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """Do as `DrawWeights` says."""
        return self._histogram(prefix, shift, width, counts=False)

    def present(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """Do as `DrawWeights` says."""
        return self._histogram(prefix, shift, width, counts=True)

    def units_from(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Do as `DrawWeights` says."""
        found = self._zeros(2)
        self._launch(_sum_from, key, found)
        return found[:, 0], found[:, 1]

    def _histogram(self, prefix: Tensor, shift: int, width: int, *, counts: bool) -> Tensor:
        found = self._zeros(1 << width)
        self._launch(_spread, prefix, found, SHIFT=shift, WIDTH=width, COUNTS=counts)
        return found

    def _zeros(self, num_columns: int) -> Tensor:
        return torch.zeros((len(self.logits), num_columns), dtype=torch.int64, device=self.logits.device)

    def _launch(self, kernel: Any, of_rows: Tensor, found: Tensor, **constants: Any) -> None:
        num_rows, vocab_size = self.logits.shape
        grid = (num_rows, triton.cdiv(vocab_size, BLOCK))
        of_rows = of_rows.contiguous()
        kernel[grid](*self._of_rows, of_rows, found, self.logits.stride(0), vocab_size, **constants, BLOCK=BLOCK)


# Triton compiles these from their source, and takes no annotations but its own.
@triton.jit
def _load(logits, row, row_stride, vocab_size, BLOCK: tl.constexpr):
    """Load a program's logits, masked ones behind the row's end."""
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.load(logits + row * row_stride + place, mask=place < vocab_size, other=float("-inf"))


@triton.jit
def _weights(logit, tops, temperatures, row):
    """Return weights as parts of the likeliest one's, float64, and in units, int64."""
    top = tl.load(tops + row).to(tl.float64)
    weight = tl.exp((logit.to(tl.float64) - top) / tl.load(temperatures + row).to(tl.float64))
    return weight, (weight * _UNIT + 0.5).to(tl.int64)


@triton.jit
def _keys(logit):
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # of both zeros the same
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + _SIGN


@triton.jit
def _sum_up(logits, tops, temperatures, min_p, found, row_stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logit = _load(logits, row, row_stride, vocab_size, BLOCK)
    weight, units = _weights(logit, tops, temperatures, row)
    mass = (tl.exp((logit - tl.load(tops + row)) / tl.load(temperatures + row)) * _UNIT).to(tl.int64)
    heavy = tl.where(weight >= tl.load(min_p + row), units, 0)
    present = (logit > float("-inf")).to(tl.int64)
    tl.atomic_add(found + row * 4, tl.sum(units, axis=0), sem="relaxed")
    tl.atomic_add(found + row * 4 + 1, tl.sum(mass, axis=0), sem="relaxed")
    tl.atomic_add(found + row * 4 + 2, tl.sum(heavy, axis=0), sem="relaxed")
    tl.atomic_add(found + row * 4 + 3, tl.sum(present, axis=0), sem="relaxed")


@triton.jit
def _spread(
    logits,
    tops,
    temperatures,
    prefixes,
    found,
    row_stride,
    vocab_size,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logit = _load(logits, row, row_stride, vocab_size, BLOCK)
    key = _keys(logit)
    if COUNTS:
        weight = (logit > float("-inf")).to(tl.int64)
    else:
        _, weight = _weights(logit, tops, temperatures, row)
    inside = (key >> (SHIFT + WIDTH)) == tl.load(prefixes + row)
    digit = (key >> SHIFT) & ((1 << WIDTH) - 1)
    tl.atomic_add(found + row * (1 << WIDTH) + digit, weight, mask=inside & (weight > 0), sem="relaxed")


@triton.jit
def _sum_from(logits, tops, temperatures, keys, found, row_stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logit = _load(logits, row, row_stride, vocab_size, BLOCK)
    _, units = _weights(logit, tops, temperatures, row)
    key, wanted = _keys(logit), tl.load(keys + row)
    tl.atomic_add(found + row * 2, tl.sum(tl.where(key > wanted, units, 0), axis=0), sem="relaxed")
    tl.atomic_add(found + row * 2 + 1, tl.sum(tl.where(key == wanted, units, 0), axis=0), sem="relaxed")
