"""What fused modules are computed with on a GPU: RMS norm, gate, rotation. A row has the same bits in any batch.

Each operation is rounded as torch's operators round it, one after the other, so that a module's own numbers come out.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
import triton
import triton.language as tl

from engine.kernels.protocol import KvScales, LayerOperators, PoolWrite
from engine.kernels.triton.shapes import is_interpreted
from engine.kernels.triton.store import heads_of, rotate_and_write, rotated

#: A row of a norm is held by one program.
MAX_ROW: Final = 32768
#: Numbers of a norm's program where rows are short: several rows, of which none shows in another.
_NUMBERS: Final = 1024
GATE_NUMBERS: Final = 1024


class TritonOperators:
    """`LayerOperators` in Triton: float32, float16 and bfloat16, on a GPU, or interpreted on a CPU."""

    def serves(self, tensor: torch.Tensor) -> bool:
        """Take tensors on a GPU; on a CPU where kernels run interpreted, which computes in bfloat16 wrongly."""
        if tensor.device.type == "cuda":
            return tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return is_interpreted() and tensor.dtype in (torch.float32, torch.float16)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, adds_one: bool, rounds_first: bool
    ) -> torch.Tensor:
        """Implement `LayerOperators.rms_norm`."""
        out = torch.empty_like(x)
        self._norm(x, None, weight, eps, adds_one=adds_one, rounds_first=rounds_first, out=out)
        return out

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        adds_one: bool,
        rounds_first: bool,
    ) -> torch.Tensor:
        """Implement `LayerOperators.add_rms_norm`."""
        out = torch.empty_like(delta)
        self._norm(delta, residual, weight, eps, adds_one=adds_one, rounds_first=rounds_first, out=out)
        return out

    def _norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        adds_one: bool,
        rounds_first: bool,
        out: torch.Tensor,
    ) -> None:
        size = weight.shape[0]
        if x.dtype != weight.dtype or size > MAX_ROW:
            raise TypeError(f"a norm of {size} {x.dtype}, {weight.dtype} weights: wanted one dtype, at most {MAX_ROW}")
        num_rows, padded = x.numel() // size, triton.next_power_of_2(size)
        rows = max(1, _NUMBERS // padded)
        _rms_norm[(triton.cdiv(num_rows, rows),)](
            x,
            x if residual is None else residual,
            weight,
            out,
            eps,
            num_rows,
            SIZE=size,
            PADDED=padded,
            ROWS=rows,
            ADDS_RESIDUAL=residual is not None,
            ADDS_ONE=adds_one,
            ROUNDS_FIRST=rounds_first,
            num_warps=norm_warps(padded),
            enable_fp_fusion=False,
        )

    def gate(self, gate: torch.Tensor, up: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
        """Implement `LayerOperators.gate`."""
        if gate.dtype != up.dtype or not (gate.is_contiguous() and up.is_contiguous()):
            raise TypeError(f"a gate of {gate.dtype} and {up.dtype}: wanted the same, contiguous")
        _gate[(triton.cdiv(gate.numel(), GATE_NUMBERS),)](
            gate, up, gate.numel(), IS_GELU=is_gelu, NUMBERS=GATE_NUMBERS, num_warps=4, enable_fp_fusion=False
        )
        return gate

    def rotate(self, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Implement `LayerOperators.rotate`."""
        num_tokens, num_heads, head_dim = rows.shape
        cosine, sine = _turns(rows, cosine, sine)
        half = cosine.shape[1] // 2
        if 2 * half > head_dim:
            raise ValueError(f"a rotation of {2 * half} numbers of heads of {head_dim}")
        padded = triton.next_power_of_2(half)
        heads = heads_of(num_heads, 2 * padded)
        _rotate[(num_tokens, triton.cdiv(num_heads, heads))](
            rows,
            cosine,
            sine,
            *rows.stride()[:2],
            NUM_HEADS=num_heads,
            HEADS=heads,
            HALF=half,
            PADDED=padded,
            num_warps=2,
            enable_fp_fusion=False,
        )

    def rotating_write(self, cosine: torch.Tensor, sine: torch.Tensor) -> PoolWrite | None:
        """Implement `LayerOperators.rotating_write`: one launch for rotations and KV."""
        return functools.partial(_rotate_and_write, cosine, sine)


