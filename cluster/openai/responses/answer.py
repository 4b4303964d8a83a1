"""The answer to a request to /v1/responses, whole or as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cluster.openai.chat import Begun
from cluster.openai.logprobs import chat_logprobs
from cluster.openai.output_parser import OutputParser, ThoughtDelta
from cluster.openai.replies import ChatTokenLogprob
from cluster.openai.responses.kept import id_of
from cluster.openai.responses.output import ResponseOutput
from cluster.openai.responses.protocol import ReasoningOptions, ResponsesRequest, TextFormat, TextOptions
from cluster.openai.responses.replies import (
    CachedTokens,
    Event,
    FailureDetails,
    IncompleteDetails,
    ReasoningReply,
    ReasoningTokens,
    ResponseCompleted,
    ResponseCreated,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseReply,
    ResponseUsage,
    TextReply,
)
from cluster.openai.responses.translation import shows_logprobs
from cluster.openai.stream import EventStream, reply_while_connected
from cluster.openai.surface import Surface
from cluster.openai.tool_calls import CallDelta
from cluster.openai.transcript import Delta, LoggedToken
from messages.errors import KvrayError

_encode = msgspec.json.Encoder().encode


class ResponseAnswer:
    """One request's answer. It begins when `respond` is awaited; one answer each."""

    def __init__(
        self,
        surface: Surface,
        fields: ResponsesRequest,
        key: str,
        begun: Begun,
        num_items: int,
        keep: Callable[[bytes], None],
    ) -> None:
        """Make it ready; nothing runs yet.

        Args:
            surface: what it is answered from.
            fields: the request.
            key: of the response: its id without prefix.
            begun: the chat request that it was turned into.
            num_items: of its input.
            keep: is told the whole response as JSON before its client is; not of one that fails.
        """
        self._surface = surface
        self._fields = fields
        self._begun = begun
        self._keep = keep
        self._parser = OutputParser(begun.tools)
        self._events: list[Event] = []  #: not written yet
        self._output = ResponseOutput(key, num_items, self._events.append)
        self._begun_reply = _begun_reply(surface, fields, key)
        self._logprobs: list[LoggedToken] = []  #: of tokens whose text is not there yet
        self._has_begun = False
        self._reply = self._begun_reply

    async def respond(self, request: Request) -> Response:
        """Return the HTTP response, a stream where the client asked for one.

        Raises:
            ClientDisconnect: the client left before a whole reply was ready.
            KvrayError: a whole reply was refused or failed.
        """
        generation = self._begun.generation
        if self._fields.stream:
            return EventStream(
                generation, self._surface.turn, self._event, self._last_event, self._failed, self._first_events
            )
        return await reply_while_connected(request, self._whole())

    async def _whole(self) -> bytes:
        await self._begun.generation.run(self._take)
        self._events.clear()
        return self._kept()

    def _event(self, index: int, delta: Delta) -> bytes:
        """Write what a delta brings as events; nothing where a client could not see it yet."""
        self._begin()
        self._take(index, delta)
        return self._written()

    def _first_events(self) -> bytes:
        self._begin()
        return self._written()

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            for kind in (ResponseCreated, ResponseInProgress):
                self._events.append(kind(sequence_number=next(self._output.numbers), response=self._begun_reply))

    def _last_event(self) -> bytes:
        self._kept()
        ended = ResponseCompleted if self._reply.status == "completed" else ResponseIncomplete
        self._events.append(ended(sequence_number=next(self._output.numbers), response=self._reply))
        return self._written()

    def _failed(self, error: KvrayError) -> bytes:
        """Write the event that ends a stream whose model failed."""
        failure = FailureDetails("rate_limit_exceeded" if error.status == 429 else "server_error", error.message)
        self._output.close("incomplete")
        reply = msgspec.structs.replace(
            self._begun_reply, status="failed", error=failure, output=self._output.items, usage=self._usage()
        )
        self._events.append(ResponseFailed(sequence_number=next(self._output.numbers), response=reply))
        return self._written()

    def _written(self) -> bytes:
        data = b"".join(map(_server_sent, self._events))
        self._events.clear()
        return data

    def _take(self, _index: int, delta: Delta) -> None:
        """Add what a delta brings to the output."""
        if shows_logprobs(self._fields):
            self._logprobs += delta.logprobs
        for piece in self._parser.split(delta):
            self._add(piece)
        if delta.finish_reason is not None:
            self._end(delta)

    def _add(self, piece: ThoughtDelta | str | CallDelta) -> None:
        """Add a piece of the model's turn."""
        if isinstance(piece, ThoughtDelta):
            self._logprobs.clear()  # only a message's text has them
            self._output.add_thought(piece.text)
            return
        if isinstance(piece, str):
            self._output.add_text(piece, self._text_logprobs())
            return
        if piece.name is not None:
            self._logprobs.clear()  # they were of the call
            self._output.begin_call(self._begun.tools.call_id(piece), piece.name)
        self._output.add_arguments(piece.arguments)

    def _end(self, last: Delta) -> None:
        is_cut = last.finish_reason == "length"
        has_text = self._output.is_in_message or (self._output.is_empty and not self._begun.tools.is_forced)
        if has_text:
            self._output.add_text("", self._text_logprobs())
        self._output.close("incomplete" if is_cut else "completed")
        self._reply = msgspec.structs.replace(
            self._begun_reply,
            status="incomplete" if is_cut else "completed",
            completed_at=None if is_cut else int(time.time()),
            incomplete_details=IncompleteDetails() if is_cut else None,
            output=self._output.items,
            usage=self._usage(),
        )

    def _kept(self) -> bytes:
        self._keep(data := _encode(self._reply))
        return data

    def _text_logprobs(self) -> list[ChatTokenLogprob]:
        if not self._logprobs:
            return []
        tokens, self._logprobs = self._logprobs, []
        return chat_logprobs(tokens, self._fields.top_logprobs or 0).content

    def _usage(self) -> ResponseUsage:
        usage = self._begun.generation.usage()
        details = usage.completion_tokens_details
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=CachedTokens(usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=ReasoningTokens(details.reasoning_tokens if details else 0),
            total_tokens=usage.total_tokens,
        )


