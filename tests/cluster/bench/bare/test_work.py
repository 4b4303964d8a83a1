from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.bench.bare.work import Effort, ModelWork, Weights, weights_of
from engine.kernels.protocol import LayerUse
from engine.memory.kv_pool import LayerSpec

ONE = Weights(body=1, experts=0, head=0, chosen_share=1.0, vectors=0, total=1)


def config(family: str = "llama", **fields: object):
    common = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(family, **common | fields)


def layers(**fields: object) -> list[LayerUse]:
    return [LayerUse(LayerSpec(2, 16, 16), 4, **fields)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True])
def test_operations_of_a_prompt_are_those_that_torch_counts_but_for_keys_that_are_masked(is_tied):
    found = config(tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_config(found, attn_implementation="eager").eval()
    tokens = torch.arange(24)[None]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=tokens, use_cache=False, logits_to_keep=torch.tensor([23]))
    masked = 2 * 4 * 2 * (16 + 16) * (24 * 24 - 24 * 25 // 2)
    work = ModelWork(weights_of(found), layers(), 4, 4)
    rotary = 2 * 8 * 24  # of the model, once for all layers: a product in some versions of transformers
    assert counter.get_total_flops() - masked - work.prefill(1, 24).num_flops in (0, rotary)
    assert weights_of(found).total == sum(parameter.numel() for parameter in model.parameters())


def test_a_step_reads_each_weight_once_and_of_each_row_what_it_sees():
    weights = weights_of(config())
    work = ModelWork(weights, layers(), 2, 1)
    of_key = 2 * 2 * (16 + 16)
    read = (weights.total - 320 * 64) * 2  # the embedding only looks up
    assert work.decode([9, 19], 1).num_bytes == read + (10 + 20) * of_key
    assert work.decode([9, 19], 2).num_bytes == 2 * read + (10 + 20) * of_key
    assert work.decode([], 1).num_bytes == read


def test_a_tied_embedding_is_read_for_the_logits():
    weights = weights_of(config(tie_word_embeddings=True))
    assert weights.head == 320 * 64
    assert weights.read(1) == weights.total


@pytest.mark.parametrize(
    ("kind", "num_keys"),
    [({}, 10 + 21), ({"window": 4}, 4 + 4), ({"chunk": 8}, 2 + 5), ({"window": 3, "chunk": 8}, 2 + 3)],
)
def test_a_row_sees_no_more_than_its_layer_lets_it(kind, num_keys):
    work = ModelWork(ONE, layers(**kind), 1, 1)
    assert work.decode([9, 20], 1).num_bytes == 1 + 2 * num_keys * 2 * 32
    assert work.decode([9, 20], 1).num_flops == 2 * 2 + 2 * num_keys * 2 * 4 * 32


def test_a_token_takes_the_experts_that_it_chooses_and_a_batch_reads_more_of_them():
    found = config("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[])
    weights = weights_of(found)
    assert weights.chosen_share == 0.25
    assert weights.experts == 2 * 8 * 3 * 64 * 48
    one, many = (weights.read(n) - weights.body - weights.vectors - weights.head for n in (1, 1000))
    assert (one, many) == (pytest.approx(weights.experts / 4), pytest.approx(weights.experts))


def test_the_bound_is_the_slower_of_memory_and_arithmetic():
    assert Effort(100.0, 10.0).bound_s(10.0, 10.0) == 10.0
    assert Effort(10.0, 100.0).bound_s(10.0, 10.0) == 10.0
    assert Effort(10.0, 100.0).bound_s(10.0, 1000.0) == 1.0
