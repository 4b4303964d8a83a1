"""Answers POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from cluster.openai import prompts
from cluster.openai.answer import Answer
from cluster.openai.callers import Caller
from cluster.openai.constraints import constraint_of
from cluster.openai.conversation import rendered, template_kwargs
from cluster.openai.errors import bad_field
from cluster.openai.format_or_call import format_or_call
from cluster.openai.generation import Generation
from cluster.openai.logprobs import chat_logprobs, prompt_logprobs
from cluster.openai.output_parser import OutputParser, ThoughtDelta
from cluster.openai.protocol import ChatRequest
from cluster.openai.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatFinish,
    ChatLogprobs,
    ChatReply,
    ChatReplyMessage,
    FunctionCall,
    KvrayExtras,
    ToolCall,
    Usage,
)
from cluster.openai.sampling import check_stream_options, max_output_tokens
from cluster.openai.starting import OutputPlan, start
from cluster.openai.stream import event
from cluster.openai.surface import Surface
from cluster.openai.thought_grammar import written_before, written_lead
from cluster.openai.thoughts import ThoughtPlan, plan_thought
from cluster.openai.tool_calls import CallDelta
from cluster.openai.tools import ToolPlan, check_no_other_structure, plan_tools
from cluster.openai.transcript import Delta, LoggedToken
from messages.errors import RequestError
from messages.request import Grammar

_encode = msgspec.json.Encoder().encode


class Begun(NamedTuple):
    """A chat request that was checked, rendered and tokenized, and does not run yet."""

    token_ids: list[int]  #: of the prompt
    tools: ToolPlan
    generation: Generation


async def start_chat(surface: Surface, caller: Caller, fields: ChatRequest, request_id: str) -> Chat:
    """Check, render and tokenize a request; nothing runs yet.

    Raises:
        RequestError: a field cannot be served; names it.
    """
    return Chat(surface, fields, f"chatcmpl-{request_id}", await begin(surface, caller, fields, request_id))


async def begin(surface: Surface, caller: Caller, fields: ChatRequest, request_id: str) -> Begun:
    """Check, render and tokenize a request, for whoever puts the answer into a form.

    Raises:
        RequestError: a field cannot be served; names it.
    """
    surface.check_model(fields.model)
    check_stream_options(fields)
    if set(fields.modalities or ()) - {"text"}:
        raise bad_field("modalities", fields.modalities, '["text"]: nothing else is generated here')
    if fields.top_logprobs and not fields.logprobs:
        raise bad_field("top_logprobs", fields.top_logprobs, "logprobs to be true with it")
    structure = constraint_of(fields, surface.limits.json_whitespace)
    tools = plan_tools(fields, surface.tool_format)
    if structure is not None and tools.grammar is not None:
        check_no_other_structure(structure[0])
        structure = None  # it is of the content, which a forced call has none of
    prompt = _prompt(surface, fields, tools)
    thought = _thought(surface, fields, tools, prompt)
    lead = written_lead(thought, surface.tokenizer)
    if structure is not None:
        structure = _beside_tools(surface, structure, tools, lead)
        lead = lead if tools.template_tools is None else ""
    token_ids = await prompts.encoded(
        surface,
        "messages",
        prompt,
        add_special_tokens=bool(fields.add_special_tokens),  # the template writes them itself
        truncate=fields.truncate_prompt_tokens,
        max_tokens=fields.max_completion_tokens or fields.max_tokens,
    )
    plan = OutputPlan(
        max_tokens=[_max_tokens(surface, fields, len(token_ids))],
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        prompt_logprobs=fields.prompt_logprobs,
        grammar=structure if tools.grammar is None else (tools.grammar_param, tools.grammar),
        before="" if thought is None else written_before(thought, surface.tokenizer, lead=lead),
        shown_ids=(frozenset() if tools.kind is None else surface.call_ids)
        | (frozenset() if thought is None else surface.thought_ids),
        thought=thought,
    )
    return Begun(token_ids, tools, await start(surface, caller, fields, request_id, [token_ids], plan))


def _beside_tools(
    surface: Surface, structure: tuple[str, Grammar], tools: ToolPlan, lead: str = ""
) -> tuple[str, Grammar]:
    """Let the output be a call as well, where the model may make one. `lead`: stands before the structure then.

    Raises:
        RequestError: it is not known what its calls begin with.
    """
    param, grammar = structure
    if tools.template_tools is None:
        return structure
    if not tools.begins:
        raise RequestError(
            f"{param}: got it together with tools, want tool_choice none, or required: how this model begins a call is"
            " not known",
            param=param,
            code="invalid_value",
        )
    return param, format_or_call(grammar, tools.begins, surface.tokenizer, lead)


def _prompt(surface: Surface, fields: ChatRequest, tools: ToolPlan) -> str:
    return rendered(
        surface.tokenizer,
        fields.messages,
        fields,
        tools.template_tools,
        takes_template=surface.limits.takes_chat_template,
    )


def _thought(surface: Surface, fields: ChatRequest, tools: ToolPlan, prompt: str) -> ThoughtPlan | None:
    """Plan the outputs' thoughts; None where all that they write is content, or calls."""
    last = fields.messages[-1].content
    texts = [last] if isinstance(last, str) else [p if isinstance(p, str) else p.text or "" for p in last or ()]
    return plan_thought(
        surface.thought_format,
        prompt,
        template_kwargs(fields),
        continued="\n".join(texts) if fields.continue_final_message else None,
        call_marks=() if tools.kind is None else tools.kind.marks,
    )