def _rotate_and_write(
    cosine: torch.Tensor,
    sine: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
    scales: KvScales | None = None,
) -> None:
    turns = _turns(query, cosine, sine)
    rotate_and_write(query, key, value, *turns, k_view, v_view, block_ids, offsets, scales)


def _turns(rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `cosine` and `sine` as `[num_tokens, r]`."""
    shape = (rows.shape[0], cosine.shape[-1])
    if cosine.dtype != rows.dtype or cosine.numel() != shape[0] * shape[1] or sine.shape != cosine.shape:
        raise ValueError(f"a rotation {tuple(cosine.shape)} {cosine.dtype} for {tuple(rows.shape)} {rows.dtype}")
    return cosine.reshape(shape).contiguous(), sine.reshape(shape).contiguous()


def norm_warps(padded: int) -> int:
    """Return how many warps hold a row of a norm: 16 or 32 numbers a thread, at least."""
    return 4 if padded <= 4096 else 8 if padded <= 16384 else 16


TRITON_OPERATORS: Final[LayerOperators] = TritonOperators()


# Triton compiles these from their source, and takes no annotations but its own. What follows from the batch is not
# specialised on: another batch would want them compiled anew.
@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x,
    residual,
    weight,
    out,
    eps,
    num_rows,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS_RESIDUAL: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    kind = x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, PADDED)
    at = row[:, None] * SIZE + column[None, :]
    is_there = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    numbers = tl.load(x + at, mask=is_there, other=0.0).to(tl.float32)
    if ADDS_RESIDUAL:
        numbers += tl.load(residual + at, mask=is_there, other=0.0).to(tl.float32)
        numbers = numbers.to(kind)
        tl.store(x + at, numbers, mask=is_there)
        numbers = numbers.to(tl.float32)
    mean = tl.sum(numbers * numbers, 1) / SIZE
    numbers = numbers * tl.rsqrt(mean + eps)[:, None]
    if ROUNDS_FIRST:
        numbers = numbers.to(kind).to(tl.float32)
    factor = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    if ADDS_ONE:
        factor += 1.0
    tl.store(out + at, (numbers * factor[None, :]).to(kind), mask=is_there)


@triton.jit(do_not_specialize=["num_numbers"])
def _gate(gate, up, num_numbers, IS_GELU: tl.constexpr, NUMBERS: tl.constexpr):
    kind = gate.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    is_there = at < num_numbers
    opened = tl.load(gate + at, mask=is_there, other=0.0).to(tl.float32)
    inner = opened
    if IS_GELU:  # 0.5 * (1 + tanh(z)) is sigmoid(2 * z)
        inner = 1.5957691216057308 * (opened + 0.044715 * opened * opened * opened)
    opened = (opened * tl.sigmoid(inner)).to(kind).to(tl.float32)
    raised = tl.load(up + at, mask=is_there, other=0.0).to(tl.float32)
    tl.store(gate + at, (opened * raised).to(kind), mask=is_there)


@triton.jit
def _rotate(
    rows,
    cosine,
    sine,
    row_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    dim = tl.arange(0, PADDED)
    is_turned = (head < NUM_HEADS) & (dim < HALF)[None, :]
    at = rows + token * row_stride + head * head_stride + dim[None, :]
    first, second = tl.load(at, mask=is_turned, other=0.0), tl.load(at + HALF, mask=is_turned, other=0.0)
    first, second = rotated(first, second, cosine + token * (2 * HALF), sine + token * (2 * HALF), dim, HALF)
    tl.store(at, first, mask=is_turned)
    tl.store(at + HALF, second, mask=is_turned)
