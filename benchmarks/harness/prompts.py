"""Prompts that nobody has seen: random token ids, the same from the same seed, in every process."""

from __future__ import annotations

import random


def draw_prompts(seed: int, num: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Draw `num` prompts of `num_tokens` token ids. Two seeds share a prefix only by chance: no cache lives on that."""
    source = random.Random(seed)
    return [[source.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num)]
