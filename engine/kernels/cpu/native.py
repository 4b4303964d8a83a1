"""The compiled kernels as the engine sees them: attention over the paged pool for CPUs, in C++.

A row's result depends on its own position, keys and values only: never on the batch it is in, on how its prompt was cut
into chunks, on what of it was reused, or on the number of threads.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from engine.kernels.cpu.build import import_library, library_path
from engine.kernels.protocol import AttentionOptions, LayerUse

_log = logging.getLogger(__name__)

MAX_HEAD_SIZE = 1024


class NativeKernels:
    """`AttentionKernels` in C++: float32 and bfloat16, any head size up to MAX_HEAD_SIZE, any group.

    Thread-safe; each call uses torch's threads and releases the GIL.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.name = f"native-1-{module.vector_floats}{'-bf16dot' if module.has_bf16_dot else ''}"

    def supports(self, layer: LayerUse, dtype: torch.dtype, device: torch.device) -> bool:
        """Take every layer on a CPU in float32 or bfloat16 with heads of at most MAX_HEAD_SIZE."""
        is_small = max(layer.spec.k_dim, layer.spec.v_dim) <= MAX_HEAD_SIZE
        return is_small and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_ids: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Implement `AttentionKernels.write_kv` in one parallel pass over the tokens."""
        self._module.write_kv(key, value, k_view, v_view, block_ids, offsets)

    def decode_attention(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_tables: torch.Tensor,
        slots: torch.Tensor,
        kv_lens: torch.Tensor,
        max_kv_len: int,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Implement `AttentionKernels.decode_attention`: split every 512 keys; a group's heads share what is read."""
        out: torch.Tensor = self._module.decode_attention(
            query, k_view, v_view, block_tables, slots, kv_lens, *_plain(options)
        )
        return out

    def prefill_attention(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_table: torch.Tensor,
        kv_len: int,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Implement `AttentionKernels.prefill_attention`: bfloat16 rounds the weights before they meet the values."""
        out: torch.Tensor = self._module.prefill_attention(query, k_view, v_view, block_table, kv_len, *_plain(options))
        return out

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, adds_one: bool, rounds_first: bool
    ) -> torch.Tensor:
        """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, summed in float32.

        Args:
            x: `[..., n]`, contiguous.
            weight: `[n]`, of x's dtype.
            eps: under the root.
            adds_one: the factor is `1 + weight`.
            rounds_first: round to x's dtype before the weight; otherwise the whole product is float32.
        """
        out: torch.Tensor = self._module.rms_norm(x, weight, eps, adds_one, rounds_first)
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
        """Compute `rms_norm(residual + delta)`; the sum is left in `delta`. Both `[..., n]`, contiguous."""
        out: torch.Tensor = self._module.add_rms_norm(residual, delta, weight, eps, adds_one, rounds_first)
        return out

    def gate(self, gate: torch.Tensor, up: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
        """Compute `silu(gate) * up`, or gelu's tanh form; overwrite and return `gate`. Both `[..., n]`, contiguous."""
        self._module.gate(gate, up, is_gelu)
        return gate

    def rotate(self, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Apply rotary embedding in place: of each head the elements i and i + r / 2 turn together, i < r / 2.

        Args:
            rows: `[num_tokens, num_heads, head_dim]`, last dimension contiguous.
            cosine: `[num_tokens, r]` or `[1, num_tokens, r]`, contiguous, r at most head_dim; what is left stays.
            sine: shaped as `cosine`.
        """
        self._module.rotate(rows, cosine, sine)


def _plain(options: AttentionOptions) -> tuple[float, int, float, torch.Tensor | None, int]:
    """The options as the C++ side takes them: 0 is none."""
    sinks = None if options.sinks is None else options.sinks.detach().float().contiguous()
    return options.scaling, options.window or 0, options.softcap or 0.0, sinks, options.chunk or 0


@functools.cache
def load_kernels() -> NativeKernels | None:
    """Load the kernels built for this machine by `python -m engine.kernels.cpu.build`.

    Never compiles. None, with one log line saying why, where they were not built or do not load.
    """
    path = library_path()
    if not path.exists():
        _log.warning("kernels not built, using torch's operators (build them: python -m engine.kernels.cpu.build)")
        return None
    try:
        return NativeKernels(import_library(path))
    except ImportError as error:
        _log.warning("kernels do not load, using torch's operators: %s", error)
        return None