def _server_sent(event: Event) -> bytes:
    name = str(event.__struct_config__.tag)
    return b"".join((b"event: ", name.encode(), b"\ndata: ", _encode(event), b"\n\n"))


def _begun_reply(surface: Surface, fields: ResponsesRequest, key: str) -> ResponseReply:
    """Make the response as it is when it begins: what the request says, spelled out."""
    defaults = surface.model.defaults
    text = fields.text or TextOptions()
    reasoning = fields.reasoning or ReasoningOptions()
    temperature = fields.temperature if fields.temperature is not None else defaults.temperature
    top_p = fields.top_p if fields.top_p is not None else defaults.top_p
    return ResponseReply(
        id=id_of(key),
        created_at=int(time.time()),
        status="in_progress",
        instructions=fields.instructions,
        max_output_tokens=fields.max_output_tokens,
        max_tool_calls=fields.max_tool_calls,
        metadata=fields.metadata or {},
        model=surface.model.name,
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        previous_response_id=fields.previous_response_id,
        prompt_cache_key=fields.prompt_cache_key,
        reasoning=ReasoningReply(reasoning.effort, reasoning.summary or reasoning.generate_summary),
        safety_identifier=fields.safety_identifier,
        store=fields.store is not False,
        temperature=1.0 if temperature is None else temperature,
        text=TextReply(text.format or TextFormat("text"), text.verbosity or "medium"),
        tool_choice=fields.tool_choice or "auto",
        tools=fields.tools or [],
        top_logprobs=fields.top_logprobs or 0,
        top_p=1.0 if top_p is None else top_p,
        user=fields.user,
    )
