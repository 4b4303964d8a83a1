"""The thoughts that a conversation has had, in the form in which its chat template takes them, learned by rendering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from text.past_calls import PROBE_USER, probe_messages

#: Names a thought goes by: what most templates read, gpt-oss's, and vLLM's newer one.
NAMES: Final = ("reasoning_content", "thinking", "reasoning")
PROBE_THOUGHT: Final = "probe-thought"


def named(thought: str) -> dict[str, str]:
    """Return a thought under all names that templates read."""
    return dict.fromkeys(NAMES, thought)


@dataclass(frozen=True, slots=True, kw_only=True)
class PastThoughtForm:
    """What a chat template wants of past thoughts that another one does not."""

    wants_part: bool = False  #: a part of the content, of the kind `thinking`
    is_content: bool = False  #: before a call it takes a thought or content, not both

    @classmethod
    def learned(cls, render: Callable[[Sequence[dict[str, Any]]], str | None]) -> PastThoughtForm:
        """Find out by `render`, which returns None where the template refuses a conversation."""
        question = {"role": "user", "content": PROBE_USER}
        answer = {"role": "assistant", "content": "probe-answer", **named(PROBE_THOUGHT)}
        in_part = cls(wants_part=True)
        if PROBE_THOUGHT not in (render([question, answer]) or ""):
            text = render([question, *in_part.fitted([answer])]) or ""
            is_read = "'thinking'" not in text and '"thinking"' not in text  # not put in as the list that it is
            return in_part if PROBE_THOUGHT in text and is_read else cls()
        for as_text in (False, True):
            _, call, result = probe_messages(as_text=as_text, content="probe-answer")
            if render([question, call, result]) is not None:
                return cls(is_content=render([question, {**call, **named(PROBE_THOUGHT)}, result]) is None)
        return cls()

    def fitted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return `messages`, whose thoughts go by all their names, in this form."""
        return [self._message(message) if message.get(NAMES[0]) else message for message in messages]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        thought, content = message[NAMES[0]], message.get("content")
        if self.wants_part:
            parts = [{"type": "text", "text": content}] if content and isinstance(content, str) else content or []
            without = {name: value for name, value in message.items() if name not in NAMES}
            return {**without, "content": [{"type": "thinking", "thinking": thought}, *parts]}
        if self.is_content and content and message.get("tool_calls"):
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            return {**message, "content": "", **named(f"{thought}\n\n{text}")}
        return message
