"""`kvray demo`: a conversation of three turns that shows what the cache does."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.direct_http import open_directly

#: Notes of about 1,500 tokens that the model was not trained on, and questions about them with their answers.
_CONVERSATION = Path(__file__).parent / "conversation.json"


def hold_conversation(
    url: str, api_key: str | None, out: Console, stop: threading.Event, *, as_json: bool = False
) -> None:
    """Give notes, ask three questions about them; print answers, TTFTs and where the prompts' tokens came from.

    As JSON that is a line for each question.
    """
    conversation = json.loads(_CONVERSATION.read_text())
    notes, questions = conversation["notes"], conversation["questions"]
    messages: list[dict[str, str]] = []
    if not as_json:
        out.print("notes of about 1,500 tokens, then three questions about them\n")
    for turn, (question, expected) in enumerate(questions):
        if stop.is_set():
            return
        text = f"{notes}\n{question}" if turn == 0 else question
        messages.append({"role": "user", "content": text})
        answer, ttft_s, usage = _ask(url, api_key, messages)
        messages.append({"role": "assistant", "content": answer})
        sources = usage["prompt_sources"]
        if as_json:
            told = {"question": question, "answer": answer, "expected": expected, "ttft_s": ttft_s}
            told |= {"prompt_tokens": usage["prompt_tokens"], "prompt_sources": sources}
            out.print(json.dumps(told), markup=False)
            continue
        where = ", ".join(f"{count} {source}" for source, count in sources.items() if count)
        mark = "right" if answer == expected else f"wrong, wanted {expected!r}"
        out.print(f"you    {question}", markup=False)
        out.print(f"model  {answer}   ({mark})", markup=False)
        out.print(f"       first token after {1000 * ttft_s:.0f} ms; {usage['prompt_tokens']} prompt tokens: {where}\n")


def _ask(url: str, api_key: str | None, messages: list[dict[str, str]]) -> tuple[str, float, dict[str, Any]]:
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
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    started_s = time.perf_counter()
    ttft_s = 0.0
    answer = ""
    usage: dict[str, Any] = {}
    with open_directly(request, 120) as response:
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
