import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.cpu.native import load_kernels
from engine.model import linear as linear_module
from engine.model.linear import (
    GroupedLinear,
    MergedLinear,
    NativeLinear,
    PackedLinear,
    can_merge,
    can_pack,
    pack_linears,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(64, 320), (256, 704), (704, 256), (768, 96), (1536, 64), (2048, 512), (4096, 256)]
DTYPES = [torch.float32, torch.bfloat16]


def needs_packing(dtype: torch.dtype) -> None:
    """Float32 is packed everywhere; bfloat16 where the CPU has AVX-512, elsewhere it is left to torch."""
    has_instructions = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if dtype is torch.bfloat16 and not has_instructions and not can_pack(dtype):
        pytest.skip("no bfloat16 linears can be packed on a CPU without AVX-512")
    assert can_pack(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(num_in, num_out, dtype):
    needs_packing(dtype)
    torch.manual_seed(1)
    layer = PackedLinear(torch.randn(num_out, num_in, dtype=dtype) * num_in**-0.5, None)
    rows = torch.randn(1, 260, num_in, dtype=dtype)
    whole = layer(rows)
    for size in (1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 100):
        for begin in (0, 7, 150):
            alone = layer(rows[:, begin : begin + size])
            assert torch.equal(alone, whole[:, begin : begin + size]), size


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_computes_what_the_original_does(dtype):
    needs_packing(dtype)
    torch.manual_seed(0)
    linear = nn.Linear(48, 101).to(dtype)
    packed = PackedLinear(linear.weight, linear.bias)
    for shape in ((1, 5, 48), (7, 48), (48,), (1, 1, 48), (1, 0, 48)):
        x = torch.randn(shape, dtype=dtype)
        assert packed(x).shape == (*shape[:-1], 101)
        torch.testing.assert_close(packed(x), linear(x), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_weight_can_still_be_read():
    linear = nn.Linear(48, 101)
    assert torch.equal(PackedLinear(linear.weight, None).weight, linear.weight)


@pytest.fixture
def kernels():
    loaded = load_kernels()
    if loaded is None or loaded.linear_path is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    return loaded


def test_bfloat16_goes_to_the_kernels_and_float32_to_onednn(kernels):
    model = nn.Sequential(nn.Linear(48, 101), nn.Linear(48, 101).bfloat16())
    weight = model[1].weight.detach().clone()
    x = torch.randn(2, 3, 48).bfloat16()
    wanted = model[1](x)
    assert pack_linears(model, kernels) == 2
    assert [type(layer) for layer in model] == [PackedLinear, NativeLinear]
    assert torch.equal(model[1].weight, weight)
    for shape in ((2, 3, 48), (6, 48), (1, 1, 48), (48,), (0, 48)):
        assert model[1](torch.zeros(shape).bfloat16()).shape == (*shape[:-1], 101)
    torch.testing.assert_close(model[1](x), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("has_bias", [False, True])
def test_merged_linears_give_the_bits_of_each_which_go_on_as_before(kernels, has_bias):
    linears = [NativeLinear(*made, kernels) for made in _weights((64, 32, 40), 100, has_bias=has_bias)]
    weights = [linear.weight for linear in linears]
    x = torch.randn(1, 37, 100).bfloat16()
    want = [linear(x) for linear in linears]
    assert can_merge(linears)
    assert all(map(torch.equal, MergedLinear(linears)(x), want))
    assert all(map(torch.equal, [linear(x) for linear in linears], want))
    assert all(map(torch.equal, [linear.weight for linear in linears], weights))


def test_linears_with_gaps_between_them_or_of_another_kind_are_not_merged(kernels):
    (first, bias), second = _weights((40, 32), 100, has_bias=True)
    plain, last = NativeLinear(first, bias, kernels), NativeLinear(*second, kernels)
    assert not can_merge([plain, last])
    assert can_merge([last, plain])
    assert not can_merge([last, NativeLinear(first, None, kernels)])
    assert not can_merge([last, NativeLinear(first[:, :64], bias, kernels)])
    assert not can_merge([last, PackedLinear(first.float(), None)])


def _weights(widths: tuple[int, ...], depth: int, *, has_bias: bool) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Draw a weight `[width, depth]` of each width, and a bias."""
    return [
        (torch.randn(width, depth).bfloat16(), torch.randn(width).bfloat16() if has_bias else None) for width in widths
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linears_are_those_of_each_group(dtype):
    needs_packing(dtype)
    counts = [2, 0, 5, 1]
    weights, biases = torch.randn(4, 40, 64, dtype=dtype), torch.randn(4, 40, dtype=dtype)
    rows = torch.randn(8, 64, dtype=dtype)
    groups = zip(rows.split(counts), weights, biases, strict=True)
    wanted = torch.cat([nn.functional.linear(*group) for group in groups])
    for kernels in (None, load_kernels()):
        got = GroupedLinear(weights, biases, kernels)(rows, counts)
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-1 if dtype == torch.bfloat16 else 1e-4)
        assert GroupedLinear(weights, None, kernels)(rows[:0], [0] * 4).shape == (0, 40)


@pytest.mark.slow
def test_where_onednn_has_amx_bfloat16_goes_to_it_in_calls_of_one_size(monkeypatch):
    needs_packing(torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    torch.manual_seed(0)
    linear = nn.Linear(768, 65).bfloat16()
    layer = PackedLinear(linear.weight, linear.bias)
    sizes = []
    multiply = linear_module._linear_pointwise

    def spy(x, *args):
        sizes.append(len(x))
        return multiply(x, *args)

    monkeypatch.setattr(linear_module, "_linear_pointwise", spy)
    x = torch.randn(1, 70, 768).bfloat16()
    whole = layer(x)
    torch.testing.assert_close(whole, linear(x), rtol=2e-2, atol=2e-2)
    for begin, end in ((0, 1), (5, 37), (33, 70)):
        assert torch.equal(layer(x[:, begin:end]), whole[:, begin:end])
    assert set(sizes) == {32}


def test_float16_is_left_to_torch():
    assert not can_pack(torch.float16)


class _Special(nn.Linear):
    pass


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.inner = nn.ModuleList([nn.Linear(8, 8), _Special(8, 8)])
        self.again = self.inner[0]
        self.transposed = Conv1D(6, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight


def test_linears_are_replaced_once_and_subclasses_and_tables_stay():
    torch.manual_seed(0)
    model = _Model()
    x = torch.randn(3, 8)
    wanted = [layer(x) for layer in (model.inner[0], model.transposed, model.head)]
    assert pack_linears(model) == 3
    assert model.again is model.inner[0]
    assert type(model.inner[1]) is _Special
    assert isinstance(model.table, nn.Embedding)
    got = [layer(x) for layer in (model.inner[0], model.transposed, model.head)]
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [type(layer) for layer in (model.inner[0], model.transposed, model.head)] == [PackedLinear] * 3
