"""What stands before an output's structure: a thought, and what the model writes between that and its answer."""

from __future__ import annotations

import json

from cluster.openai.format_or_call import written_mark
from cluster.openai.thoughts import ThoughtPlan
from text.tokenizer import Tokenizer


def written_lead(plan: ThoughtPlan | None, tokenizer: Tokenizer) -> str:
    """Return what stands before an answer, thought or none, in Lark's language; "" for nothing."""
    return written_mark(plan.kind.lead, tokenizer) if plan is not None and plan.kind.lead else ""


def written_before(plan: ThoughtPlan, tokenizer: Tokenizer, *, lead: str) -> str:
    """Return rules in Lark's language, of which `before` is a thought, then `lead`; "" where there is neither.

    A thought is any text without special tokens, up to its end mark: an output that began one has to end it. Where none
    is open, one may be left out.
    """
    kind = plan.kind
    rules: list[str] = []
    close = written_mark(plan.close, tokenizer)
    if "<[" in close:
        inside = f"FREE? {close}"
        rules.append("FREE: /(?s:.+)/")
    else:
        inside = "thought"
        rules.append(f"thought[suffix={json.dumps(plan.close)}]: /(?s:.*)/")
    if kind.between:
        inside += f" {written_mark(kind.between, tokenizer)}"
    opened = written_mark(kind.opens[0], tokenizer)
    if plan.begins_inside:
        body = f"{opened}? {inside}"  # models repeat the mark
    elif plan.may_open:
        body = f"({opened} {inside})?"
    else:
        body, rules = "", []
    body = f"{body} {lead}".strip()
    return "\n".join([f"before: {body}", *rules]) if body else ""
