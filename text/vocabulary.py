"""What each token of a vocabulary writes into a text, as the tokenizer's own decoder has it: what grammars count with.

A decoder that gives a token other text by what follows it (BPEDecoder, CTC, a replacement across tokens) has no such
vocabulary. One that gives the first token of a text other bytes than a later one has: `Vocabulary` says which tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from messages.errors import ConfigError
from text.tokenizer import Tokenizer

_LOCAL: Final = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"})


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of each token, by id; b"" where the id has no token, or one that writes nothing."""

    tokens: list[bytes]  #: in the middle of a text
    shortened: frozenset[int]  #: begin with a space that the decoder drops where they begin a text
    unlike: frozenset[int]  #: begin a text with something else


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Read the vocabulary off the decoder: some 0.1 s for 128 k byte-level tokens, some 0.5 s for others.

    Raises:
        ConfigError: what a token writes depends on what follows it.
    """
    size = tokenizer.vocab_size
    if tokenizer.decoding.is_byte_level:
        return Vocabulary([tokenizer.token_bytes(token_id) for token_id in range(size)], frozenset(), frozenset())
    others = set(tokenizer.decoding.kinds) - _LOCAL
    if others or not tokenizer.decoding.is_local:
        raise ConfigError(
            f"what a token writes depends on the tokens after it, by the tokenizer's decoder"
            f" ({', '.join(tokenizer.decoding.kinds)})"
        )
    known = [token_id for token_id in range(size) if tokenizer.backend.id_to_token(token_id) is not None]
    firsts = tokenizer.backend.decode_batch([[token_id] for token_id in known], skip_special_tokens=False)
    tokens = [b""] * size
    shortened: list[int] = []
    unlike: list[int] = []
    for token_id, later, first in zip(known, _later(tokenizer, known), firsts, strict=True):
        tokens[token_id] = later
        byte = tokenizer.decoding.byte_of(str(tokenizer.backend.id_to_token(token_id)))
        if first.encode() == later or (byte is not None and later != b" "):
            continue
        (shortened if b" " + first.encode() == later else unlike).append(token_id)
    return Vocabulary(tokens, frozenset(shortened), frozenset(unlike))


def _later(tokenizer: Tokenizer, token_ids: list[int]) -> list[bytes]:
    """Return what each token writes behind and before another one."""
    anchor = tokenizer.decoding.anchor_id
    before, both = tokenizer.backend.decode_batch([[anchor], [anchor, anchor]], skip_special_tokens=False)
    after = both[len(before) :]
    texts = tokenizer.backend.decode_batch([[anchor, token_id, anchor] for token_id in token_ids], False)
    found: list[bytes] = []
    for token_id, text in zip(token_ids, texts, strict=True):
        token = str(tokenizer.backend.id_to_token(token_id))
        byte = tokenizer.decoding.byte_of(token)
        if byte is not None:
            found.append(bytes([byte]))
        elif text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
            found.append(text[len(before) : len(text) - len(after)].encode())
        else:
            raise ConfigError(f"what the token {token!r} writes depends on the tokens around it")
    return found
