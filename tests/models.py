"""Tiny decoders with random weights, written as transformers model directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 320
EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
_TEXT = ["the quick brown fox jumps over the lazy dog. What is the code of the red lantern? It is 4821."] * 4

#: What a tiny model with DeepSeek's attention and experts has.
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}

#: What every family is built with where its configuration has the name.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
}


def make_tiny_model(directory: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Write a random decoder of `family` with a byte-level BPE tokenizer and a chat template to `directory`.

    Args:
        directory: created if missing.
        family: transformers' model_type.
        seed: of the weights.
        overrides: entries of the configuration; None removes one of the common ones. `dtype`: of the weights,
            default float32.

    Returns:
        `directory`.
    """
    dtype = overrides.pop("dtype", torch.float32)
    write_tokenizer(directory)
    eos = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(EOS)
    config = tiny_config(family, **{"eos_token_id": eos, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.dim() >= 2:
                    parameter.mul_(5)  # initial weights are small: without this every token gives much the same logits
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    return directory


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of such a model; None removes an entry that all have."""
    removed = {name for name, value in overrides.items() if value is None and name in _COMMON}
    return AutoConfig.for_model(
        family, **{name: value for name, value in {**_COMMON, **overrides}.items() if name not in removed}
    )


def write_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A byte-level BPE tokenizer of `vocab_size` tokens with special tokens and a chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, chat_template=CHAT_TEMPLATE)
    wrapped.save_pretrained(directory)
