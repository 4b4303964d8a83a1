"""Answers POST /v1/completions."""

from __future__ import annotations

import asyncio

import msgspec
from msgspec import UNSET, UnsetType

from cluster.openai import prompts as prompt_checks
from cluster.openai.answer import Answer
from cluster.openai.callers import Caller
from cluster.openai.constraints import constraint_of
from cluster.openai.errors import bad_field
from cluster.openai.generation import Generation
from cluster.openai.logprobs import completion_logprobs, echoed_logprobs, joined, prompt_logprobs
from cluster.openai.protocol import CompletionRequest
from cluster.openai.replies import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    KvrayExtras,
    PromptLogprobs,
    Usage,
)
from cluster.openai.sampling import check_stream_options, max_output_tokens, num_choices
from cluster.openai.starting import OutputPlan, start
from cluster.openai.stream import event
from cluster.openai.surface import Surface
from cluster.openai.transcript import Delta
from text.detokenizer import Context, prompt_text

_encode = msgspec.json.Encoder().encode
_OPENAI_MAX_TOKENS = 16  # the API's own default for text completions


async def start_completion(surface: Surface, caller: Caller, fields: CompletionRequest, request_id: str) -> Completion:
    """Check and tokenize a request; nothing runs yet.

    Raises:
        RequestError: a field cannot be served; names it.
    """
    _check(surface, fields)
    texts: list[str | None] = []
    prompts: list[list[int]] = []
    asked = prompt_checks.prompts_of(fields.prompt, surface.model)
    num_choices(fields, len(asked), surface.limits)  # so that no more than these are encoded
    for prompt in asked:
        if prompts:
            await asyncio.sleep(0)  # each is some ms of work at most, all are seconds: others' tokens go between them
        token_ids = await _token_ids(surface, fields, prompt)
        prompts.append(token_ids)
        texts.append(prompt if isinstance(prompt, str) and fields.truncate_prompt_tokens is None else None)
    plan = OutputPlan(
        max_tokens=[_max_tokens(surface, fields, len(token_ids)) for token_ids in prompts],
        logprobs=fields.logprobs,
        prompt_logprobs=_prompt_logprobs(fields),
        grammar=constraint_of(fields, surface.limits.json_whitespace),
    )
    generation = await start(surface, caller, fields, request_id, prompts, plan)
    return Completion(surface, fields, f"cmpl-{request_id}", prompts, texts, generation)


def _check(surface: Surface, fields: CompletionRequest) -> None:
    surface.check_model(fields.model)
    check_stream_options(fields)
    if fields.suffix:
        raise bad_field("suffix", fields.suffix, "no suffix: no model served here fills in the middle")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise bad_field("best_of", fields.best_of, f"the same as n, which is {fields.n or 1}")
    if fields.max_tokens == 0 and not fields.echo:
        raise bad_field("max_tokens", 0, "at least 1, or 0 together with echo")


async def _token_ids(surface: Surface, fields: CompletionRequest, prompt: str | list[int]) -> list[int]:
    truncate, max_tokens = fields.truncate_prompt_tokens, fields.max_tokens
    if not isinstance(prompt, str):
        return prompt_checks.fitted("prompt", prompt, truncate, max_tokens, surface.model)
    adds_special = fields.add_special_tokens is not False
    return await prompt_checks.encoded(
        surface, "prompt", prompt, add_special_tokens=adds_special, truncate=truncate, max_tokens=max_tokens
    )


def _max_tokens(surface: Surface, fields: CompletionRequest, num_prompt_tokens: int) -> int:
    asked = fields.max_tokens
    if asked is None:  # OpenAI's default, cut to what remains
        remaining = max_output_tokens("max_tokens", None, num_prompt_tokens, surface.model)
        return min(remaining, surface.model.defaults.max_new_tokens or _OPENAI_MAX_TOKENS)
    return max_output_tokens("max_tokens", max(asked, 1), num_prompt_tokens, surface.model)


def _prompt_logprobs(fields: CompletionRequest) -> int | None:
    """Return how many alternatives prompt tokens get; None: no logprobs. Echoed tokens get what generated ones get."""
    wanted = [k for k in (fields.prompt_logprobs, fields.logprobs if fields.echo else None) if k is not None]
    return max(wanted, default=None)