def _max_tokens(surface: Surface, fields: ChatRequest, num_prompt_tokens: int) -> int:
    """Return the most output tokens: `max_completion_tokens`, else `max_tokens`, else what remains of the context."""
    if fields.max_tokens == 0:
        raise bad_field("max_tokens", 0, "at least 1")
    param = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    asked = fields.max_completion_tokens or fields.max_tokens
    return max_output_tokens(param, asked, num_prompt_tokens, surface.model)


@dataclass(slots=True)
class _Message:
    """One choice of a whole reply, as it grows."""

    thought: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  #: of calls
    names: list[str] = field(default_factory=list)  #: of the functions called
    arguments: list[list[str]] = field(default_factory=list)
    logprobs: list[LoggedToken] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def add(self, pieces: list[ThoughtDelta | str | CallDelta], delta: Delta, tools: ToolPlan) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                self.content.append(piece)
            elif isinstance(piece, ThoughtDelta):
                self.thought.append(piece.text)
            else:
                self._add_call(piece, tools)
        self.logprobs += delta.logprobs
        self.token_ids += delta.token_ids

    def _add_call(self, call: CallDelta, tools: ToolPlan) -> None:
        if call.name is not None:
            self.ids.append(tools.call_id(call))
            self.names.append(call.name)
            self.arguments.append([])
        self.arguments[call.index].append(call.arguments)

    def tool_calls(self) -> list[ToolCall]:
        return [
            ToolCall(id=call_id, type="function", function=FunctionCall("".join(arguments), name))
            for call_id, name, arguments in zip(self.ids, self.names, self.arguments, strict=True)
        ]


