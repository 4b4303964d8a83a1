import functools
import json
import subprocess
import sys
import threading
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from messages.errors import ConfigError, RequestError
from text.detokenizer import Detokenizer
from text.tokenizer import Tokenizer

CORPUS = [
    "hello world, the cat sat on the mat",
    "le café était fermé",
    "你好 世界",
    "a  b   c",
    "def f(x):\n    return x",
] * 2


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: a space in front, spaces as U+2581, unknown characters as byte tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    backend = tokenizers.Tokenizer(
        models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return backend


def gemma_like() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def no_decoder() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1, "dog": 2, "": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def word_suffix() -> tokenizers.Tokenizer:
    """A decoder whose text changes with what follows."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "cat</w>": 1, "do": 2, "g</w>": 3}, unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder()
    return backend


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "gemma_like": gemma_like,
    "metaspace": metaspace,
    "no_decoder": no_decoder,
    "word_suffix": word_suffix,
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    backend = KINDS[kind]()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<工具>", special=False, normalized=False)])
    return Tokenizer(backend, {"eos_token": "<eos>"})


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    found, at = [], 0
    while at < len(ids):
        size = cuts[at % len(cuts)] if cuts else 1
        found.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*found, detokenizer.flush()]


texts = st.text(
    st.one_of(
        st.sampled_from(list(" helowrd▁é你好世界🦊👩‍🚀ก็\u0301\u200d\ufffd\n")),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=24,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(1, 4), max_size=5), skip=st.booleans())
def test_pieces_of_a_text_add_up_to_its_decoding(kind, text, cuts, skip):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text + "<eos>" + text, add_special_tokens=False)
    found = pieces(tokenizer, ids, cuts, skip=skip)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(1, 3), max_size=4), skip=st.booleans())
def test_pieces_of_any_tokens_add_up_to_their_decoding(kind, data, cuts, skip):
    tokenizer = tokenizer_of(kind)
    size = tokenizer.vocab_size
    any_token = st.integers(0, size + 2)  # two that nobody knows
    # byte tokens come in runs that are valid, broken off, or nonsense
    spaces = [i for i in range(size) if (tokenizer.backend.id_to_token(i) or "x").strip("▁Ġ ") == ""]
    few = st.sampled_from([*spaces, *range(1, min(4, size)), *range(size // 2, size // 2 + 3), size - 1, size - 2])
    ids = data.draw(st.lists(st.one_of(any_token, few), max_size=20))
    found = pieces(tokenizer, ids, cuts, skip=skip)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=12), rest=st.sampled_from(["", "hello", " ", "你"]))
def test_invalid_runs_of_byte_tokens_decode_as_the_tokenizer_would(data, rest):
    tokenizer = tokenizer_of("byte_fallback")
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]
    ids += tokenizer.encode(rest, add_special_tokens=False) + ids
    assert "".join(pieces(tokenizer, ids, [], skip=True)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "gemma_like", "metaspace"])
@given(text=texts)
@settings(max_examples=50, deadline=None)
def test_no_piece_of_a_valid_text_ends_inside_a_character(kind, text):
    text = text.replace("\ufffd", "")
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, ids, [], skip=True))


def test_a_character_comes_with_its_last_byte_and_not_later():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) == 4
    assert pieces(tokenizer, ids, [], skip=True) == ["", "", "", "🦊", ""]


def test_what_remains_of_an_incomplete_character_comes_with_flush():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("a🦊", add_special_tokens=False)[:-1]
    assert pieces(tokenizer, ids, [], skip=True) == ["a", "", "", "", "\ufffd"]


def test_a_word_comes_at_once():
    tokenizer = tokenizer_of("byte_fallback")
    ids = tokenizer.encode("hello the cat", add_special_tokens=False)
    found = pieces(tokenizer, ids, [], skip=True)
    assert all(found[:-1])
    assert found[-1] == ""


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


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, text.tokenizer, text.grammar, text.stops;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
