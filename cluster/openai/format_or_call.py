"""A structure beside tools that the model may call: the output is the structure, or begins as a call does."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from messages.request import Grammar
from text.tokenizer import Tokenizer


def format_or_call(structure: Grammar, begins: Sequence[str], tokenizer: Tokenizer, lead: str = "") -> Grammar:
    """Return a grammar of `structure`, or of any text that begins with one of `begins`, the marks before a call.

    `lead`: stands before the structure, in Lark's language.

    What a call says after its mark is held to nothing, as without a structure. A mark may be, or hold, special tokens,
    which no text stands for.
    """
    marks = " | ".join(written_mark(begin, tokenizer) for begin in begins)
    calls = f"start: ({marks}) <[0-{tokenizer.vocab_size - 1}]>*"
    if lead:
        structure = msgspec.structs.replace(structure, before=f"before: {lead}")
    options = [structure, Grammar(kind="lark", spec=calls)]
    return Grammar(kind="any_of", spec=msgspec.json.encode(options).decode())


def written_mark(mark: str, tokenizer: Tokenizer) -> str:
    """Write a mark in Lark's language, special tokens by their ids."""
    parts: list[str] = []
    text = ""
    for token_id in tokenizer.encode(mark, add_special_tokens=False):
        if token_id in tokenizer.special_ids:
            parts += [json.dumps(text)] * bool(text) + [f"<[{token_id}]>"]
            text = ""
        else:
            text += tokenizer.token_text(token_id)
    if not any(part.startswith("<[") for part in parts):
        return json.dumps(mark)  # not as it was tokenized: that may have put a space before it
    return f"({' '.join([*parts, *[json.dumps(text)] * bool(text)])})"
