"""Model directories to serve: the demo model, and random ones of a shape, with a tokenizer, made once and kept."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from harness.report import CACHE, ROOT

DEMO = ROOT / "cluster" / "demo" / "kvray-demo"
_VOCAB_SIZE = 32_000
#: Of the parameter counts that their names say, so that a step takes long enough to matter; "long": for what does not
#: depend on the model, but on how long its sequences are.
SHAPES: dict[str, dict[str, Any]] = {
    "120M": {
        "hidden_size": 768,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "500M": {
        "hidden_size": 1280,
        "intermediate_size": 3840,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "long": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 2**18,
    },
}
_COMMON = {"vocab_size": _VOCAB_SIZE, "tie_word_embeddings": True, "max_position_embeddings": 8192}


def model_directory(name: str) -> Path:
    """Return the model directory that `name` means: `demo`, the name of a shape, or a directory."""
    if name == "demo":
        return DEMO
    if name not in SHAPES:
        return Path(name).resolve()
    directory = CACHE / "benchmarks" / f"served-{name}"
    note, described = directory / "shape.json", json.dumps(_COMMON | SHAPES[name], sort_keys=True)
    if not note.exists() or note.read_text() != described:
        shutil.rmtree(directory, ignore_errors=True)
        _write_random_model(directory, _COMMON | SHAPES[name])
        note.write_text(described)
    return directory


def vocab_size(directory: Path) -> int:
    """Return the size of the model's vocabulary: token ids are below it."""
    return int(json.loads((directory / "config.json").read_text())["vocab_size"])


def _write_random_model(directory: Path, shape: dict[str, Any]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=None, eos_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Words that no merge makes: they only have to be text when they come out.
    words = ("\u0120" + "".join(letters) for letters in itertools.product("abcdefghijklmnopqrstuvwxyzABCDEF", repeat=3))
    entries = ["<|end|>", *alphabet, *itertools.islice(words, shape["vocab_size"] - len(alphabet) - 1)]
    backend = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(entries)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(directory)
