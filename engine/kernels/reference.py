"""Attention in torch's own operators: any device, any shape. All other kernels are held to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from engine.kernels.protocol import AttentionKernels, AttentionOptions, LayerUse, PrefillSpans

#: Torch's prefill attention works in segments cut at multiples of this many positions, counted from position 0,
#: so that how the scheduler cut the chunks does not show in the result.
SEGMENT_TOKENS = 256


class TorchKernels:
    """The three operations in torch's operators: any device, dtype, head size. The reference for all others."""

    name = "torch-2"
    is_capturable = False

    def supports(self, layer: LayerUse, dtype: torch.dtype, device: torch.device) -> bool:
        """Take every layer, dtype and device."""
        return True

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_ids: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Implement `AttentionKernels.write_kv` by one indexed store for keys and one for values."""
        k_view.transpose(1, 2).index_put_((block_ids, offsets), key)
        v_view.transpose(1, 2).index_put_((block_ids, offsets), value)

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
        """Implement `AttentionKernels.decode_attention`: row by row on a CPU, elsewhere in one padded gather.

        The gather is padded to the longest sequence, so that no length is read back from the device.
        """
        if query.device.type != "cpu":
            return _decode_padded(query, k_view, v_view, block_tables, slots, kv_lens, max_kv_len, options)
        out = query.new_empty(query.shape[0], query.shape[1], v_view.shape[3])
        for row, (slot, kv_len) in enumerate(zip(slots.tolist(), kv_lens.tolist(), strict=True)):
            first = _first_visible(kv_len - 1, options)
            keys = _gather(k_view, block_tables[slot], first, kv_len)  # [num_kv_heads, kv_len - first, k_dim]
            values = _gather(v_view, block_tables[slot], first, kv_len)
            grouped = query[row].view(keys.shape[0], -1, query.shape[2])  # [num_kv_heads, group, k_dim]
            # torch's own attention gives so few rows in float32 other bits with other numbers of threads (2.13)
            if options.softcap is None and options.sinks is None and query.dtype is not torch.float32:
                rows = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], scale=options.scaling)[0]
            else:
                rows = _explicit(grouped, keys, values, None, options)
            out[row] = rows.reshape(query.shape[1], -1)
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
        """Implement `AttentionKernels.prefill_attention` segment by segment, by torch's own attention where it can."""
        chunks = [
            self._chunk(
                query[span.begin : span.end],
                k_view,
                v_view,
                span.blocks_of(block_tables, k_view.shape[2]),
                span.kv_len,
                options,
            )
            for span in spans.spans
        ]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _chunk(
        self,
        query: torch.Tensor,
        k_view: torch.Tensor,
        v_view: torch.Tensor,
        block_table: torch.Tensor,
        kv_len: int,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attend with one chunk; `block_table [num_blocks]` is its sequence's."""
        start = kv_len - query.shape[0]
        origin = _first_visible(start, options)
        all_keys = _gather(k_view, block_table, origin, kv_len)  # [num_kv_heads, kv_len - origin, k_dim]
        all_values = _gather(v_view, block_table, origin, kv_len)
        heads_first = query.transpose(0, 1)  # [num_heads, T, k_dim]
        out = query.new_empty(query.shape[0], query.shape[1], v_view.shape[3])
        for begin, end in segments(start, kv_len):
            first = _first_visible(begin, options)
            keys = all_keys[:, first - origin : end - origin]
            values = all_values[:, first - origin : end - origin]
            rows = heads_first[:, begin - start : end - start]
            mask = _mask(begin, end, first, options, query.device)
            if options.softcap is None and options.sinks is None:
                # begin == first: the mask is the plain triangle, and the kernel need not read one
                result = F.scaled_dot_product_attention(
                    rows[None],
                    keys[None],
                    values[None],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=options.scaling,
                    enable_gqa=rows.shape[0] != keys.shape[0],
                )[0]
            else:
                result = _prefill_explicit(rows, keys, values, mask, options)
            out[begin - start : end - start] = result.transpose(0, 1)
        return out


def segments(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut positions `[start, end)` at multiples of SEGMENT_TOKENS."""
    while start < end:
        stop = min(end, (start // SEGMENT_TOKENS + 1) * SEGMENT_TOKENS)
        yield start, stop
        start = stop


def _first_visible(position: int, options: AttentionOptions) -> int:
    """Return the first position that `position` attends to."""
    window, chunk = options.window, options.chunk
    first = 0 if window is None else max(0, position - window + 1)
    return first if chunk is None else max(first, position // chunk * chunk)


def _gather(view: torch.Tensor, block_table: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Copy tokens `[first, end)` of a sequence out of `view`: `[num_kv_heads, end - first, dim]`."""
    block_size = view.shape[2]
    head_block = first // block_size
    blocks = view[block_table[head_block : -(-end // block_size)]]  # [blocks, num_kv_heads, block_size, dim]
    tokens = blocks.transpose(0, 1).reshape(view.shape[1], -1, view.shape[3])
    return tokens[:, first - head_block * block_size : end - head_block * block_size]


def _mask(begin: int, end: int, first: int, options: AttentionOptions, device: torch.device) -> torch.Tensor | None:
    """Return which row sees which key: `[end - begin, end - first]` bool, or None for the plain triangle."""
    window, chunk = options.window, options.chunk
    if (
        begin == first
        and (window is None or end - first <= window)
        and (chunk is None or begin // chunk == (end - 1) // chunk)
    ):
        return None
    i = torch.arange(begin, end, device=device)[:, None]
    j = torch.arange(first, end, device=device)[None]
    mask = j <= i
    if window is not None:
        mask &= i - j < window
    if chunk is not None:
        mask &= i // chunk == j // chunk
    return mask


def _explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Compute attention written out, softmax in float32.

    Args:
        query: `[..., num_kv_heads, rows, k_dim]`, the heads of a group as rows.
        keys: `[..., num_kv_heads, kv, k_dim]`.
        values: `[..., num_kv_heads, kv, v_dim]`.
        mask: True where a row sees a key, broadcast over the scores; None: everywhere.
        options: scaling, softcap and sinks count, where `num_heads / num_kv_heads` divides the rows.

    Returns:
        `[..., num_kv_heads, rows, v_dim]`.
    """
    softcap, sinks = options.softcap, options.sinks
    scores = (query @ keys.transpose(-1, -2)) * options.scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return scores.softmax(-1).to(values.dtype) @ values
    num_kv_heads, rows = scores.shape[-3], scores.shape[-2]
    per_head = sinks.float().view(num_kv_heads, -1)  # [num_kv_heads, group]
    column = per_head.repeat_interleave(rows // per_head.shape[1], dim=1)[..., None]
    column = column.expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values


def _prefill_explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
) -> torch.Tensor:
    """Compute `_explicit` for `query [num_heads, T, k_dim]`, causal where `mask` is None."""
    num_heads, num_rows, _ = query.shape
    num_kv_heads = keys.shape[0]
    if mask is None:
        mask = torch.ones(num_rows, num_rows, dtype=torch.bool, device=query.device).tril()
    group = num_heads // num_kv_heads
    grouped = query.reshape(num_kv_heads, group * num_rows, -1)
    out = _explicit(grouped, keys, values, mask.repeat(group, 1), options)
    return out.view(num_heads, num_rows, -1)


def _decode_padded(
    query: torch.Tensor,
    k_view: torch.Tensor,
    v_view: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    kv_lens: torch.Tensor,
    max_kv_len: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Compute decode rows over one gather padded to the longest sequence."""
    num_rows, num_heads, k_dim = query.shape
    num_kv_heads, block_size = k_view.shape[1], k_view.shape[2]
    tables = block_tables[:, : -(-max_kv_len // block_size)][slots]
    keys = k_view[tables].transpose(1, 2).reshape(num_rows, num_kv_heads, -1, k_dim)
    values = v_view[tables].transpose(1, 2).reshape(num_rows, num_kv_heads, -1, v_view.shape[3])
    j = torch.arange(keys.shape[2], device=query.device)[None]
    last = kv_lens[:, None] - 1
    mask = j <= last
    if options.window is not None:
        mask &= last - j < options.window
    if options.chunk is not None:
        mask &= last // options.chunk == j // options.chunk
    values.masked_fill_(~mask[:, None, :, None], 0)  # no weight hides a NaN of another sequence
    grouped = query.reshape(num_rows, num_kv_heads, -1, k_dim)
    out = _explicit(grouped, keys, values, mask[:, None, None], options)
    return out.reshape(num_rows, num_heads, -1)


TORCH_KERNELS: AttentionKernels = TorchKernels()
