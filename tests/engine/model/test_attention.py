import math

import pytest
import torch
from transformers import AutoConfig, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from engine.kernels import reference
from engine.kernels.protocol import AttentionOptions, LayerUse, PrefillSpan, PrefillSpans
from engine.kernels.reference import SEGMENT_TOKENS, TORCH_KERNELS, segments
from engine.memory.kv_pool import KvPool, LayerSpec
from engine.model.attention import (
    ATTENTION_NAME,
    LayerAttention,
    StepAttention,
    choose_kernels,
    paged_attention,
    step_attention,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "chunk": {"chunk": 16},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 20, "softcap": 2.0, "sinks": True},
    "multi-query": {"heads": (4, 1)},
    "no groups": {"heads": (3, 3)},
    "v narrower than k": {"dims": (24, 12)},
    "v wider than k": {"dims": (16, 40), "window": 9},
    "v narrower, sinks": {"dims": (24, 12), "sinks": True},
}


def attend(query, keys, values, position, *, scaling, window=None, softcap=None, sinks=None, chunk=None):
    """One query [heads, k_dim] at `position` over all keys [kv_heads, n, k_dim], in float64, key by key."""
    num_heads, group = query.shape[0], query.shape[0] // keys.shape[0]
    out = torch.zeros(num_heads, values.shape[2], dtype=torch.float64)
    for head in range(num_heads):
        weights = {}
        for j in range(position + 1):
            if window is not None and position - j >= window:
                continue
            if chunk is not None and position // chunk != j // chunk:
                continue
            score = float(query[head].double() @ keys[head // group, j].double()) * scaling
            weights[j] = math.exp(softcap * math.tanh(score / softcap) if softcap else score)
        total = sum(weights.values()) + (math.exp(float(sinks[head])) if sinks is not None else 0)
        for j, weight in weights.items():
            out[head] += weight / total * values[head // group, j].double()
    return out.float()


def filled(num_tokens, heads=(4, 2), dims=(16, 16), dtype=torch.float32, block_size=8, table=None):
    """Queries, keys, values of one sequence, and a pool whose blocks, in the order of `table`, hold them."""
    torch.manual_seed(3)
    query = torch.randn(num_tokens, heads[0], dims[0]).to(dtype)
    key = torch.randn(num_tokens, heads[1], dims[0]).to(dtype)
    value = torch.randn(num_tokens, heads[1], dims[1]).to(dtype)
    num_blocks = -(-num_tokens // block_size)
    pool = KvPool([LayerSpec(heads[1], *dims)], block_size, dtype, "cpu", num_blocks=num_blocks + 2)
    pool.data.fill_(float("nan"))  # what is not written must not be read
    table = torch.randperm(num_blocks + 2, generator=torch.Generator().manual_seed(0))[:num_blocks].int()
    positions = torch.arange(num_tokens)
    TORCH_KERNELS.write_kv(
        key, value, pool.k[0], pool.v[0], table[positions // block_size].long(), positions % block_size
    )
    return query, key.transpose(0, 1), value.transpose(0, 1), pool, table


def options_of(case):
    case = dict(case)
    shape = {name: case.pop(name) for name in ("heads", "dims") if name in case}
    num_heads = shape.get("heads", (4, 2))[0]
    sinks = torch.linspace(-1, 1, num_heads) if case.pop("sinks", False) else None
    options = {"scaling": 0.3, "window": None, "softcap": None, "chunk": None, "sinks": sinks, **case}
    return shape, options


@pytest.mark.parametrize("case", CASES)
def test_decode_rows_equal_attention_written_out(case):
    shape, how = options_of(CASES[case])
    options = AttentionOptions(**how)
    query, keys, values, pool, table = filled(45, **shape)
    lens = torch.tensor([1, 8, 9, 17, 33, 45], dtype=torch.int32)
    rows = query[lens.long() - 1]
    tables = (table[None], torch.zeros(len(lens), dtype=torch.int64))
    got = TORCH_KERNELS.decode_attention(rows, pool.k[0], pool.v[0], *tables, lens, 45, options)
    wanted = torch.stack([attend(query[n - 1], keys, values, n - 1, **how) for n in lens.tolist()])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_padded_decode_of_other_devices_equals_the_row_by_row_one(case):
    shape, how = options_of(CASES[case])
    options = AttentionOptions(**how)
    query, _, _, pool, table = filled(45, **shape)
    lens = torch.tensor([1, 8, 9, 17, 33, 45], dtype=torch.int32)
    rows = query[lens.long() - 1]
    tables = (torch.stack([table.flip(0), table]), torch.ones(len(lens), dtype=torch.int64))
    by_row = TORCH_KERNELS.decode_attention(rows, pool.k[0], pool.v[0], *tables, lens, 45, options)
    padded = reference._decode_padded(rows, pool.k[0], pool.v[0], *tables, lens, 45, options)
    torch.testing.assert_close(padded, by_row, rtol=1e-5, atol=1e-5)


def prefilled(query, pool, table, begin, end, options):
    spans = PrefillSpans.of([PrefillSpan(0, end - begin, end, 0)], torch.device("cpu"))
    return TORCH_KERNELS.prefill_attention(query[begin:end], pool.k[0], pool.v[0], table[None], spans, options)


@pytest.mark.slow
@pytest.mark.parametrize(("begin", "end"), [(0, 45), (0, 1), (13, 45), (16, 32), (44, 45)])
@pytest.mark.parametrize("case", CASES)
def test_a_prefill_chunk_equals_attention_written_out(case, begin, end):
    shape, how = options_of(CASES[case])
    options = AttentionOptions(**how)
    query, keys, values, pool, table = filled(45, **shape)
    got = prefilled(query, pool, table, begin, end, options)
    wanted = torch.stack([attend(query[i], keys, values, i, **how) for i in range(begin, end)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "window", "softcap", "v narrower than k"])
def test_how_a_prompt_was_cut_at_multiples_of_the_segment_does_not_show(case, dtype):
    shape, how = options_of(CASES[case])
    options = AttentionOptions(**how)
    length = 3 * SEGMENT_TOKENS + 40
    query, _, _, pool, table = filled(length, dtype=dtype, **shape)

    def compute(*cuts):
        return torch.cat(
            [
                prefilled(query, pool, table, begin, end, options)
                for begin, end in zip((0, *cuts), (*cuts, length), strict=True)
            ]
        )

    whole = compute()
    assert torch.equal(compute(SEGMENT_TOKENS), whole)
    assert torch.equal(compute(2 * SEGMENT_TOKENS), whole)
    assert torch.equal(compute(SEGMENT_TOKENS, 2 * SEGMENT_TOKENS, 3 * SEGMENT_TOKENS), whole)


def test_segments_end_at_multiples_counted_from_position_zero():
    assert list(segments(0, 256)) == [(0, 256)]
    assert list(segments(100, 600)) == [(100, 256), (256, 512), (512, 600)]
    assert list(segments(256, 257)) == [(256, 257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "window", "sinks"])
def test_a_decode_row_has_the_same_bits_alone_and_in_a_batch(case, dtype):
    shape, how = options_of(CASES[case])
    options = AttentionOptions(**how)
    query, _, _, pool, table = filled(300, dtype=dtype, **shape)
    lens = torch.tensor([300, 1, 257, 30], dtype=torch.int32)
    rows, slots = query[lens.long() - 1], torch.zeros(4, dtype=torch.int64)
    views = (pool.k[0], pool.v[0], table[None])
    together = TORCH_KERNELS.decode_attention(rows, *views, slots, lens, 300, options)
    for row in range(4):
        one = slice(row, row + 1)
        alone = TORCH_KERNELS.decode_attention(rows[one], *views, slots[one], lens[one], int(lens[row]), options)
        assert torch.equal(alone, together[one])


class _Layer(torch.nn.Module):
    layer_idx = 0


def _packed(pool, table, query, key, value):
    """A step of one decode row (position 20) and one chunk (positions 0 to 19) of one sequence."""
    positions = torch.tensor([20, *range(20)])
    step = StepAttention(
        layers=[LayerAttention(pool.k[0], pool.v[0], TORCH_KERNELS, None)],
        block_ids=table[positions // 8].long(),
        offsets=positions % 8,
        num_decode_rows=1,
        block_tables=table[None],
        slots=torch.zeros(1, dtype=torch.int64),
        kv_lens=torch.tensor([21], dtype=torch.int32),
        max_kv_len=21,
        spans=PrefillSpans.of([PrefillSpan(0, 20, 20, 0)], torch.device("cpu")),
    )
    return step, [tensor[positions].transpose(0, 1)[None] for tensor in (query, key, value)]


def test_a_packed_step_stores_its_kv_before_it_attends_with_or_without_the_keyword():
    query, keys, values, pool, table = filled(21)
    pool.data.fill_(float("nan"))
    step, tensors = _packed(pool, table, query, keys.transpose(0, 1), values.transpose(0, 1))
    out, weights = paged_attention(_Layer(), *tensors, None, scaling=0.3, kv_step=step)
    assert weights is None
    assert out.shape == (1, 21, 4, 16)
    wanted = torch.stack([attend(query[i], keys, values, i, scaling=0.3) for i in (20, *range(20))])
    torch.testing.assert_close(out[0], wanted, rtol=1e-5, atol=1e-5)
    with step_attention(step):
        assert torch.equal(paged_attention(_Layer(), *tensors, None, scaling=0.3)[0], out)
    with pytest.raises(LookupError):
        paged_attention(_Layer(), *tensors, None, scaling=0.3)


def test_transformers_builds_no_mask_for_an_attention_name_it_does_not_know():
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    config = AutoConfig.for_model("gemma2", num_hidden_layers=1, sliding_window=4)
    config._attn_implementation = ATTENTION_NAME
    for create in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
        mask = create(
            config=config,
            inputs_embeds=torch.zeros(1, 12, 8),
            attention_mask=None,
            past_key_values=None,
            position_ids=torch.arange(12)[None],
        )
        assert mask is None


class _Kernels:
    name = "only-wide"

    def supports(self, layer, dtype, device):
        return layer.spec.k_dim == 64


def test_each_layer_gets_the_first_kernels_that_serve_it():
    wide, narrow = (LayerUse(LayerSpec(1, dim, dim), 1) for dim in (64, 16))
    kernels = _Kernels()
    chosen = choose_kernels([wide, narrow], torch.float32, torch.device("cpu"), [kernels])
    assert chosen == [kernels, TORCH_KERNELS]
