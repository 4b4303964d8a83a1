"""The C++ kernels against torch's operators, and the bits they promise."""

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.kernels.cpu.library import KERNELS
from engine.kernels.cpu.native import MAX_HEAD_SIZE, load_kernels
from engine.kernels.protocol import AttentionKernels, AttentionOptions, LayerUse, PrefillSpan, PrefillSpans
from engine.kernels.reference import TORCH_KERNELS
from engine.memory.kv_pool import LayerSpec

PLAIN = AttentionOptions(scaling=0.25)
BLOCK_SIZE = 16
LENS = (1, 15, 16, 17, 511, 512, 513, 1100)


LOADERS = {"cpu": load_kernels}


@pytest.fixture(scope="module", params=LOADERS)
def kernels(request) -> AttentionKernels:
    """Every implementation beside the reference, which keeps the same bits only where chunks end at its segments."""
    loaded = LOADERS[request.param]()
    if loaded is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    return loaded


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """A pool of random K, V in shuffled blocks with room around them (so strides are not sizes), and queries."""

    def __init__(
        self, *, heads=4, kv_heads=2, k_dim=32, v_dim=32, dtype=torch.float32, kv_len=600, seed=0, layout="hnd"
    ):
        generator = torch.Generator().manual_seed(seed)
        self.num_blocks = -(-kv_len // BLOCK_SIZE) + 3
        elements = BLOCK_SIZE * kv_heads * (k_dim + v_dim) + 64
        data = torch.randn(self.num_blocks, elements, generator=generator).to(dtype)

        def view(dim, offset):
            heads_first = (elements, BLOCK_SIZE * dim, dim, 1)
            tokens_first = (elements, dim, kv_heads * dim, 1)
            shape = (self.num_blocks, kv_heads, BLOCK_SIZE, dim)
            return torch.as_strided(data, shape, heads_first if layout == "hnd" else tokens_first, offset)

        self.k, self.v = view(k_dim, 32), view(v_dim, 32 + BLOCK_SIZE * kv_heads * k_dim)
        self.table = torch.randperm(self.num_blocks, generator=generator).int()
        self.query = torch.randn(heads, kv_len, k_dim, generator=generator).to(dtype).transpose(0, 1)
        self.sinks = torch.randn(heads, generator=generator)
        self.scaling = k_dim**-0.5
        self.kv_len = kv_len

    def decode(self, kernels, lens, **options):
        """Rows of the sequence at these lengths, as one batch."""
        lens = torch.tensor(lens, dtype=torch.int32)
        rows = self.query[(lens - 1).long()]
        other = self.table.flip(0)
        return kernels.decode_attention(
            rows,
            self.k,
            self.v,
            torch.stack([other, self.table]),
            torch.ones(len(lens), dtype=torch.int64),
            lens,
            int(lens.max()),
            AttentionOptions(self.scaling, **options),
        )

    def prefill(self, kernels, start=0, end=None, **options):
        end = self.kv_len if end is None else end
        table = self.table[: -(-end // BLOCK_SIZE)].contiguous()
        return kernels.prefill_attention(
            self.query[start:end],
            self.k,
            self.v,
            table[None],
            one_span(end - start, end),
            AttentionOptions(self.scaling, **options),
        )


def one_span(num_rows: int, kv_len: int) -> PrefillSpans:
    return PrefillSpans.of([PrefillSpan(0, num_rows, kv_len, 0)], torch.device("cpu"))


def exact(case: Case, lens=None, **options) -> torch.Tensor:
    """Attention of the rows at `lens` (all by default) in float64, without blocks, tiles or torch's fused operators."""
    options = {"window": None, "softcap": None, "sinks": None, "chunk": None, **options}
    lens = range(1, case.kv_len + 1) if lens is None else lens
    keys, values = (
        view[case.table.long()].transpose(1, 2).flatten(0, 1)[: case.kv_len].double() for view in (case.k, case.v)
    )
    group = case.query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    i = torch.tensor(list(lens))[:, None] - 1
    j = torch.arange(case.kv_len)[None]
    mask = j <= i
    if options["window"]:
        mask &= i - j < options["window"]
    if options["chunk"]:
        mask &= i // options["chunk"] == j // options["chunk"]
    scores = torch.einsum("thd,jhd->htj", case.query[i[:, 0]].double(), keys) * case.scaling
    if options["softcap"]:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    scores = scores.masked_fill(~mask, float("-inf"))
    if options["sinks"] is not None:
        column = options["sinks"].double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : case.kv_len]
    return torch.einsum("htj,jhd->thd", weights, values)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    limit = 3e-6 if got.dtype == torch.float32 else 2e-2
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() < limit * max(1.0, want.abs().max())


OPTIONS = {
    "plain": {},
    "window": {"window": 40},
    "wide window": {"window": 300},
    "softcap": {"softcap": 2.0},
    "chunk": {"chunk": 96},
    "sinks": {"sinks": True},
    "all": {"window": 200, "softcap": 5.0, "sinks": True, "chunk": 256},
}


def options_of(case: Case, name: str) -> dict:
    options = dict(OPTIONS[name])
    if "sinks" in options:
        options["sinks"] = case.sinks
    return options


DTYPES = [torch.float32, torch.bfloat16]
SHAPES = {  # heads, kv_heads, k_dim, v_dim
    "multi-head 16": (2, 2, 16, 16),
    "group 3 x 64": (6, 2, 64, 64),
    "group 5 x 128": (5, 1, 128, 128),
    "group 8 x 8": (8, 1, 8, 8),
    "group 16 x 80": (16, 1, 80, 80),
    "unlike 24/12": (4, 4, 24, 12),
    "unlike 16/128": (4, 2, 16, 128),
    "latent 192/128": (2, 2, 192, 128),
    "odd 7/9": (2, 1, 7, 9),
    "large 256": (2, 1, 256, 256),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_decode_and_prefill_equal_plain_attention_for_every_head_shape(kernels, dtype, shape, layout):
    heads, kv_heads, k_dim, v_dim = SHAPES[shape]
    case = Case(heads=heads, kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim, dtype=dtype, kv_len=300, layout=layout)
    want = exact(case)
    assert_near(case.prefill(kernels), want)
    lens = [1, 16, 17, 299, 300]
    assert_near(case.decode(kernels, lens), want[[n - 1 for n in lens]])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_decode_and_prefill_equal_plain_attention_under_every_option(kernels, dtype, name):
    case = Case(heads=6, kv_heads=2, dtype=dtype, kv_len=max(LENS))
    options = options_of(case, name)
    want = exact(case, **options)
    assert_near(case.decode(kernels, LENS, **options), want[[n - 1 for n in LENS]])
    assert_near(case.prefill(kernels, **options), want)


@pytest.mark.parametrize("length", LENS)
def test_prefill_of_every_length_equals_torch(kernels, length):
    case = Case(kv_len=length)
    torch.testing.assert_close(case.prefill(kernels), case.prefill(TORCH_KERNELS), atol=3e-6, rtol=1e-5)


def test_bfloat16_is_as_near_to_the_truth_as_torch(kernels):
    case = Case(heads=6, kv_heads=2, k_dim=64, v_dim=64, dtype=torch.bfloat16, kv_len=700)
    want = exact(case)

    def error(out):
        return (out.double() - want).pow(2).mean().sqrt()

    assert error(case.prefill(kernels)) < 1.1 * error(case.prefill(TORCH_KERNELS))
    lens = range(1, 700, 7)
    rows = [n - 1 for n in lens]
    assert (case.decode(kernels, list(lens)).double() - want[rows]).pow(2).mean().sqrt() < 1.1 * error(
        case.prefill(TORCH_KERNELS)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_decode_row_has_the_same_bits_alone_and_in_any_batch(kernels, dtype, name):
    case = Case(heads=6, kv_heads=2, k_dim=64, v_dim=64, dtype=dtype, kv_len=1100)
    options = options_of(case, name)
    batch = case.decode(kernels, LENS, **options)
    backwards = case.decode(kernels, LENS[::-1], **options).flip(0)
    alone = torch.cat([case.decode(kernels, [n], **options) for n in LENS])
    assert torch.equal(batch, alone)
    assert torch.equal(batch, backwards)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_prompt_has_the_same_bits_whole_and_in_any_chunks(kernels, dtype, name):
    case = Case(heads=6, kv_heads=2, k_dim=64, v_dim=64, dtype=dtype, kv_len=700)
    options = options_of(case, name)
    whole = case.prefill(kernels, **options)
    for borders in ([0, 1, 17, 128, 129, 500, 700], [0, 64, 128, 256, 512, 700], [0, 333, 700]):
        parts = [case.prefill(kernels, a, b, **options) for a, b in itertools.pairwise(borders)]
        assert torch.equal(torch.cat(parts), whole)
    one_by_one = [case.prefill(kernels, n - 1, n, **options) for n in (1, 40, 129, 512, 700)]
    assert torch.equal(torch.cat(one_by_one), whole[[0, 39, 128, 511, 699]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_threads_do_not_change_a_bit(kernels, dtype, name):
    case = Case(heads=6, kv_heads=2, k_dim=64, v_dim=64, dtype=dtype, kv_len=1100)
    options = options_of(case, name)
    one = case.decode(kernels, LENS, **options), case.prefill(kernels, **options)
    torch.set_num_threads(2)
    two = case.decode(kernels, LENS, **options), case.prefill(kernels, **options)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_behind_a_sequences_end_is_never_read_into_it(kernels, dtype):
    case = Case(dtype=dtype, kv_len=150)
    want = case.decode(kernels, [131]), case.prefill(kernels, 0, 131)
    last_block = int(case.table[131 // BLOCK_SIZE])
    for view in (case.k, case.v):
        view[last_block, :, 131 % BLOCK_SIZE :] = float("nan")
        view[case.table[131 // BLOCK_SIZE + 1 :].long()] = float("nan")
    assert torch.equal(case.decode(kernels, [131]), want[0])
    assert torch.equal(case.prefill(kernels, 0, 131), want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_poisoned_key_shows_in_the_rows_that_see_it_and_in_no_earlier_ones(kernels, dtype):
    case = Case(dtype=dtype, kv_len=300)
    want = case.prefill(kernels)
    case.k[int(case.table[200 // BLOCK_SIZE]), :, 200 % BLOCK_SIZE] = float("nan")
    got = case.prefill(kernels)
    assert torch.equal(got[:200], want[:200])
    assert got[200:].isnan().all()
    assert case.decode(kernels, [201]).isnan().all()


def test_scores_far_apart_neither_overflow_nor_vanish(kernels):
    case = Case(kv_len=300)
    case.query.mul_(200.0)
    want = exact(case)
    assert (case.prefill(kernels).double() - want).abs().max() < 1e-3
    assert (case.decode(kernels, [300]).double() - want[-1:]).abs().max() < 1e-3


def test_blocks_beyond_two_to_the_31_elements_are_reached(kernels):
    # Only the pages that are touched take memory.
    block_elements, num_blocks = 1 << 26, 40
    data = torch.empty(num_blocks * block_elements, dtype=torch.bfloat16)
    k, v = (
        torch.as_strided(data, (num_blocks, 1, BLOCK_SIZE, 16), (block_elements, 256, 16, 1), offset)
        for offset in (0, 256)
    )
    key, value = torch.randn(2, 5, 1, 16).bfloat16()
    kernels.write_kv(key, value, k, v, torch.full((5,), 39), torch.arange(5))
    assert torch.equal(k[39, 0, :5], key[:, 0])
    table = torch.tensor([39], dtype=torch.int32)
    rows = kernels.prefill_attention(key, k, v, table[None], one_span(5, 5), PLAIN)
    small = [torch.zeros(1, 1, BLOCK_SIZE, 16).bfloat16() for _ in range(2)]
    for view, new in zip(small, (key, value), strict=True):
        view[0, 0, :5] = new[:, 0]
    zero = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(rows, kernels.prefill_attention(key, *small, zero[None], one_span(5, 5), PLAIN))
    lens, slots = torch.tensor([5], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    far, near = (
        kernels.decode_attention(key[4:], *views, blocks[None], slots, lens, 5, PLAIN)
        for views, blocks in (((k, v), table), (small, zero))
    )
    assert torch.equal(far, near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_written_rows_lie_where_torch_puts_them_and_nothing_else_changes(kernels, dtype, layout):
    ours, theirs = (Case(kv_heads=3, heads=3, k_dim=24, v_dim=12, dtype=dtype, layout=layout) for _ in range(2))
    slots = torch.randperm(ours.num_blocks * BLOCK_SIZE)[:200]
    key = torch.randn(3, 200, 24).to(dtype).transpose(0, 1)  # as transformers hands it over: heads first
    value = torch.randn(200, 3, 12).to(dtype)
    for target, case in ((kernels, ours), (TORCH_KERNELS, theirs)):
        target.write_kv(key, value, case.k, case.v, slots // BLOCK_SIZE, slots % BLOCK_SIZE)
    assert torch.equal(ours.k, theirs.k)
    assert torch.equal(ours.v, theirs.v)


def test_wrong_shapes_and_types_are_refused_with_what_was_seen(kernels):
    case = Case()
    row = case.query[:1]
    tables = (case.table[None], torch.zeros(1, dtype=torch.int64), torch.tensor([5], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="head size 24, keys 32"):
        kernels.decode_attention(row[..., :24], case.k, case.v, *tables, 5, PLAIN)
    with pytest.raises(RuntimeError, match="slot 1, want one of 1"):
        kernels.decode_attention(row, case.k, case.v, tables[0], tables[1] + 1, tables[2], 5, PLAIN)
    with pytest.raises(RuntimeError, match="covering 600 tokens"):
        kernels.prefill_attention(case.query, case.k, case.v, case.table[None, :3], one_span(600, 600), PLAIN)
    with pytest.raises(RuntimeError, match="k_view is float16, want float32"):
        kernels.decode_attention(row, case.k.half(), case.v, *tables, 5, PLAIN)


def test_layers_that_the_kernels_cannot_serve_are_left_to_torch(kernels):
    cpu = torch.device("cpu")
    layer = LayerUse(LayerSpec(2, 64, 64), num_heads=4)
    assert kernels.supports(layer, torch.float32, cpu)
    assert kernels.supports(layer, torch.bfloat16, cpu)
    assert not kernels.supports(layer, torch.float16, cpu)
    assert not kernels.supports(layer, torch.float32, torch.device("cuda"))
    assert not kernels.supports(LayerUse(LayerSpec(1, MAX_HEAD_SIZE + 8, 64), num_heads=1), torch.float32, cpu)


def test_without_a_build_there_are_no_kernels_and_one_log_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_kernels.cache_clear()
    try:
        assert load_kernels() is None
        assert load_kernels() is None
    finally:
        load_kernels.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "engine.kernels.cpu.build" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86-64")
@pytest.mark.parametrize(
    ("target", "vector_floats"), [("x86-64-v3", 8), pytest.param("x86-64", 4, marks=pytest.mark.long)]
)
def test_the_twins_for_lesser_machines_pass_all_of_the_above(kernels, tmp_path, target, vector_floats):
    script = f"""
import pathlib, sys
from engine.kernels.cpu.library import KERNELS
from engine.kernels.cpu.native import import_library
work = pathlib.Path({str(tmp_path)!r})
KERNELS.path().parent.mkdir(parents=True)
KERNELS.compile(work, ["-march={target}"]).rename(KERNELS.path())
assert import_library(KERNELS.path()).vector_floats == {vector_floats}
"""
    root = Path(__file__).parents[3]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=root)
    tests = [sys.executable, "-m", "pytest", "-q", "-k", "not without_a_build and not twins", __file__]
    done = subprocess.run(tests, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def test_a_broken_library_is_a_log_line_and_not_an_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    KERNELS.path().parent.mkdir(parents=True)
    KERNELS.path().write_bytes(b"\x7fELF, but no more")
    load_kernels.cache_clear()
    try:
        assert load_kernels() is None
    finally:
        load_kernels.cache_clear()
    assert "do not load" in caplog.text
