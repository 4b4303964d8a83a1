"""What goes back from /v1/responses: OpenAI's response object, its items, and the events of its stream."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from cluster.openai.replies import ChatTokenLogprob
from cluster.openai.responses.protocol import InputItem, ResponseTool, ResponseToolChoice, TextFormat

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag="output_text"):
    """The part of a message that is its text."""

    text: str
    annotations: tuple[()] = ()
    logprobs: list[ChatTokenLogprob] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """What the model says."""

    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    """A function that the model calls; `arguments` is JSON text."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning_text"):
    """The part of a thought that is its text."""

    text: str


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """What the model thinks before it answers; it is told whole, not summed up."""

    id: str
    status: ItemStatus
    summary: tuple[()] = ()
    content: list[ReasoningText]


OutputItem: TypeAlias = OutputMessage | FunctionCallItem | ReasoningItem


class CachedTokens(msgspec.Struct, frozen=True):
    """Of the tokens read."""

    cached_tokens: int  #: nobody had to compute them
    cache_write_tokens: int = 0  #: that are paid for as such: none


class ReasoningTokens(msgspec.Struct, frozen=True):
    """Of the tokens written."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response ended before its model was done."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class FailureDetails(msgspec.Struct, frozen=True):
    """What a response failed of."""

    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class TextReply(msgspec.Struct, frozen=True):
    """The `text` of a request, spelled out."""

    format: TextFormat
    verbosity: str


class ReasoningReply(msgspec.Struct, frozen=True):
    """The `reasoning` of a request, spelled out."""

    effort: str | None
    summary: str | None


class ResponseReply(msgspec.Struct, frozen=True, kw_only=True):
    """A response. What the request said comes back in it, spelled out."""

    id: str
    object: Literal["response"] = "response"
    created_at: int  #: seconds since 1970
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    completed_at: int | None = None
    error: FailureDetails | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningReply
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextReply
    tool_choice: str | ResponseToolChoice
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class DeletedReply(msgspec.Struct, frozen=True):
    """Reply of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(msgspec.Struct, frozen=True):
    """Reply of /v1/responses/{id}/input_items: a page of them."""

    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


# ------------------------------------------------------------------------------------------------- events of a stream


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    sequence_number: int


class ResponseCreated(_Event, frozen=True, kw_only=True, tag="response.created"):
    """The first one."""

    response: ResponseReply


class ResponseInProgress(_Event, frozen=True, kw_only=True, tag="response.in_progress"):
    """The model has begun."""

    response: ResponseReply


class ResponseCompleted(_Event, frozen=True, kw_only=True, tag="response.completed"):
    """The last one: the whole response."""

    response: ResponseReply


class ResponseIncomplete(_Event, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last one of a response that was cut off."""

    response: ResponseReply


class ResponseFailed(_Event, frozen=True, kw_only=True, tag="response.failed"):
    """The last one of a response that failed."""

    response: ResponseReply


class ItemAdded(_Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    output_index: int
    item: OutputItem


class ItemDone(_Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""

    output_index: int
    item: OutputItem


class PartAdded(_Event, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A message's or a thought's text begins."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class PartDone(_Event, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A message's or a thought's text is whole."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class TextDelta(_Event, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """A piece of a message's text."""

    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[ChatTokenLogprob]


class TextDone(_Event, frozen=True, kw_only=True, tag="response.output_text.done"):
    """All of a message's text."""

    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[ChatTokenLogprob]


class ReasoningDelta(_Event, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """A piece of a thought."""

    item_id: str
    output_index: int
    content_index: int = 0
    delta: str


class ReasoningDone(_Event, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """All of a thought."""

    item_id: str
    output_index: int
    content_index: int = 0
    text: str


class ArgumentsDelta(_Event, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """A piece of a call's arguments."""

    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(_Event, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """All of a call's arguments."""

    item_id: str
    output_index: int
    name: str
    arguments: str


Event: TypeAlias = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)
