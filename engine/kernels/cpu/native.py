"""The compiled kernels as the engine sees them: attention over the paged pool and linears for CPUs, in C++.

A row's result depends on its own position, keys and values only: never on the batch it is in, on how its prompt was cut
into chunks, on what of it was reused, or on the number of threads.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from engine.kernels.cpu.library import KERNELS
from engine.kernels.protocol import AttentionOptions, LayerUse, PrefillSpans
from messages.request import SamplingParams

_log = logging.getLogger(__name__)

MAX_HEAD_SIZE = 1024


class NativeKernels:
    """`AttentionKernels` in C++: float32 and bfloat16, any head size up to MAX_HEAD_SIZE, any group.

    Thread-safe; each call uses torch's threads and releases the GIL.
    """

    is_capturable = False

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        #: How bfloat16 linears are computed; None where no way of this machine gives the bits that it should.
        self.linear_path = _choose_linear_path(module)
        #: Prefill attention in bfloat16 goes on tiles where linears do, which shows that they compute as they should.
        self._is_on_tiles = self.linear_path == "tiles" and module.has_bf16_dot
        dots = "-tiles" if self._is_on_tiles else "-bf16dot" if module.has_bf16_dot else ""
        self.name = f"native-{module.vector_floats}{dots}"

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
        out = torch.empty((query.size(0), query.size(1), v_view.size(3)), dtype=query.dtype)
        self._module.decode_attention(query, k_view, v_view, block_tables, slots, kv_lens, *_plain(options), out)
        return out

    def prefill_attention(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_tables: torch.Tensor,
        spans: PrefillSpans,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Implement `AttentionKernels.prefill_attention`: bfloat16 rounds the weights before they meet the values."""
        out = torch.empty((query.size(0), query.size(1), v_view.size(3)), dtype=query.dtype)
        for span in spans.spans:
            rows, table = slice(span.begin, span.end), span.blocks_of(block_tables, k_view.size(2))
            self._module.prefill_attention(
                query[rows], k_view, v_view, table, span.kv_len, *_plain(options), self._is_on_tiles, out[rows]
            )
        return out

    def pack_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Pack `weights [num_groups, out_features, in_features]` bfloat16 for `linear`; valid in this process only."""
        return pack_weights(self._module, weights.contiguous(), str(self.linear_path))

    def unpack_weights(self, words: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
        """Return what `pack_weights` was given."""
        weights = torch.empty((len(words), out_features, in_features), dtype=torch.bfloat16)
        self._module.unpack_weights(words, self.linear_path, weights)
        return weights

    def linear(
        self,
        x: torch.Tensor,
        words: torch.Tensor,
        bias: torch.Tensor | None,
        out_features: int,
        counts: Sequence[int] | None = None,
        *,
        is_gelu: bool | None = None,
    ) -> torch.Tensor:
        """Multiply rows by packed weights, bfloat16: a row has the same bits in any batch and on every path.

        The order of summation is in `linear.h`. NaN comes out as one NaN, subnormal numbers count as zeros.

        Args:
            x: `[num_rows, in_features]`.
            words: as `pack_weights` returned them.
            bias: `[num_groups, out_features]` contiguous, or None; `[num_groups, 2, out_features]` of a gated one.
            out_features: width of the result.
            counts: so many rows, one after the other, go to each group; None: all go to the one group.
            is_gelu: a gated layer's activation, gelu's tanh form or silu: `words` are those of the gate and, one behind
                the other in dimension 1, of what it lets through; the result is what `gate` makes of both products.

        Returns:
            `[num_rows, out_features]`.
        """
        out = torch.empty((len(x), out_features), dtype=torch.bfloat16)
        counts = [len(x)] if counts is None else list(counts)
        self._module.linear(x, words, bias, counts, self.linear_path, is_gelu, out)
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
        out = torch.empty_like(x)
        self._module.rms_norm(x, weight, eps, adds_one, rounds_first, out)
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
        out = torch.empty_like(delta)
        self._module.add_rms_norm(residual, delta, weight, eps, adds_one, rounds_first, out)
        return out

    def gate(self, gate: torch.Tensor, up: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
        """Compute `silu(gate) * up`, or gelu's tanh form; overwrite and return `gate`. Both `[..., n]`, contiguous."""
        self._module.gate(gate, up, is_gelu)
        return gate

    def penalize(self, logits: torch.Tensor, counts: torch.Tensor, params: SamplingParams, out: torch.Tensor) -> None:
        """Write logits with the penalties of `params` into `out`, each operation rounded, as torch's operators give it.

        Args:
            logits: `[vocab_size]` float32.
            counts: `[vocab_size]` int32: -1 of a token that did not come yet, else how often it is in the output.
            params: with the three penalties.
            out: `[vocab_size]` float32.
        """
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._module.penalize(logits, counts, *penalties, out)

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


def _choose_linear_path(module: ModuleType) -> str | None:
    """Choose the fastest path for bfloat16 linears whose bits are those of the definition; takes some milliseconds."""
    generator = torch.Generator().manual_seed(0)
    for path in module.linear_paths.split():
        if all(_is_as_defined(module, path, depth, generator) for depth in (96, 100)):
            return str(path)
        _log.warning("linears by %r give other bits here than they should: not used", path)
    return None


def _is_as_defined(module: ModuleType, path: str, depth: int, generator: torch.Generator) -> bool:
    """Tell whether some products, of which rounding is all that is left, are those of the definition."""
    half = torch.randn(41, depth // 2, generator=generator)
    rows = torch.cat([half, -half], 1).bfloat16()
    half = torch.randn(40, depth // 2, generator=generator)
    weight = torch.cat([half, half], 1).bfloat16()
    bias = (torch.randn(40, generator=generator) * 1e-6).bfloat16()
    rows[:2, :3] = torch.tensor([[float("inf"), float("nan"), 1.0], [1e-39, 1e-39, 1e38]])  # 1e-39 is subnormal
    wanted, got = torch.empty(2, len(rows), len(weight), dtype=torch.bfloat16)
    module.linear_by_definition(rows, weight, bias, wanted)
    words = pack_weights(module, weight[None], path)
    for count in (1, 3, 16, len(rows)):
        module.linear(rows[:count], words, bias, [count], path, None, got[:count])
        if not torch.equal(got[:count].view(torch.int16), wanted[:count].view(torch.int16)):
            return False
    return True


def pack_weights(module: ModuleType, weights: torch.Tensor, path: str) -> torch.Tensor:
    """Pack `weights [num_groups, out_features, in_features]` bfloat16, contiguous, for the linears of `path`."""
    groups, width, depth = weights.shape
    blocks, panels = -(-width // module.block_columns), -(-depth // module.panel_depth)
    words = torch.empty((groups, blocks, panels, module.panel_words), dtype=torch.int32)
    module.pack_weights(weights, path, words)
    return words


def import_library(path: Path) -> ModuleType:
    """Import a built library.

    Raises:
        ImportError: it does not load.
    """
    spec = importlib.util.spec_from_file_location(KERNELS.name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load_kernels() -> NativeKernels | None:
    """Load the kernels that were built for this machine by `python -m engine.kernels.cpu.build`, or came in a wheel.

    Never compiles. None, with log lines saying why, where they were not built or do not load.
    """
    kernels = KERNELS.opened(lambda path: NativeKernels(import_library(path)))
    if kernels is None:
        built = "python -m engine.kernels.cpu.build"
        _log.warning("kernels not built, or do not load, using torch's operators (build them: %s)", built)
    return kernels
