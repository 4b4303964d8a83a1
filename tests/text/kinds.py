"""Small tokenizers of every kind of decoder, trained on the spot."""

from __future__ import annotations

import functools
import json

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

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


def metaspace_first() -> tokenizers.Tokenizer:
    """As LlamaTokenizer of transformers 5: a space in front of the first text only."""
    backend = byte_fallback()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


def metaspace_never() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return backend


def unigram() -> tokenizers.Tokenizer:
    """As T5 and ALBERT: pieces with scores, spaces as U+2581, compatible characters as one."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def wordpiece() -> tokenizers.Tokenizer:
    """As BERT: lower case, pieces of words marked by ##."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "gemma_like": gemma_like,
    "metaspace": metaspace,
    "metaspace_first": metaspace_first,
    "metaspace_never": metaspace_never,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "no_decoder": no_decoder,
    "word_suffix": word_suffix,
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    backend = KINDS[kind]()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<工具>", special=False, normalized=False)])
    return Tokenizer(backend, {"eos_token": "<eos>"})


texts = st.text(
    st.one_of(
        st.sampled_from(list(" helowrd▁é你好世界🦊👩‍🚀ก็\u0301\u200d\ufffd\n")),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=24,
)
