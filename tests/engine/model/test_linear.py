import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.model.linear import PackedLinear, can_pack, pack_linears

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
