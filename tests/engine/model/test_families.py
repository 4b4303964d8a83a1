"""Families of transformers decoders, tiny and random, through the engine: greedy tokens equal `generate`'s."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.model.load import load_model
from messages.errors import ConfigError
from tests.models import DEEPSEEK, VOCAB_SIZE, make_tiny_model
from tests.steps import Bench

NUM_OUTPUT = 20

MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 16}
GPT = {"num_key_value_heads": None, "head_dim": None}

#: name of the case: (family, entries of its configuration)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "mixtral": ("mixtral", MOE),
    "mistral, window": ("mistral", {"sliding_window": 12}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "ministral": ("ministral", SLIDING_FULL),
    "ministral3": ("ministral3", {}),
    "gemma": ("gemma", {}),
    "gemma2, soft caps": ("gemma2", {"sliding_window": 12, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", SLIDING_FULL),
    "gemma4_text": ("gemma4_text", {"num_kv_shared_layers": 0, **PER_LAYER_INPUT, **SLIDING_FULL}),
    "gemma4_text, shared KV": ("gemma4_text", {"num_kv_shared_layers": 2, **PER_LAYER_INPUT, **SLIDING_FULL}),
    "gemma3n_text": ("gemma3n_text", {"num_kv_shared_layers": 0, **PER_LAYER_INPUT, **SLIDING_FULL}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3, long rope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 256,
            },
            "original_max_position_embeddings": 256,
        },
    ),
    "phimoe": ("phimoe", MOE),
    "gpt_oss, sinks": ("gpt_oss", {**MOE, **SLIDING_FULL}),
    "deepseek_v2, MLA": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3, MLA": ("deepseek_v3", DEEPSEEK),
    "minicpm3, MLA": ("minicpm3", DEEPSEEK),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING_FULL),
    "olmoe": ("olmoe", MOE),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", MOE),
    "smollm3": ("smollm3", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", SLIDING_FULL),
    "starcoder2": ("starcoder2", {}),
    "gpt_neox": ("gpt_neox", GPT),
    "gpt2": ("gpt2", {**GPT, "n_positions": 1024}),
    "opt": ("opt", {**GPT, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {}),
    "exaone4": ("exaone4", SLIDING_FULL),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**MOE, "moe_topk": 2}),
    "seed_oss": ("seed_oss", {}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "helium": ("helium", {}),
    "bitnet": ("bitnet", {}),
    "dots1": (
        "dots1",
        {
            **MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "minimax_m2": ("minimax_m2", MOE),
    "llama4_text, chunks": (
        "llama4_text",
        {**MOE, "attention_chunk_size": 16, "intermediate_size_mlp": 96, "num_hidden_layers": 4},
    ),
    "mimo_v2_flash": ("mimo_v2_flash", {**MOE, "n_routed_experts": 4, **SLIDING_FULL}),
    "lfm2, attention only": ("lfm2", {"layer_types": ["full_attention"] * 4}),
    "flex_olmo": ("flex_olmo", MOE),
    "granitemoeshared": ("granitemoeshared", {**MOE, "shared_intermediate_size": 48}),
    "nanochat": ("nanochat", {}),
    "persimmon": ("persimmon", {"num_key_value_heads": None, "head_dim": None}),
    "jais2": ("jais2", {}),
    "vaultgemma": ("vaultgemma", {"sliding_window": 12, "query_pre_attn_scalar": 16}),
    "solar_open": ("solar_open", {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
}
DEMANDING = {"llama", "gemma2, soft caps", "deepseek_v3, MLA", "gpt_oss, sinks", "llama4_text, chunks"}

#: family: (entries of its configuration, words of the reason)
REFUSED: dict[str, tuple[dict, str]] = {
    "falcon": (GPT, "attention interface"),
    "bloom": ({"num_key_value_heads": None, "head_dim": None}, "attention interface"),
    "qwen3_next": ({}, "recurrent|attention interface"),
    "qwen3_5_text": ({}, "recurrent|attention interface"),
    "falcon_h1": ({}, "recurrent|attention interface"),
    "recurrent_gemma": ({}, "recurrent|attention interface"),
    "mamba2": ({"num_heads": 8, "head_dim": 16}, "recurrent|attention interface"),
    "jamba": ({}, "recurrent|attention interface"),
    "diffllama": ({}, "more than once"),
    "deepseek_v32": (DEEPSEEK, "indexer"),
    "bert": (GPT, "later tokens|decoder"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "attention interface"),
}


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(4, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (5, 70, 33)]
    return [*prompts, prompts[1][:40] + prompts[2][:20], prompts[1][:64]]


def _generate(directory, prompts):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_OUTPUT,
            min_new_tokens=NUM_OUTPUT,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


#: Every family with what load_model chooses; those that ask the most of attention in plain torch too.
CASES = [
    *(pytest.param(name, True, marks=() if name == "llama" else pytest.mark.slow, id=name) for name in FAMILIES),
    *(pytest.param(name, False, id=f"{name}, plain torch", marks=pytest.mark.slow) for name in sorted(DEMANDING)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "use_kernels"), CASES)
def test_packed_reused_and_imported_kv_give_the_tokens_of_generate(case, use_kernels, tmp_path, one_thread):
    family, entries = FAMILIES[case]
    directory = make_tiny_model(tmp_path, family, eos_token_id=None, **entries)
    prompts = _prompts()
    wanted = _generate(directory, prompts)
    loaded = load_model(directory, dtype="float32", use_kernels=use_kernels)

    bench = Bench(loaded)
    first = [bench.add(f"first-{i}", prompt) for i, prompt in enumerate(prompts)]
    assert bench.run(first, NUM_OUTPUT) == wanted

    again = [bench.add(f"again-{i}", prompt, held=first[i]) for i, prompt in enumerate(prompts)]
    again[3] = bench.add("again-3", prompts[3], held=first[1])
    assert [s.num_computed for s in again] == [0, 64, 32, 32, 48]
    assert bench.run(again, NUM_OUTPUT) == wanted

    prefilled = [bench.add(f"moved-{i}", prompt) for i, prompt in enumerate(prompts)]
    bench.run(prefilled, 1)
    elsewhere = Bench(loaded, is_reversed=True)
    assert elsewhere.run([elsewhere.receive(s, bench) for s in prefilled], NUM_OUTPUT) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_work_is_refused_by_name_and_reason(family, tmp_path):
    entries, reason = REFUSED[family]
    directory = make_tiny_model(tmp_path, family, **entries)
    with pytest.raises(ConfigError, match=rf"^{family} cannot be served: .*({reason})"):
        load_model(directory)
