"""Trains the demo model's tokenizer on its corpus."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model import corpus
from tools.demo_model.corpus import Variety

MAX_VOCAB_SIZE = 2048
NUM_NOTES, NUM_CHATS, TEXT_TOKENS, NUM_FACTS = 2000, 1000, 500, 12


def train_tokenizer(seed: int) -> Tokenizer:
    """Train byte-level BPE, the special tokens first; the same seed gives the same vocabulary.

    Digits are split in pairs, and the space before a number belongs to it: a code must follow its thing with no token
    between, and be cut the same way everywhere.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(random.Random(seed)), trainer)
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
