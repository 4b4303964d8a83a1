"""KV made of numbers: a token's stands for it and all before it, and the next token follows from the last."""

from __future__ import annotations

from collections.abc import Sequence

FINGERPRINT = b"a model"
VOCABULARY = 5
STOP = 4
#: Two token sequences that prompts begin with, so that they share prefixes.
BASES = [[(i * i + 3 * b) % VOCABULARY for i in range(40)] for b in range(2)]


def seed_number(salt: bytes) -> int:
    """What stands before a tenant's first token; small numbers are left for bytes that are no token's."""
    return int.from_bytes(salt, "little") + 100


def next_token(number: int) -> int:
    return hash((number, 77)) % VOCABULARY


def kv_numbers(salt: bytes, token_ids: Sequence[int]) -> list[int]:
    """For each token a number that stands for it and all before it."""
    number, numbers = seed_number(salt), []
    for token_id in token_ids:
        number = hash((number, token_id))
        numbers.append(number)
    return numbers
