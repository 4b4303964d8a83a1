"""Shapes of models whose weights are drawn: a directory with nothing but a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

_COMMON: Final[dict[str, Any]] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 2**18,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}

#: By name: Llamas of so many parameters. The large ones have the shapes of Llama 3.
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama-tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
    "llama-120m": {
        "hidden_size": 768,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_000,
        "tie_word_embeddings": True,
    },
    "llama-500m": {
        "hidden_size": 1280,
        "intermediate_size": 3840,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_000,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}


def write_shape(directory: Path, name: str, **changed: Any) -> None:
    """Write the config.json of a shape, with some of it changed, to `directory`, which is there."""
    (directory / "config.json").write_text(json.dumps(_COMMON | SHAPES[name] | changed, indent=1), encoding="utf-8")
