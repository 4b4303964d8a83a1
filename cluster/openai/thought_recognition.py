"""Which format of thoughts a model was trained to write, told from its chat template and its tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final

from cluster.openai.thought_formats import THOUGHT_FORMATS, ThoughtFormat
from cluster.openai.thoughts import ThoughtPlan
from cluster.openai.trial_chats import SUFFIXED, tried
from text.past_calls import PROBE_TOOL, PROBE_USER, probe_messages
from text.past_thoughts import PROBE_THOUGHT
from text.tokenizer import Tokenizer

_ANSWER: Final = "probe-answer"
_ON: Final[dict[str, Any]] = {"enable_thinking": True, "thinking": True}
#: the end of a tag that has one
_SUFFIX: Final = re.compile(r"<think(:[^\s<>\"']{1,64})>")


def thought_format(tokenizer: Tokenizer, name: str | None = None) -> ThoughtFormat | None:
    """Return the format that an operator named, else the one that is recognised; None where there is neither.

    A model whose format is recognised begins a thought only where its prompt or its output says so.
    """
    if name is not None:
        return format_of(name, tokenizer)
    found = recognised(tokenizer)
    return None if found is None else replace(format_of(found, tokenizer), is_implied=False)


def format_of(name: str, tokenizer: Tokenizer) -> ThoughtFormat:
    """Return the format of that name, with the marks that this model's tokens have of it."""
    kind = THOUGHT_FORMATS[name]
    tokens = tokenizer.added_tokens
    if name in SUFFIXED:
        suffix = _suffix(tokenizer)
        return kind if suffix is None else kind.with_suffix(suffix)
    if len(kind.opens) == len(kind.closes) > 1:
        pairs = sorted(zip(kind.opens, kind.closes, strict=True), key=lambda pair: pair[0] not in tokens)
        opens, closes = zip(*pairs, strict=True)
        return replace(kind, opens=opens, closes=closes)
    return kind


def recognised(tokenizer: Tokenizer) -> str | None:
    """Return the name of the format in which the model writes thoughts; None where nothing tells.

    First by how its template shows a past thought, which the format's own reader must read back as it was; then by what
    a prompt ends with; then by the marks in the template itself, and among the tokens.
    """
    tokens = " ".join(tokenizer.added_tokens)
    kinds = {name: format_of(name, tokenizer) for name in THOUGHT_FORMATS}
    if _suffix(tokenizer) is None:
        kinds = {name: kind for name, kind in kinds.items() if name not in SUFFIXED}
    source = tokenizer.chat_template_source
    known = source + tokens
    kinds = {
        name: kind
        for name, kind in kinds.items()
        if not kind.is_kept and (not kind.drops or any(mark in known for mark in kind.drops))
    }
    for shown in _past_thoughts(tokenizer):
        read_back = {
            name: (left, kind.lead not in known, not any(mark in known for mark in kind.yields))
            for name, kind in kinds.items()
            if (left := _left_of_thought(kind, shown)) is not None
        }
        # where several formats read it, the one for which nothing of the marks is left as text
        if read_back:
            return min(read_back, key=read_back.__getitem__)
    question = probe_messages()[:1]
    for template_kwargs in ({}, _ON):
        end = (tried(tokenizer, question, is_begun=True, template_kwargs=template_kwargs) or "").rstrip()
        for name, kind in kinds.items():
            if any(end.endswith(mark.rstrip()) for mark in kind.opens):
                return name
    # those first that have what other models' templates lack
    kinds = dict(sorted(kinds.items(), key=lambda item: not any(m in known for m in (*item[1].drops, *item[1].yields))))
    for text in (source, tokens):
        for name, kind in kinds.items():
            pairs = zip(kind.opens, kind.closes, strict=False)
            if any(close in text and (open_ in text or kind.opens == ("<think>",)) for open_, close in pairs):
                return name
    return None


def _suffix(tokenizer: Tokenizer) -> str | None:
    found = _SUFFIX.search(" ".join([*tokenizer.added_tokens, *_past_thoughts(tokenizer)]))
    return None if found is None else found[1]


def _past_thoughts(tokenizer: Tokenizer) -> list[str]:
    """Return how the template shows a thought that the conversation has: in a last turn, or before a call."""
    question, call, result = probe_messages()
    thinks = {"reasoning_content": PROBE_THOUGHT}
    answer = {"role": "assistant", "content": _ANSWER, **thinks}
    shown: list[str] = []
    for messages, tools in (([question, answer], None), ([question, {**call, **thinks}, result], [PROBE_TOOL])):
        for template_kwargs in ({}, _ON):
            text = tried(tokenizer, messages, tools, template_kwargs=template_kwargs) or ""
            text = text[text.rfind(PROBE_USER) + len(PROBE_USER) :]
            if PROBE_THOUGHT in text:
                shown.append(text)
    return shown


def _left_of_thought(kind: ThoughtFormat, text: str) -> int | None:
    """Return how many characters are content beside a past thought; None where the thought is not read as it was."""
    plan = ThoughtPlan(kind=kind, begins_inside=False, may_open=True, close=kind.closes[0], drops=kind.drops)
    reader = plan.reader()
    read, last = reader.push(text), reader.flush("")
    is_it = (read.thought + last.thought).strip() == PROBE_THOUGHT and not reader.is_inside
    return len(read.content + last.content) if is_it else None
