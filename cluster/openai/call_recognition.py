"""Which format of tool calls a model was trained to write, told from its chat template and its tokens."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from functools import partial
from typing import Final

from cluster.openai.call_formats import FORMATS, CallFormat
from cluster.openai.tool_calls import CallDelta, ToolCallParser
from cluster.openai.trial_chats import SUFFIXED, tried
from cluster.openai.value_types import ToolSchema
from text.past_calls import PROBE_ARGUMENTS, PROBE_NAME, PROBE_TOOL, PROBE_USER, probe_messages
from text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_NOT_RECOGNISED: Final = (
    "the chat template does not show how the model calls tools, so that its calls are answered as text; where it was "
    f"trained to, name the format with --tool-call-parser (model.tool_parser), one of {', '.join(FORMATS)}"
)
_TOOLS: Final = {PROBE_NAME: ToolSchema(PROBE_TOOL["function"]["parameters"])}
#: the end of a tag that has one
_SUFFIX: Final = re.compile(r"<tool_calls?(:[^\s<>\"']{1,64})>")


def tool_format(tokenizer: Tokenizer, name: str | None = None) -> CallFormat | None:
    """Return the format that an operator named, else the one that is recognised; without either None, logging that."""
    name = name or recognised(tokenizer)
    if name is None:
        if tokenizer.chat_template_source:
            render, [question, *_] = partial(tried, tokenizer), probe_messages()
            shows_tools = render([question], [PROBE_TOOL]) != render([question], None)
            logger.log(logging.WARNING if shows_tools else logging.INFO, "%s", _NOT_RECOGNISED)
        return None
    return format_of(name, tokenizer)


def format_of(name: str, tokenizer: Tokenizer) -> CallFormat:
    """Return the format of that name, with the marks that this model's tokens have of it."""
    kind = FORMATS[name]
    suffix = _SUFFIX.search(" ".join(tokenizer.added_tokens)) if name in SUFFIXED else None
    return kind if suffix is None else kind.with_suffix(suffix[1])


def recognised(tokenizer: Tokenizer) -> str | None:
    """Return the name of the format in which the model writes calls; None where nothing tells.

    First by how its template shows a past call, which a format's own parser must read back as it was; then by the marks
    in what the template tells the model of tools, in the template itself, among the tokens; a past call without any
    mark comes last: some templates show calls so that are to be written with one.
    """
    tools = [PROBE_TOOL]
    question, call, result = probe_messages()
    rendered = partial(tried, tokenizer)
    past = rendered([question, call], tools) or rendered([question, call, result], tools) or ""
    shown = past[past.rfind(PROBE_USER) + len(PROBE_USER) :]
    source = tokenizer.chat_template_source
    kinds = {
        name: format_of(name, tokenizer)
        for name, kind in FORMATS.items()
        if all(mark in source for mark in kind.template_marks)
    }
    read_back = {name: left for name, kind in kinds.items() if (left := _left_of_call(kind, shown)) is not None}
    # where several formats read it, the one for which nothing of the marks is left as text
    best = min(read_back, key=read_back.__getitem__, default=None)
    if best is not None and any(mark in shown for mark in (*kinds[best].opens, *kinds[best].heads)):
        return best
    without = rendered([question], None) or ""
    told = (rendered([question], tools) or "") if rendered([question], tools) != without else ""
    for text in (told, source):
        marked = _most_marked(kinds, text, without)
        if marked is not None:
            return marked
    return best or _by_tokens(kinds, tokenizer.added_tokens)


def _left_of_call(kind: CallFormat, text: str) -> int | None:
    """Return how many characters are content beside the past call; None where the call is not read as it was."""
    parser = ToolCallParser(kind, _TOOLS)
    pieces = [*parser.push(text), *parser.flush(is_cut=False)]
    calls = [piece for piece in pieces if isinstance(piece, CallDelta)]
    arguments = "".join(call.arguments for call in calls)
    try:
        is_it = parser.num_calls == 1 and calls[0].name == PROBE_NAME and json.loads(arguments) == PROBE_ARGUMENTS
    except ValueError:
        return None
    return sum(len(piece) for piece in pieces if isinstance(piece, str)) if is_it else None


def _most_marked(kinds: dict[str, CallFormat], text: str, without: str) -> str | None:
    """Return the format that has the longest marks, all of them in `text`, and none of them there without tools."""
    sizes: dict[str, int] = {}
    for name, kind in kinds.items():
        marks = (*kind.opens[:1], *kind.heads[:1], *((kind.pairs.open,) if kind.pairs else ()))
        if marks and not kind.weak_opens and all(mark in text and mark not in without for mark in marks):
            sizes[name] = sum(map(len, marks))
    return max(sizes, key=sizes.__getitem__, default=None)


def _by_tokens(kinds: dict[str, CallFormat], tokens: Iterable[str]) -> str | None:
    """Return the format whose first mark is a token of its own, where no other format has that mark."""
    owned = set(tokens)
    found = {
        name: kind for name, kind in kinds.items() if kind.opens and kind.opens[0] in owned and not kind.weak_opens
    }
    return next(iter(found), None) if len(set(found.values())) == 1 else None
