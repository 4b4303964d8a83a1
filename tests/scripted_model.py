"""Decoders that nobody trained, written as transformers model directories: their layers add nothing.

One says what it was told to: its embedding is the identity, and its head gives each token one successor. What it says
is cut into tokens that occur once each, so that the last token of a prompt decides all that follows. The other one
guesses: each next token has the same odds wherever it stands, so that a structure's masks alone decide what comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

EOS = "<|end|>"
_HIDDEN = 1024  #: more than there are tokens
_PIECE_CHARS = 5
#: log odds of a guessing model's tokens against letters: what is open is closed soon, and numbers fit into doubles
_ODDS = {'"': 3.0, "]": 1.5, "}": 1.5, EOS: 1.5, "e": -6.0, "E": -6.0}
_UNREADABLE_ODDS = -4.0
_GUESSING_HIDDEN = 64
_RESULTS = "messages | selectattr('role', 'equalto', 'tool') | list | length"


def make_scripted_model(directory: Path, template: str, replies: Mapping[int, str]) -> Path:
    """Write a model that says `replies`, by how many results of tools the conversation has.

    `template`: a chat template that ends a prompt with <|assistant|>, behind which comes what the model goes on from.
    """
    used: set[str] = set()
    pieces = {count: _cut(text, used) for count, text in replies.items()}
    tokenizer = _byte_tokenizer()
    tokenizer.add_special_tokens([EOS, *(f"<|say-{count}|>" for count in replies)])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in sorted(used)])
    vocab_size = tokenizer.get_vocab_size()
    assert vocab_size <= _HIDDEN
    successors: dict[str, str] = {}
    for count, said in pieces.items():
        chain = [f"<|say-{count}|>", *said, EOS]
        successors |= dict(itertools.pairwise(chain))

    model = _idle_model(vocab_size, _HIDDEN, tokenizer.token_to_id(EOS))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size, _HIDDEN))
        for token, successor in successors.items():
            model.lm_head.weight[tokenizer.token_to_id(successor), tokenizer.token_to_id(token)] = 2.0
    ends = "<|assistant|>{% endif %}"
    assert template.endswith(ends)
    template = template.removesuffix(ends) + f"<|assistant|><|say-{{{{ {_RESULTS} }}}}|>{{% endif %}}"
    return _write(directory, model, tokenizer, template)


def make_guessing_model(directory: Path, template: str) -> Path:
    """Write a model whose tokens are bytes, drawn with odds that do not depend on what stands before them."""
    tokenizer = _byte_tokenizer()
    tokenizer.add_special_tokens([EOS])
    model = _idle_model(tokenizer.get_vocab_size(), _GUESSING_HIDDEN, tokenizer.token_to_id(EOS))
    normed = _GUESSING_HIDDEN**0.5  # of (1, 0, 0, ...), by its root mean square
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for token, token_id in tokenizer.get_vocab().items():
            odds = _ODDS.get(token, 0.0 if token.isascii() else _UNREADABLE_ODDS)
            model.lm_head.weight[token_id, 0] = odds / normed
    return _write(directory, model, tokenizer, template)


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _idle_model(vocab_size: int, hidden_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """A model whose layer adds nothing; its embedding and its head are zero."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)  # norms are one, all else nothing
    return model


def _write(directory: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, template: str) -> Path:
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, chat_template=template).save_pretrained(
        directory
    )
    return directory


def _cut(text: str, used: set[str]) -> list[str]:
    """Cut `text` into pieces that are not in `used`, and add them there."""
    pieces: list[str] = []
    at = 0
    while at < len(text):
        size = _PIECE_CHARS
        while text[at : at + size] in used and at + size < len(text):
            size += 1
        piece = text[at : at + size]
        if piece in used:  # the end of another reply too: it goes with what stands before it
            used.remove(pieces[-1])
            piece = pieces.pop() + piece
        assert piece not in used
        pieces.append(piece)
        used.add(piece)
        at += size
    return pieces
