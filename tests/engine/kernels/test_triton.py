"""Triton's kernels, interpreted on this CPU, against torch's operators, and the bits they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.protocol import AttentionOptions, KvScales, LayerUse, PrefillSpan, PrefillSpans
from engine.kernels.reference import TORCH_KERNELS
from engine.memory.kv_pool import KvPool, LayerSpec
from tests.interpreted import triton_kernels

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NEAR = {torch.float32: 5e-6, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def kernels():
    return triton_kernels()


@pytest.fixture
def row_by_row(kernels, monkeypatch):
    """Let the interpreter's products give a row the same bits wherever it lies, as a GPU's do; numpy's do not."""
    from triton.runtime import interpreter

    def dot(_builder, a, b, d, _input_precision, _max_num_imprecise_acc):
        product = np.einsum("ik,kj->ij", a.data, b.data, optimize=False)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


class World:
    """Some sequences in a pool whose other blocks hold NaN, and queries for all of their positions."""

    def __init__(self, lens, *, heads, kv_heads, k_dim, v_dim, block_size=16, dtype=torch.float32, seed=0, scales=None):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.lens, self.block_size, self.k_dim, self.scales = lens, block_size, k_dim, scales
        kept = dtype if scales is None else torch.float8_e4m3fn
        width = -(-max(lens) // block_size) + 1
        num_blocks = sum(-(-length // block_size) for length in lens) + 2
        pool = KvPool([LayerSpec(kv_heads, k_dim, v_dim)] * 2, block_size, kept, "cpu", num_blocks=num_blocks)
        pool.data.view(torch.uint8).fill_(0xFF)  # no number, in every dtype
        self.k, self.v = pool.k[1], pool.v[1]
        order = torch.randperm(num_blocks, generator=generator).tolist()
        self.tables = torch.full((len(lens), width), order.pop(), dtype=torch.int32)
        self.query = []
        for slot, length in enumerate(lens):
            count = -(-length // block_size)
            self.tables[slot, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
            at = torch.arange(length)
            places = self.tables[slot, at // block_size].long(), at % block_size
            TORCH_KERNELS.write_kv(
                random(length, kv_heads, k_dim), random(length, kv_heads, v_dim), self.k, self.v, *places, scales
            )
            self.query.append(random(heads, length, k_dim).transpose(0, 1))
        self.sinks = random(heads)

    def options(self, **how):
        how["sinks"] = self.sinks if how.pop("has_sinks", False) else None
        scales = self.scales or KvScales(1.0, 1.0)
        return AttentionOptions(self.k_dim**-0.5 * scales.k, value_scale=scales.v, **how)

    def decode(self, kernels, rows, options, max_kv_len=None):
        """`rows`: (slot, keys) of each; a row without keys is what fills a captured step up."""
        query = torch.stack([self.query[slot][max(length - 1, 0)] for slot, length in rows])
        lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
        slots = torch.tensor([slot for slot, _ in rows])
        longest = max(length for _, length in rows) if max_kv_len is None else max_kv_len
        return kernels.decode_attention(query, self.k, self.v, self.tables, slots, lens, longest, options)

    def prefill(self, kernels, chunks, options):
        """`chunks`: (slot, begin, end) of each, positions."""
        spans, rows = [], 0
        for slot, begin, end in chunks:
            spans.append(PrefillSpan(rows, rows + end - begin, end, slot))
            rows += end - begin
        query = torch.cat([self.query[slot][begin:end] for slot, begin, end in chunks])
        return kernels.prefill_attention(query, self.k, self.v, self.tables, PrefillSpans.of(spans, CPU), options)


dims = st.sampled_from([7, 12, 16, 24, 32, 64, 80, 192])
limits = st.fixed_dictionaries(
    {
        "window": st.none() | st.integers(1, 100),
        "chunk": st.none() | st.integers(1, 100),
        "softcap": st.none() | st.floats(0.5, 30),
        "has_sinks": st.booleans(),
    }
)


@st.composite
def shapes(draw):
    kv_heads = draw(st.integers(1, 2))
    return World(
        draw(st.lists(st.integers(1, 90), min_size=1, max_size=3)),
        heads=kv_heads * draw(st.sampled_from([1, 3, 8])),
        kv_heads=kv_heads,
        k_dim=draw(dims),
        v_dim=draw(dims),
        block_size=draw(st.sampled_from([1, 8, 16, 32])),
        dtype=draw(st.sampled_from(list(NEAR))),
        seed=draw(st.integers(0, 99)),
        scales=draw(st.none() | st.builds(KvScales, st.sampled_from([0.0625, 1.0]), st.sampled_from([0.125, 2.0]))),
    )


@settings(max_examples=20, deadline=None)
@given(world=shapes(), how=limits, draw=st.data())
def test_random_layers_and_mixtures_of_lengths_attend_as_torch_does(kernels, world, how, draw):
    options = world.options(**how)
    slots = range(len(world.lens))
    rows = [(slot, draw.draw(st.integers(1, world.lens[slot]))) for slot in slots]
    near = NEAR[world.query[0].dtype]
    torch.testing.assert_close(
        world.decode(kernels, rows, options), world.decode(TORCH_KERNELS, rows, options), atol=near, rtol=near
    )
    chunks = [(slot, draw.draw(st.integers(0, length - 1)), length) for slot, length in rows]
    torch.testing.assert_close(
        world.prefill(kernels, chunks, options), world.prefill(TORCH_KERNELS, chunks, options), atol=near, rtol=near
    )


PLAIN = {"heads": 4, "kv_heads": 2, "k_dim": 16, "v_dim": 16}


@pytest.mark.parametrize("how", [{}, {"window": 700}, {"chunk": 512, "has_sinks": True}], ids=str)
def test_a_row_of_many_splits_attends_as_torch_does(kernels, how):
    world = World([1300, 40], **PLAIN)
    rows = [(0, 1300), (1, 40), (0, 257), (0, 256), (0, 1025)]
    got = world.decode(kernels, rows, world.options(**how))
    torch.testing.assert_close(got, world.decode(TORCH_KERNELS, rows, world.options(**how)), atol=5e-6, rtol=5e-6)


def test_beyond_as_many_splits_as_there_may_be_they_are_longer(kernels):
    world = World([16500], heads=1, kv_heads=1, k_dim=16, v_dim=16)
    got = world.decode(kernels, [(0, 16500)], world.options())
    torch.testing.assert_close(got, world.decode(TORCH_KERNELS, [(0, 16500)], world.options()), atol=5e-6, rtol=5e-6)


def test_rows_without_keys_fill_a_step_up_and_change_nothing(kernels):
    world = World([300, 20], **PLAIN)
    rows = [(0, 300), (1, 20)]
    alone = world.decode(kernels, rows, world.options())
    filled = world.decode(kernels, [*rows, (0, 0), (1, 0)], world.options(), max_kv_len=2048)
    assert torch.equal(filled[:2], alone)
    assert torch.equal(filled[2:], torch.zeros_like(filled[2:]))


def test_more_rows_than_a_launch_takes_are_several_launches(kernels, monkeypatch):
    monkeypatch.setattr("engine.kernels.triton.decode.MAX_ROWS", 2)
    world = World([50, 20], **PLAIN)
    rows = [(0, 50), (1, 20), (0, 3), (1, 1), (0, 17)]
    got = world.decode(kernels, rows, world.options())
    torch.testing.assert_close(got, world.decode(TORCH_KERNELS, rows, world.options()), atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("how", [{}, {"window": 100}, {"softcap": 3.0, "has_sinks": True}], ids=str)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_for_any_number_of_programs(
    kernels, row_by_row, monkeypatch, how
):
    world = World([600, 90], **PLAIN)
    rows, options = [(0, 600), (1, 90), (0, 256), (0, 1)], world.options(**how)
    together = world.decode(kernels, rows, options)
    for number, row in enumerate(rows):
        assert torch.equal(world.decode(kernels, [row], options)[0], together[number])
    monkeypatch.setattr("engine.kernels.triton.decode.programs_of", lambda *_: 1)
    assert torch.equal(world.decode(kernels, rows, options), together)


CUT = [{}, {"window": 50}, {"window": 150}, {"chunk": 64, "softcap": 3.0, "has_sinks": True}]


@pytest.mark.parametrize("how", CUT, ids=str)
def test_how_a_prompt_is_cut_does_not_show(kernels, row_by_row, how):
    world = World([200, 70], **PLAIN)
    options = world.options(**how)
    whole = world.prefill(kernels, [(0, 0, 200)], options)
    for cuts in ((0, 1, 200), (0, 37, 100, 200), (0, 128, 200)):
        pieces = [
            world.prefill(kernels, [(1, 0, 70), (0, begin, end)], options)[70:]
            for begin, end in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(pieces), whole)


def test_written_rows_lie_where_torch_puts_them_and_a_negative_block_is_nowhere(kernels):
    ours, theirs = (World([200], heads=3, kv_heads=3, k_dim=24, v_dim=12) for _ in range(2))
    slots = torch.randperm(13 * 16)[:150]
    key = torch.randn(3, 150, 24).transpose(0, 1)  # as transformers hands it over: heads first
    value = torch.randn(150, 3, 12)
    blocks, offsets = slots // 16, slots % 16
    TORCH_KERNELS.write_kv(key[:140], value[:140], theirs.k, theirs.v, blocks[:140], offsets[:140])
    blocks[140:] = -1
    kernels.write_kv(key, value, ours.k, ours.v, blocks, offsets)
    assert torch.equal(ours.k.nan_to_num(), theirs.k.nan_to_num())
    assert torch.equal(ours.v.nan_to_num(), theirs.v.nan_to_num())


@pytest.mark.parametrize(
    ("dtype", "head", "is_served"),
    [(torch.float32, 64, True), (torch.float16, 576, True), (torch.bfloat16, 577, False), (torch.float64, 64, False)],
)
def test_what_the_kernels_do_not_take_is_left_to_torch(kernels, dtype, head, is_served):
    assert kernels.supports(LayerUse(LayerSpec(2, head, 64), num_heads=4), dtype, CPU) is is_served
