"""Fused modules give the model's own numbers, row by row, and leave alone what they do not understand."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)
from transformers.modeling_utils import AttentionInterface

from engine.kernels.cpu.native import NativeKernels, load_kernels
from engine.model.attention import StepAttention
from engine.model.fused import FusedModules, fuse_modules
from engine.model.fused_layer import fuse_layers
from engine.model.linear import can_pack, pack_linears

SMALL = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def plain_attention(module, query, key, value, mask, scaling, softcap=None, sliding_window=None, **_):
    """Attention over all tokens; every option that a layer knows by itself shows in the result."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * scaling / (softcap or 1) + (sliding_window or 0) * 0.01 * query[..., :1]
    return (scores.float().softmax(-1).to(value.dtype) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("kvray_test", plain_attention)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    loaded = load_kernels()
    if loaded is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    return loaded


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(config_class, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_class(**{**SMALL, **changes}), dtype=dtype, attn_implementation="kvray_test"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms are born as all ones or zeros, which hides much
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits(model, length=40):
    ids = torch.randint(0, SMALL["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


FAMILIES = {  # config, extra arguments, what is fused of two layers
    "llama": (LlamaConfig, {}, FusedModules(norms=5, gates=2, attentions=2)),
    "mistral, window": (MistralConfig, {"sliding_window": 8}, FusedModules(norms=5, gates=2, attentions=2)),
    "qwen3, norms of q and k": (Qwen3Config, {}, FusedModules(norms=9, gates=2, attentions=2)),
    "gemma2, softcap": (Gemma2Config, {"sliding_window": 8}, FusedModules(norms=9, gates=2, attentions=2)),
    "gemma3, two ropes": (Gemma3TextConfig, {"sliding_window": 8}, FusedModules(norms=13, gates=2, attentions=2)),
    "olmo2, norms before heads": (Olmo2Config, {}, FusedModules(norms=9, gates=2, attentions=0)),
    "phi3, projections in one": (Phi3Config, {}, FusedModules(norms=5, gates=0, attentions=0)),
    "glm, other pairs rotate": (GlmConfig, {}, FusedModules(norms=5, gates=0, attentions=0)),
    "cohere, layer norm": (CohereConfig, {}, FusedModules(norms=0, gates=2, attentions=0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_gives_its_own_logits(kernels, family, dtype):
    config_class, changes, expected = FAMILIES[family]
    model = small_model(config_class, dtype, **changes)
    want = logits(model)
    assert fuse_modules(model, kernels) == expected
    assert model.config._attn_implementation == "kvray_test"
    got = logits(model)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(kernels, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, others, weight = (torch.randn(n, 200, generator=generator).to(dtype) for n in (33, 33, 1))
    rows, others, weight = rows.contiguous(), others.contiguous(), weight[0]
    heads, turn = rows.view(33, 5, 40), torch.randn(2, 33, 24, generator=generator).to(dtype)

    def norm(x):
        return kernels.rms_norm(x.contiguous(), weight, 1e-5, adds_one=False, rounds_first=True)

    assert torch.equal(norm(rows), torch.cat([norm(row[None]) for row in rows]))
    for is_gelu in (False, True):
        whole = kernels.gate(rows.clone(), others, is_gelu=is_gelu)
        single = [kernels.gate(a[None].clone(), b[None], is_gelu=is_gelu) for a, b in zip(rows, others, strict=True)]
        assert torch.equal(whole, torch.cat(single))
    whole = heads.clone()
    kernels.rotate(whole, *turn)
    for i in range(33):
        single = heads[i : i + 1].clone()
        kernels.rotate(single, *turn[:, i : i + 1].contiguous())
        assert torch.equal(single, whole[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_rotary_embedding_has_the_bits_of_torchs_operators(kernels, dtype, threads):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 3, 80, generator=generator).to(dtype)
    cosine, sine = torch.randn(2, 500, 48, generator=generator).to(dtype)
    turned, kept = rows[..., :48], rows[..., 48:]
    half = torch.cat([-turned[..., 24:], turned[..., :24]], -1)
    want = torch.cat([turned * cosine[:, None] + half * sine[:, None], kept], -1)
    kernels.rotate(rows, cosine, sine)
    assert torch.equal(rows, want)


def test_activations_hold_at_the_far_ends(kernels):
    gate = torch.tensor([-1e30, -200.0, -89.0, -20.0, 0.0, 20.0, 200.0, 1e30])
    for is_gelu, activation in ((False, nn.functional.silu), (True, nn.GELU(approximate="tanh"))):
        got = kernels.gate(gate.clone(), torch.ones(8), is_gelu=is_gelu)
        torch.testing.assert_close(got, activation(gate), atol=1e-6, rtol=1e-6)


class _Norm(nn.Module):
    """Looks like an RMS norm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)
        self.eps = 1e-5


class MeanSubtractingNorm(_Norm):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class EpsOutsideTheRootNorm(_Norm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class BrokenNorm(_Norm):
    def forward(self, x, residual):
        return x + residual


@pytest.mark.parametrize("kind", [MeanSubtractingNorm, EpsOutsideTheRootNorm, BrokenNorm])
def test_a_module_that_only_looks_the_part_keeps_its_forward(kernels, kind):
    model = small_model(LlamaConfig)
    model.model.layers[0].stranger = kind()
    assert fuse_modules(model, kernels).norms == 5
    assert "forward" not in vars(model.model.layers[0].stranger)


def test_an_mlp_that_does_more_keeps_its_forward(kernels):
    model = small_model(LlamaConfig)
    mlp = model.model.layers[1].mlp
    original = type(mlp).forward
    mlp.forward = lambda x: 2 * original(mlp, x)
    assert fuse_modules(model, kernels).gates == 1


def test_an_attention_layer_that_does_more_keeps_its_forward(kernels):
    model = small_model(LlamaConfig)
    layer = model.model.layers[1].self_attn
    original = type(layer).forward

    def louder(hidden_states, **keywords):
        out, weights = original(layer, hidden_states, **keywords)
        return 2 * out, weights

    layer.forward = louder
    assert fuse_modules(model, kernels).attentions == 1


def test_another_activation_is_left_alone(kernels):
    assert fuse_modules(small_model(LlamaConfig, hidden_act="relu"), kernels).gates == 0
    assert fuse_modules(small_model(LlamaConfig, dtype=torch.bfloat16, hidden_act="gelu"), kernels).gates == 0


def packed(model):
    """With linears whose rows do not depend on their batch, as `load_model` makes them; torch's own fail the trial."""
    if not can_pack(model.dtype):
        pytest.skip("this torch packs no linears")
    pack_linears(model)
    return model


LAYERED = {
    "llama": 2,
    "mistral, window": 2,
    "qwen3, norms of q and k": 2,
    "gemma2, softcap": 0,
    "phi3, projections in one": 0,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", LAYERED)
def test_a_fused_layer_has_the_bits_of_its_fused_modules(kernels, family, dtype):
    config_class, changes, _ = FAMILIES[family]
    model = packed(small_model(config_class, dtype, **changes))
    fuse_modules(model, kernels)
    want = logits(model)
    assert fuse_layers(model) == LAYERED[family]
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_layer_computes_the_wanted_rows_alone_and_to_the_same_bits(kernels, dtype):
    model = packed(small_model(LlamaConfig, dtype))
    fuse_modules(model, kernels)
    fuse_layers(model)
    whole = logits(model)
    rows = torch.tensor([39, 3, 17])
    step = StepAttention([], rows, rows, 0, rows, rows, rows, 0, [], kept_rows=rows)
    seen = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append("module"))
    ids = torch.randint(0, SMALL["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = model.model(input_ids=ids, use_cache=False, kv_step=step).last_hidden_state
        got = model(input_ids=ids, use_cache=False, kv_step=step, logits_to_keep=rows).logits
    hook.remove()
    assert not seen  # the way through the module's call is what a fused layer saves
    assert torch.equal(got, whole[:, rows])
    assert not hidden[:, :3].any()


def test_a_layer_that_does_more_keeps_its_forward(kernels):
    model = packed(small_model(LlamaConfig))
    layer = model.model.layers[1]
    original = type(layer).forward
    layer.forward = lambda hidden_states, **keywords: 2 * original(layer, hidden_states, **keywords)
    fuse_modules(model, kernels)
    assert fuse_layers(model) == 1


def test_other_models_of_the_class_are_not_touched(kernels):
    fused, other = small_model(LlamaConfig), small_model(LlamaConfig)
    fuse_modules(fused, kernels)
    assert "forward" not in vars(other.model.layers[0].self_attn)
    assert torch.equal(logits(other), logits(small_model(LlamaConfig)))
