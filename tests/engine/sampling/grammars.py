"""A tokenizer of bytes, and what compiles grammars for it."""

from __future__ import annotations

import functools

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from text.grammar import GrammarCompiler, GrammarTokenizer
from text.tokenizer import Tokenizer

EOS, VOCAB = 256, 300  # padded


@functools.cache
def byte_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer with a token for each byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return backend


@functools.cache
def compiler() -> GrammarCompiler:
    """Return what keeps the grammars that tests had compiled."""
    return GrammarCompiler(GrammarTokenizer(Tokenizer(byte_tokenizer()), VOCAB, [EOS]))
