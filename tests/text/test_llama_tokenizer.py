"""Directories that name LlamaTokenizer are tokenized as transformers does, or as their tokenizer.json says."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers

from messages.errors import ConfigError
from tests.text.kinds import byte_fallback, byte_level
from tests.text.test_tokenizer import auto_tokenizer, with_bos, write
from text.llama_tokenizer import AS_THE_FILE_SAYS
from text.tokenizer import Tokenizer

NAMED = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
PARTS = ["hello", " ", "  ", "the cat", "</s>", "<s>", "\n", "é", "你好", "🦊", "▁", "x", "<tool>", " world", "<|x|>"]
UNK, TOOL, OTHER = (
    {"content": content, "special": special, "normalized": normalized, "lstrip": False, "rstrip": rstrip}
    for content, special, normalized, rstrip in (
        ("<unk>", True, False, False),
        ("<tool>", False, True, False),
        ("<|x|>", True, False, True),
    )
)
CONFIGS = {
    "plain": (NAMED, "llama"),
    "without a model": (NAMED, None),
    "fast": ({**NAMED, "tokenizer_class": "LlamaTokenizerFast"}, "llama"),
    "legacy": ({**NAMED, "legacy": True}, "llama"),
    "legacy by null": ({**NAMED, "legacy": None}, "llama"),
    "no space in front": ({**NAMED, "add_prefix_space": False}, "llama"),
    "tokens of the class": ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": None}, "gemma"),
    "no bos": ({**NAMED, "add_bos_token": False}, "llama"),
    "an eos": ({**NAMED, "add_bos_token": True, "add_eos_token": True}, "llama"),
    "added tokens": ({**NAMED, "added_tokens_decoder": {"0": UNK, "422": TOOL, "423": OTHER}}, "llama"),
    "named by the model alone": ({}, "llama"),
    "of a type that takes the file": (NAMED, "mistral"),
}


def folder_of(tmp_path, name: str, backend=None):
    config, model_type = CONFIGS[name]
    if model_type is not None:
        named = {"tokenizer_class": "LlamaTokenizer"} if not config else {}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **named}))
    return write(tmp_path, with_bos(backend or byte_fallback()), config)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_tokenized_as_transformers_does(tmp_path, name):
    folder = folder_of(tmp_path, name)
    ours, theirs = Tokenizer.load(folder), auto_tokenizer(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    rng = random.Random(name)
    for _ in range(50):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randint(0, 7)))
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


def test_of_the_files_model_the_vocabulary_and_the_merges_count_alone(tmp_path):
    spec = json.loads(byte_fallback().to_str())
    spec["model"] |= {"ignore_merges": True, "vocab": {**spec["model"]["vocab"], "▁xhello": 420}}
    folder = folder_of(tmp_path, "plain", tokenizers.Tokenizer.from_str(json.dumps(spec)))
    assert Tokenizer.load(folder).encode("xhello") == auto_tokenizer(folder).encode("xhello")


def test_the_file_is_followed_where_that_is_wanted_and_where_its_tokens_are_bytes(tmp_path):
    folder = folder_of(tmp_path, "plain")
    text = "hello</s>hello"
    assert Tokenizer.load(folder, rules="file").encode(text) == with_bos(byte_fallback()).encode(text).ids
    assert Tokenizer.load(folder).encode(text) != with_bos(byte_fallback()).encode(text).ids
    folder = folder_of(tmp_path, "plain", byte_level())
    assert Tokenizer.load(folder).encode(text) == auto_tokenizer(folder).encode(text)


def test_the_model_types_are_those_of_the_installed_transformers():
    from transformers.models.auto import tokenization_auto as known
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    generic = {"TokenizersBackend", "MistralCommonBackend"}
    wanted = {
        name
        for name, kind in known.TOKENIZER_MAPPING_NAMES.items()
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind is not None
        and (kind in generic or name in known.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)
    }
    assert wanted == AS_THE_FILE_SAYS


def test_a_broken_model_configuration_is_one_line(tmp_path):
    folder = folder_of(tmp_path, "plain")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="wanted an object"):
        Tokenizer.load(folder)
