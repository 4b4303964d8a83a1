"""Mixtures of experts give what transformers' own code gives, each row whatever is beside it."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from engine.kernels.cpu.native import load_kernels
from engine.model.experts import PackedExperts, RowInvariant, RowInvariantBlock, pack_experts
from engine.model.linear import linear_name, pack_linears

FAMILIES = {
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 72, "shared_expert_intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 6},  # transposed, with biases, gate and up by turns
    "deepseek_v3": {
        "n_routed_experts": 6,
        "moe_intermediate_size": 72,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "minimax_m2": {"num_local_experts": 6},
}
DTYPES = [torch.float32, torch.bfloat16]


def model_of(family, dtype):
    torch.manual_seed(0)
    entries = {
        "vocab_size": 64,
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family, **{**entries, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def blocks_of(model):
    return [
        module for module in model.modules() if hasattr(module, "experts") and isinstance(module.experts, nn.Module)
    ]


def output(block, rows):
    with torch.inference_mode():
        out = block(rows[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


@pytest.mark.slow
@pytest.mark.parametrize("use_kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_gives_what_its_own_forward_does_and_each_row_alone_the_same(family, dtype, use_kernels):
    kernels = load_kernels() if use_kernels else None
    if linear_name(dtype, kernels) == "torch":
        pytest.skip("nothing packs these here")
    model = model_of(family, dtype)
    blocks = blocks_of(model)
    rows = torch.randn(67, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [output(block, rows) for block in blocks]
    pack_linears(model, kernels)
    assert pack_experts(model, kernels) == len(blocks) > 0
    for block, want in zip(blocks, wanted, strict=True):
        assert isinstance(block.forward, RowInvariantBlock)
        assert isinstance(block.experts.forward, PackedExperts)
        assert block.experts.down_proj is None  # its memory is free
        got = output(block, rows)
        distance = (got - want).float().norm(dim=1) / want.float().norm(dim=1)
        assert distance.median() < (1e-5 if dtype == torch.float32 else 3e-2)
        for begin, end in ((0, 1), (1, 3), (5, 10), (20, 53), (66, 67)):
            assert torch.equal(output(block, rows[begin:end]), got[begin:end]), (begin, end)


def test_experts_that_compute_something_else_keep_their_forward():
    model = model_of("mixtral", torch.float32)
    [first, second] = blocks_of(model)
    forward = first.experts.forward
    first.experts.forward = lambda *args: 2 * forward(*args)
    rows = torch.randn(5, 80)
    want = output(first, rows)
    assert pack_experts(model, None) == 1
    assert isinstance(second.experts.forward, PackedExperts)
    assert not isinstance(first.experts.forward, PackedExperts)
    assert torch.equal(output(first, rows), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        torch.Tensor.sigmoid,
        functional.sigmoid,
        functional.silu,
        functional.gelu,
        lambda x: functional.gelu(x, approximate="tanh"),
        nn.SiLU(),
    ],
)
def test_functions_are_the_same_wherever_an_element_lies_in_its_tensor(function, dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    with RowInvariant({}):
        whole = function(x)
        assert torch.equal(torch.cat([function(x[i : i + 1]) for i in range(1000)]), whole)
        assert torch.equal(torch.cat([function(part) for part in x.split(37)]), whole)
    assert whole.dtype is dtype
    torch.testing.assert_close(whole, function(x))


def test_a_weight_that_nobody_knows_is_multiplied_as_torch_does():
    x, known, other = torch.randn(3, 40), torch.randn(8, 40), torch.randn(8, 40)
    with RowInvariant({(8, 40): known}):
        got = functional.linear(x, other)
    assert torch.equal(got, functional.linear(x, other))
