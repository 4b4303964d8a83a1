"""What decides whether two workers may share blocks: not how they compute but which bits come out.

`path_digest` hashes what a model gave in its trial, and what its linears and attention kernels give on inputs that are
large enough to be cut, split and blocked. Paths that give the same bits, such as linears by tiles and by dot products,
have the same digest; a CPU, a library or a build that rounds otherwise has another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from blake3 import blake3
from torch.nn import functional

from engine.kernels.cpu.native import NativeKernels
from engine.kernels.protocol import AttentionKernels, AttentionOptions, LayerUse, PrefillSpan, PrefillSpans
from engine.memory.kv_pool import KvPool, LayerSpec
from engine.model.float8 import kept_dtype
from engine.model.linear import linear_name, pack_linear

_BLOCK_SIZE = 16
_NUM_TOKENS = 600  #: beyond a split of decode attention and several tiles of prefill
_DECODE_LENS = (1, 130, 515, _NUM_TOKENS)
_FEATURES = 4100  #: beyond every cut of a product's depth that was seen
_NUM_ROWS = 67


def path_digest(
    trial: Iterable[torch.Tensor],
    layers: Sequence[LayerUse],
    kernels: Sequence[AttentionKernels],
    dtype: torch.dtype,
    device: torch.device,
    native: NativeKernels | None,
) -> bytes:
    """Hash to 32 bytes the bits of `trial`, of one product in `dtype`, and of attention as each of `layers` uses it."""
    hasher = blake3()
    with torch.inference_mode():
        distinct = dict.fromkeys(zip(layers, kernels, strict=True))
        parts = [*trial, *_product_bits(dtype, device, native)]
        for layer, kernel in distinct:
            parts += _attention_bits(layer, kernel, dtype, device)
    for part in parts:
        hasher.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return hasher.digest()


def _product_bits(dtype: torch.dtype, device: torch.device, native: NativeKernels | None) -> list[torch.Tensor]:
    """Products whose sums cancel, so that rounding is all that is left, as many rows and as one."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(_FEATURES, generator=generator)
    rows, weight = (torch.randn(n, _FEATURES // 2, generator=generator) for n in (_NUM_ROWS, 48))
    rows = torch.cat([rows, -rows], 1)[:, order].to(dtype).to(device)
    weight = torch.cat([weight, weight], 1)[:, order].to(dtype).to(device)
    if device.type != "cpu" or linear_name(dtype, native) == "torch":
        return [functional.linear(rows, weight), functional.linear(rows[:1], weight)]
    packed = pack_linear(weight, None, native)
    return [packed(rows), packed(rows[:1])]


def _attention_bits(
    layer: LayerUse, kernels: AttentionKernels, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Prefill and decode attention of one KV head and the query heads that share it, as the layer uses them."""
    generator = torch.Generator().manual_seed(0)
    group = layer.num_heads // layer.spec.num_kv_heads
    spec = LayerSpec(1, layer.spec.k_dim, layer.spec.v_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    num_blocks = -(-_NUM_TOKENS // _BLOCK_SIZE)
    pool = KvPool([spec], _BLOCK_SIZE, kept_dtype([layer], dtype), device, num_blocks=num_blocks)
    k_view, v_view = pool.k[0], pool.v[0]
    at = torch.arange(_NUM_TOKENS, device=device)
    key, value = random(_NUM_TOKENS, 1, spec.k_dim), random(_NUM_TOKENS, 1, spec.v_dim)
    kernels.write_kv(key, value, k_view, v_view, at // _BLOCK_SIZE, at % _BLOCK_SIZE, layer.scales)
    sinks = random(group) if layer.has_sinks else None
    options = AttentionOptions(spec.k_dim**-0.5, layer.window, layer.softcap, sinks, layer.chunk)
    query = random(_NUM_TOKENS, group, spec.k_dim)
    table = torch.arange(num_blocks, dtype=torch.int32, device=device)[None]
    spans = PrefillSpans.of([PrefillSpan(0, _NUM_TOKENS, _NUM_TOKENS, 0)], device)
    lens = torch.tensor(_DECODE_LENS, dtype=torch.int32, device=device)
    slots = torch.zeros(len(lens), dtype=torch.int64, device=device)
    rows = query[lens.long() - 1]
    return [
        kernels.prefill_attention(query, k_view, v_view, table, spans, options),
        kernels.decode_attention(rows, k_view, v_view, table, slots, lens, _NUM_TOKENS, options),
    ]
