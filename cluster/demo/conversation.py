"""`kvray demo`: a conversation of three turns that shows what the cache does."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from typing import Any

from rich.console import Console

from cluster.demo.corpus import make_lookup

_NOTES_TOKENS = 1500
_NUM_FACTS = 12


def hold_conversation(url: str, out: Console, stop: threading.Event) -> None:
    """Notes in the first turn, three questions about them; prints answers, TTFTs and the prompt tokens' sources."""
    notes, questions = _notes_and_questions()
    messages: list[dict[str, str]] = []
    out.print(f"notes of about {_NOTES_TOKENS} tokens, then three questions about them\n")
    for turn, (question, expected) in enumerate(questions):
        if stop.is_set():
            return
        text = f"{notes}\n{question}" if turn == 0 else question
        messages.append({"role": "user", "content": text})
        answer, ttft_s, usage = _ask(url, messages)
        messages.append({"role": "assistant", "content": answer})
        sources = usage["prompt_sources"]
        where = ", ".join(f"{count} {source}" for source, count in sources.items() if count)
        mark = "right" if answer.strip() == expected.strip() else f"wrong, wanted {expected.strip()!r}"
        out.print(f"you    {question}", markup=False)
        out.print(f"model  {answer.strip()}   ({mark})", markup=False)
        out.print(f"       first token after {1000 * ttft_s:.0f} ms; {usage['prompt_tokens']} prompt tokens: {where}\n")


def _notes_and_questions() -> tuple[str, list[tuple[str, str]]]:
    """One text of notes and three (question, answer) pairs about it."""
    lookups = [
        make_lookup(random.Random(20), num_tokens=_NOTES_TOKENS, num_facts=_NUM_FACTS, position=position)
        for position in (0.9, 0.1, 0.5)
    ]  # one seed, one text of notes
    return lookups[0].notes, [(lookup.question, lookup.answer) for lookup in lookups]


def _ask(url: str, messages: list[dict[str, str]]) -> tuple[str, float, dict[str, Any]]:
    body = {
        "messages": messages,
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_prompt_sources": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    started_s = time.perf_counter()
    ttft_s = 0.0
    answer = ""
    usage: dict[str, Any] = {}
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            payload = line.decode().removeprefix("data: ").strip()
            if not payload or payload == "[DONE]":
                continue
            event = json.loads(payload)
            usage |= event.get("usage") or {}
            usage |= event.get("kvray") or {}
            for choice in event.get("choices", ()):
                text = choice["delta"].get("content") or ""
                if text and not answer:
                    ttft_s = time.perf_counter() - started_s
                answer += text
    return answer, ttft_s, usage
