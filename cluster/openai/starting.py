"""What chat and text completions do alike to turn prompts and fields into sequences."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from secrets import token_hex
from typing import NamedTuple

import msgspec

from cluster.openai.callers import Caller
from cluster.openai.generation import Generation
from cluster.openai.hints import hints_of
from cluster.openai.prompts import packed
from cluster.openai.protocol import SharedFields
from cluster.openai.sampling import num_choices, sampling_params, stop_strings
from cluster.openai.surface import Surface
from cluster.openai.thoughts import ThoughtPlan
from cluster.openai.transcript import TextOptions, Transcript
from messages.request import GenerateRequest, Grammar
from text.detokenizer import Context


class OutputPlan(NamedTuple):
    """The endpoint's decisions about the output."""

    max_tokens: list[int]  #: one per prompt
    logprobs: int | None
    prompt_logprobs: int | None
    grammar: tuple[str, Grammar] | None  #: with the field that asks for it
    before: str = ""  #: what stands before the grammar (`messages.request.Grammar`)
    shown_ids: frozenset[int] = frozenset()  #: special tokens that the text keeps, for whoever parses it
    thought: ThoughtPlan | None = None


async def start(
    surface: Surface,
    caller: Caller,
    fields: SharedFields,
    request_id: str,
    prompts: Sequence[list[int]],
    plan: OutputPlan,
) -> Generation:
    """Make the generation of `n` choices for each of `prompts`, checked but not yet running.

    Raises:
        RequestError: a field cannot be served; names it.
        CapacityError: too many grammars wait to be checked.
    """
    n = num_choices(fields, len(prompts), surface.limits)
    skips_special = fields.skip_special_tokens is not False
    options = TextOptions(
        stop=stop_strings(fields, surface.limits),
        includes_stop=bool(fields.include_stop_str_in_output),
        min_tokens=fields.min_tokens or 0,
        skips_special_tokens=skips_special and not plan.shown_ids,
        hidden_ids=_hidden(surface.tokenizer.special_ids, plan.shown_ids) if skips_special else frozenset(),
        stop_token_ids=frozenset(fields.stop_token_ids or ()),
        thought=plan.thought,
    )
    contexts = [
        Context.of(
            surface.tokenizer,
            token_ids,
            skip_special_tokens=options.skips_special_tokens,
            hidden_ids=options.hidden_ids,
        )
        for token_ids in prompts
    ]
    goes_on = [bool(context.token_ids) for context in contexts]
    checked = {follows: await _checked_grammar(surface, plan, follows_text=follows) for follows in set(goes_on)}
    base = f"{request_id}-{token_hex(4)}"  # clients may send the same id twice, but sequence ids must not meet
    # As vLLM without --scheduling-policy priority: a client that sends one everywhere is served everywhere.
    priority = (fields.priority or 0) if surface.limits.uses_priority else 0
    hints = hints_of(fields, caller)
    salt, owner = caller.salt(fields.cache_salt), caller.owner(fields.cache_salt)
    requests: list[GenerateRequest] = []
    for token_ids, max_tokens, follows in zip(prompts, plan.max_tokens, goes_on, strict=True):
        params = sampling_params(
            fields,
            surface.model,
            surface.limits,
            max_tokens=max_tokens,
            logprobs=plan.logprobs,
            prompt_logprobs=plan.prompt_logprobs,
            grammar=checked[follows],
        )
        data = packed(token_ids)
        requests += [
            GenerateRequest(
                request_id=f"{base}-{len(requests) + choice}",
                token_ids=data,
                num_prompt_tokens=len(token_ids),
                params=msgspec.structs.replace(params, choice=choice) if choice else params,
                salt=salt,
                tenant=owner,
                hints=hints,
                priority=priority,
                wants_word=bool(fields.stream),
            )
            for choice in range(n)
        ]
    transcripts = [Transcript(surface.tokenizer, options, context) for context in contexts for _ in range(n)]
    return Generation(surface.backend, surface.metrics, requests, transcripts, n)


async def _checked_grammar(surface: Surface, plan: OutputPlan, *, follows_text: bool) -> Grammar | None:
    """Return what an output is held to, checked. `follows_text`: behind a prompt that has some."""
    if plan.grammar is None:
        return None
    param, asked = plan.grammar
    follows_text = follows_text and not surface.tokenizer.decoding.is_byte_level  # where it changes anything
    grammar = await surface.grammars.check(param, msgspec.structs.replace(asked, follows_text=follows_text))
    return msgspec.structs.replace(grammar, before=plan.before) if plan.before else grammar


@functools.lru_cache(maxsize=8)
def _hidden(special_ids: frozenset[int], shown_ids: frozenset[int]) -> frozenset[int]:
    """Return the special tokens that a text leaves out though it keeps others; none where it keeps none of them."""
    return special_ids - shown_ids if shown_ids else frozenset()
