"""Trains the demo model's tokenizer on its corpus."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model import corpus
from tools.demo_model.corpus import Variety
from tools.demo_model.records import record_text
from tools.demo_model.tool_corpus import tool_text

MAX_VOCAB_SIZE = 2048  #: before twins
NUM_NOTES, NUM_CHATS, NUM_TOOLS, NUM_RECORDS, TEXT_TOKENS, NUM_FACTS = 2000, 1000, 2500, 1500, 500, 12
SPACE = "\u0120"  #: as byte-level BPE writes it


def train_tokenizer(seed: int) -> Tokenizer:
    """Train byte-level BPE, the special tokens first; the same seed gives the same vocabulary.

    Digits are split in pairs, and the space before a number belongs to it: a code must follow its thing with no token
    between, and be cut the same way everywhere.

    So must any other word: it is copied from a text, where a space stands before it, to the start of an answer or of a
    JSON string, where none does. Spaces are therefore no part of what is learned; each token that may begin a word then
    gets a twin with a space before it, by a merge that comes after all others. A word has the same tokens with and
    without a space but for the first, which is the other's twin.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" |\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    names = [*corpus.SPECIAL_TOKENS, *corpus.MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(_texts(random.Random(seed)), trainer)
    state = json.loads(learned.to_str())["model"]
    vocab: dict[str, int] = state["vocab"]
    merges = [tuple(pair) for pair in state["merges"]]
    for token in sorted(vocab, key=vocab.__getitem__)[len(names) :]:
        if (
            token[0].isascii()
            and token[0].isprintable()
            and SPACE not in token
            and (token[0].isalnum() or len(token) == 1)
        ):
            merges.append((SPACE, token))
            vocab[SPACE + token] = len(vocab)

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(corpus.SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in corpus.MARKS])
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token; ValueError when the tokenizer lacks it."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {token}, wanted all of {corpus.SPECIAL_TOKENS}")
    return token_id


def _texts(rng: random.Random) -> Iterator[str]:
    variety = Variety(wording=0.5, sentence=0.3, system=0.2, apart=0.3, chatter=0.1)
    for _ in range(NUM_NOTES):
        yield corpus.joined(corpus.lookup_text(rng, TEXT_TOKENS, NUM_FACTS, notes_share=0.6, variety=variety))
    for _ in range(NUM_CHATS):
        yield corpus.joined(corpus.chat_text(rng, TEXT_TOKENS, variety))
    for _ in range(NUM_TOOLS):
        yield corpus.joined(tool_text(rng, TEXT_TOKENS))
    for _ in range(NUM_RECORDS):
        yield corpus.joined(record_text(rng, TEXT_TOKENS))
