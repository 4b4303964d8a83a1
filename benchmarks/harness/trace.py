"""Traces scaled to a small model: one token stands for a block of the trace, equal blocks for equal tokens."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK_SIZE = 16  #: tokens, of kvray's blocks: reuse comes in whole ones


class Turn(NamedTuple):
    """A request of a session."""

    prompt: list[int]
    max_tokens: int


def agent_sessions(path: Path, num_sessions: int, num_requests: int, vocab_size: int) -> list[list[Turn]]:
    """Read sessions of `agent_sessions.jsonl.xz`: 64 tokens of the trace are one here, prompts at most 6,000 long."""
    with lzma.open(path, "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(num_sessions), file, strict=False)]
    return [list(_session(number, row, num_requests, vocab_size)) for number, row in enumerate(rows)]


def _session(number: int, row: dict[str, Any], num_requests: int, vocab_size: int) -> Iterator[Turn]:
    ids: list[int] = []
    asked = [request for request in row["requests"] if "requests" not in request]  # sub-agents are left out
    for request in asked[:num_requests]:
        ids = ids[: request["keep"]]
        for first, count in request["runs"]:
            ids.extend(range(first, first + count))
        prompt = [_token(f"{number}/{block}", vocab_size) for block in ids[:6000]]
        if len(prompt) > 1:
            yield Turn(prompt, max(1, min(16, request["out"] // 64)))


def conversations(path: Path, num_requests: int, vocab_size: int) -> list[list[Turn]]:
    """Read requests of `mooncake_conversation.jsonl`, each a session: a block of 512 tokens is 16 here."""
    sessions = []
    with path.open() as file:
        for _, line in zip(range(num_requests), file, strict=False):
            row = json.loads(line)
            prompt = [_token(f"{block}/{i}", vocab_size) for block in row["hash_ids"] for i in range(BLOCK_SIZE)]
            sessions.append([Turn(prompt[:6000], max(1, min(16, row["output_length"] // 32)))])
    return sessions


def endless_hits(sessions: list[list[Turn]]) -> float:
    """Return the share of prompt tokens that a cache which never loses a block would hit, asked turn by turn."""
    seen: set[int] = set()
    num_hits = num_tokens = 0
    for number in range(max(map(len, sessions))):
        for session in sessions:
            if number >= len(session):
                continue
            prompt = session[number].prompt
            names = []
            name = 0
            for begin in range(0, len(prompt) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
                name = hash((name, *prompt[begin : begin + BLOCK_SIZE]))
                names.append(name)
            usable = names[: (len(prompt) - 1) // BLOCK_SIZE]
            num_hits += BLOCK_SIZE * next((i for i, name in enumerate(usable) if name not in seen), len(usable))
            num_tokens += len(prompt)
            seen.update(names)
    return num_hits / num_tokens


def _token(key: str, vocab_size: int) -> int:
    return 5 + random.Random(key).randrange(vocab_size - 5)