class Chat(Answer):
    """The answer to a chat request: the assistant's next turn."""

    def __init__(self, surface: Surface, fields: ChatRequest, reply_id: str, begun: Begun) -> None:
        generation = begun.generation
        self._may_think = generation.transcripts[0].num_reasoning_tokens is not None
        shows_thoughts = fields.include_reasoning is not False
        has_tokens = shows_thoughts or not self._may_think  #: else they would tell of thoughts, as in vLLM
        self._has_logprobs = bool(fields.logprobs) and has_tokens
        self._has_token_ids = bool(fields.return_token_ids) and has_tokens
        self._shows_tokens = self._has_logprobs or self._has_token_ids
        self._parsers = [OutputParser(begun.tools, shows_thoughts=shows_thoughts) for _ in generation.requests]
        is_text_only = not self._shows_tokens and not self._parsers[0].reads_calls
        super().__init__(surface, fields, reply_id, generation, is_text_only=is_text_only)
        self._fields = fields
        self._token_ids = begun.token_ids
        self._tools = begun.tools
        self._is_prompt_given = False
        self._messages = [_Message() for _ in generation.requests]  #: of a whole reply
        self._choices: dict[int, ChatChoice] = {}

    def _add(self, index: int, delta: Delta) -> None:
        """Implement `Answer._add`."""
        self._messages[index].add(self._parsers[index].split(delta), delta, self._tools)
        if delta.finish_reason is not None:
            self._choices[index] = self._whole_choice(index, self._messages[index], delta)

    def _reply(self) -> bytes:
        """Implement `Answer._reply`: all choices as one ChatReply."""
        reply = ChatReply(
            id=self._id,
            created=self._created,
            model=self._surface.model.name,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._usage(),
            prompt_logprobs=prompt_logprobs(
                self._surface.tokenizer, self._token_ids, self._generation.transcripts[0].prompt_logprobs or []
            )
            if self._fields.prompt_logprobs is not None
            else UNSET,
            prompt_token_ids=self._token_ids if self._fields.return_token_ids else UNSET,
            kvray=self._extras(),
        )
        return _encode(reply)

    def _event(self, index: int, delta: Delta) -> bytes:
        """Implement `Answer._event`: a ChatChunk."""
        choice = self._chunk_of(index, delta)
        return b"" if choice is None else event(self._enveloped(choice, self._usage_of_event()))

    def _envelope(self, usage: Usage | UnsetType | None, kvray: KvrayExtras | UnsetType) -> ChatChunk:
        """Implement `Answer._envelope`."""
        return self._enveloped(None, usage, kvray)

    def _enveloped(
        self,
        choice: ChatChunkChoice | None,
        usage: Usage | UnsetType | None,
        kvray: KvrayExtras | UnsetType = UNSET,
    ) -> ChatChunk:
        has_prompt = bool(self._fields.return_token_ids) and not self._is_prompt_given
        self._is_prompt_given = True
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._surface.model.name,
            choices=[] if choice is None else [choice],
            usage=usage,
            prompt_token_ids=self._token_ids if has_prompt else UNSET,
            kvray=kvray,
        )

    def _chunk_of(self, index: int, delta: Delta) -> ChatChunkChoice | None:
        """Make one event's choice; None where a delta adds nothing that a client could see yet."""
        pieces = self._parsers[index].split(delta)
        if not pieces and delta.finish_reason is None and not self._shows_tokens:
            return None
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        thought = "".join(piece.text for piece in pieces if isinstance(piece, ThoughtDelta))
        calls = [piece for piece in pieces if isinstance(piece, CallDelta)]
        is_first = not self._is_begun[index]
        self._is_begun[index] = True
        return ChatChunkChoice(
            index=index,
            delta=ChatDelta(
                role="assistant" if is_first else UNSET,
                reasoning=thought or UNSET,
                reasoning_content=thought or UNSET,
                content=content if content or self._has_empty_content(index, delta) else UNSET,
                tool_calls=[self._streamed_call(call) for call in calls] if calls else UNSET,
            ),
            logprobs=self._chat_logprobs(delta.logprobs),
            finish_reason=self._finish_reason(index, delta),
            stop_reason=UNSET if delta.stop_reason is None else delta.stop_reason,
            token_ids=delta.token_ids if self._has_token_ids else UNSET,
        )

    def _has_empty_content(self, index: int, delta: Delta) -> bool:
        """Tell whether a chunk without text says so: where its choice may have calls, only the last one without any."""
        if not self._parsers[index].reads_calls and not self._may_think:
            return True
        return delta.finish_reason is not None and not (self._parsers[index].has_calls or self._tools.is_forced)

    def _finish_reason(self, index: int, delta: Delta) -> ChatFinish | None:
        """Return the reason: "tool_calls" after calls, except the one that tool_choice named, as in OpenAI's API."""
        if delta.finish_reason == "stop" and self._parsers[index].has_calls and self._tools.named is None:
            return "tool_calls"
        return delta.finish_reason

    def _whole_choice(self, index: int, message: _Message, last: Delta) -> ChatChoice:
        calls = message.tool_calls()
        content = "".join(message.content)
        thought = "".join(message.thought)
        is_thought_alone = not content and self._generation.transcripts[index].num_reasoning_tokens
        has_content = bool(content) or not (calls or self._tools.is_forced or is_thought_alone)
        told = thought or None if self._may_think else UNSET
        return ChatChoice(
            index=index,
            message=ChatReplyMessage(
                content=content if has_content else None,
                reasoning=told,
                reasoning_content=told,
                tool_calls=calls or UNSET,
            ),
            logprobs=self._chat_logprobs(message.logprobs),
            finish_reason=self._finish_reason(index, last) or "stop",
            stop_reason=last.stop_reason,
            token_ids=message.token_ids if self._has_token_ids else UNSET,
        )

    def _chat_logprobs(self, tokens: list[LoggedToken]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        as_ids = bool(self._fields.return_tokens_as_token_ids)
        return chat_logprobs(tokens, self._fields.top_logprobs or 0, as_ids=as_ids)

    def _streamed_call(self, call: CallDelta) -> ToolCall:
        """Write a piece of a call; its first one carries id and name."""
        if call.name is None:
            return ToolCall(index=call.index, function=FunctionCall(call.arguments))
        function = FunctionCall(call.arguments, call.name)
        return ToolCall(index=call.index, id=self._tools.call_id(call), type="function", function=function)