class Completion(Answer):
    """The answer to a completion request: what follows a prompt, or several."""

    def __init__(
        self,
        surface: Surface,
        fields: CompletionRequest,
        reply_id: str,
        prompts: list[list[int]],
        texts: list[str | None],
        generation: Generation,
    ) -> None:
        self._shows_tokens = fields.logprobs is not None or bool(fields.return_token_ids)
        self._is_prompt_only = fields.max_tokens == 0
        is_text_only = not self._shows_tokens and not self._is_prompt_only
        super().__init__(surface, fields, reply_id, generation, is_text_only=is_text_only)
        self._fields = fields
        self._prompts = prompts
        self._texts = texts
        self._pieces: list[list[CompletionChoice]] = [[] for _ in generation.requests]  #: of a whole reply

    def _add(self, index: int, delta: Delta) -> None:
        """Implement `Answer._add`."""
        self._pieces[index].append(self._choice(index, delta))

    def _reply(self) -> bytes:
        """Implement `Answer._reply`: all choices as one CompletionReply."""
        choices = [_whole(parts) for parts in self._pieces]
        return _encode(self._enveloped(choices, self._usage(), self._extras()))

    def _event(self, index: int, delta: Delta) -> bytes:
        """Implement `Answer._event`: a CompletionReply."""
        choice = self._choice(index, delta)
        if not choice.text and choice.finish_reason is None and not self._shows_tokens:
            return b""
        return event(self._enveloped([choice], self._usage_of_event(), UNSET))

    def _envelope(self, usage: Usage | UnsetType | None, kvray: KvrayExtras | UnsetType) -> CompletionReply:
        """Implement `Answer._envelope`."""
        return self._enveloped([], usage, kvray)

    def _enveloped(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None, kvray: KvrayExtras | UnsetType
    ) -> CompletionReply:
        return CompletionReply(
            id=self._id,
            created=self._created,
            model=self._surface.model.name,
            choices=choices,
            usage=usage,
            kvray=kvray,
        )

    def _usage(self) -> Usage:
        usage = self._generation.usage()
        if not self._is_prompt_only:
            return usage
        return msgspec.structs.replace(usage, completion_tokens=0, total_tokens=usage.prompt_tokens)

    def _choice(self, index: int, delta: Delta) -> CompletionChoice:
        """Make the choice that a delta adds; the first one of a choice carries what is said about its prompt."""
        fields = self._fields
        is_first = not self._is_begun[index]
        self._is_begun[index] = True
        if self._is_prompt_only:  # the engine makes one token at least: it is not shown
            delta = Delta(finish_reason="length" if delta.finish_reason else None)
        parts: list[CompletionLogprobs] = []
        if fields.logprobs is not None:
            if is_first and fields.echo:
                parts.append(self._echoed_logprobs(index))
            offset = len(self._echoed_text(index)) if fields.echo else 0
            as_ids = bool(fields.return_tokens_as_token_ids)
            parts.append(completion_logprobs(delta.logprobs, fields.logprobs, offset=offset, as_ids=as_ids))
        return CompletionChoice(
            index=index,
            text=self._echoed_text(index) + delta.text if is_first and fields.echo else delta.text,
            logprobs=joined(parts) if parts else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if fields.return_token_ids else UNSET,
            prompt_token_ids=self._prompt(index) if is_first and fields.return_token_ids else UNSET,
            prompt_logprobs=self._prompt_logprobs(index) if is_first and fields.prompt_logprobs is not None else UNSET,
        )

    def _prompt(self, index: int) -> list[int]:
        return self._prompts[index // self._generation.num_choices]

    def _echoed_text(self, index: int) -> str:
        """Return the prompt to be echoed: as the client sent it, where that is text and not to be cut, else decoded."""
        place = index // self._generation.num_choices
        text = self._texts[place]
        if text is None:
            skips = self._fields.skip_special_tokens is not False
            prompt, tokenizer = self._prompts[place], self._surface.tokenizer
            context = Context.of(tokenizer, prompt, skip_special_tokens=skips)
            text = self._texts[place] = prompt_text(tokenizer, prompt, context, skip_special_tokens=skips)
        return text

    def _echoed_logprobs(self, index: int) -> CompletionLogprobs:
        entries = self._generation.transcripts[index].prompt_logprobs or []
        fields, tokenizer = self._fields, self._surface.tokenizer
        return echoed_logprobs(
            tokenizer,
            self._prompt(index),
            entries,
            fields.logprobs or 0,
            text=self._echoed_text(index),
            skipped=frozenset() if fields.skip_special_tokens is False else tokenizer.special_ids,
            as_ids=bool(fields.return_tokens_as_token_ids),
        )

    def _prompt_logprobs(self, index: int) -> PromptLogprobs:
        told = self._generation.transcripts[index].prompt_logprobs or []
        return prompt_logprobs(self._surface.tokenizer, self._prompt(index), told)


def _whole(parts: list[CompletionChoice]) -> CompletionChoice:
    """Join a choice's pieces. The first says what is said about the prompt, the last how it ended."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return msgspec.structs.replace(
        parts[0],
        text="".join(part.text for part in parts),
        logprobs=joined(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        token_ids=UNSET
        if parts[0].token_ids is UNSET
        else [token_id for part in parts for token_id in part.token_ids or ()],
    )
