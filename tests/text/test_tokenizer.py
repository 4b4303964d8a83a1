import json
import subprocess
import sys
import threading
import time

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import processors

from messages.errors import ConfigError, RequestError
from tests.text.kinds import KINDS, byte_level, texts, tokenizer_of
from text.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "gemma_like", "metaspace"])
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_the_bytes_of_the_tokens_add_up_to_the_text(kind, text):
    if kind == "metaspace":
        text = text.replace("▁", "")  # its own encoding cannot tell it from a space
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    shown = tokenizer.decode(ids, skip_special_tokens=False).encode()
    assert joined in (shown, b" " + shown)  # the space that the encoding put in front


def test_token_text_shows_an_incomplete_character_as_replacement():
    tokenizer = tokenizer_of("byte_fallback")
    token = tokenizer.backend.token_to_id("<0xE4>")
    assert tokenizer.token_bytes(token) == b"\xe4"
    assert tokenizer.token_text(token) == "\ufffd"
    assert tokenizer.token_text(tokenizer.backend.token_to_id("<eos>")) == "<eos>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer, encoded = tokenizer_of("byte_level"), []
    encoding = threading.Thread(target=lambda: encoded.append(tokenizer.encode("le café " * 200_000)))
    num_turns = 0
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert len(encoded) == 1
    assert num_turns > 20


def test_half_a_surrogate_pair_is_the_clients_fault():
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer_of("byte_level").encode("a\ud800")


# ------------------------------------------------------------------------------------------------ model directories


def write(folder, backend, config=None, **files):
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def auto_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


CONFIGS = {
    "bos by the file": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    "no bos wanted, but the file says so": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
    },
    "tokens as objects": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False},
        "additional_special_tokens": ["<|role|>"],
    },
    "tokens that the file lacks": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "hello",
        "extra_special_tokens": ["<|x|>", "<|y|>"],
    },
    "added_tokens_decoder": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            "900": {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
            "901": {"content": "<tool>", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
        },
    },
    "nothing": {"tokenizer_class": "PreTrainedTokenizerFast"},
}
TEXTS = ["hello world", "", " a</s>b ", "<|end|>x<tool>y<|x|><|role|>你好", "<s>twice"]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_directory_is_read_as_transformers_reads_it(tmp_path, kind, config):
    folder = write(tmp_path, with_bos(KINDS[kind]()), CONFIGS[config])
    ours, theirs = Tokenizer.load(folder), auto_tokenizer(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


def test_the_older_map_of_special_tokens_is_read(tmp_path):
    folder = write(
        tmp_path,
        with_bos(byte_level()),
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "rstrip": False}},
    )
    ours, theirs = Tokenizer.load(folder), auto_tokenizer(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.eos_token_id is not None


def test_its_configuration_is_told_with_tokens_as_texts(tmp_path):
    config = {
        **CONFIGS["added_tokens_decoder"],
        "vocab_file": "x",
        "bos_token": {"content": "<s>"},
        "chat_template": "T",
    }
    info = Tokenizer.load(write(tmp_path, with_bos(byte_level()), config)).info()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "<|end|>", "T")
    assert set(info["added_tokens_decoder"].values()) == {"<s>", "</s>", "<|end|>", "<tool>"}
    assert "vocab_file" not in info
    assert json.loads(json.dumps(info)) == info


def test_truncation_and_padding_of_the_file_do_not_cut_prompts(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.load(write(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("hello the cat sat")) == "hello the cat sat"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "no tokenizer: .* is not there"),
        ("tokenizer.json", "{", "no tokenizer: .* cannot be read"),
        ("tokenizer.json", '{"version": "1.0"}', "no tokenizer: .* cannot be read"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "wanted an object"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template .*line 1"),
    ],
)
def test_a_broken_directory_is_one_line(tmp_path, name, content, message):
    if name is not None:
        write(tmp_path, byte_level())
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in caught.value.message


@pytest.mark.slow
def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, text.tokenizer, text.grammar, text.stops;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
