"""What clients send to /v1/responses: OpenAI's fields, and those of vLLM's extra ones that chat completions have.

Bounds and names as in `cluster.openai.protocol`; `None` always means the same as leaving the field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cluster.openai.protocol import (
    AnyInt,
    Bias,
    Count,
    KvrayFields,
    Penalty,
    Positive,
    Priority,
    Probability,
    ReasoningEffort,
    RepetitionPenalty,
    RequestId,
    Salt,
    SessionId,
    Temperature,
    TokenId,
    TopK,
)

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class InputPart(msgspec.Struct, frozen=True, omit_defaults=True):
    """A part of an item's content, of a call's output or of a thought; only text is served."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None  #: of what a model said before; kept, and not shown to it
    logprobs: list[Any] | None = None  #: as those


class InputItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An item of a conversation: a message, a function's call or its output, a thought, or the id of such an item.

    Which of the fields it has to have depends on its `type`; one without a type is a message.
    """

    type: str | None = None
    id: str | None = None
    status: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    encrypted_content: str | None = None


class ResponseTool(msgspec.Struct, frozen=True):
    """A tool; functions only."""

    type: str
    name: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(msgspec.Struct, frozen=True, omit_defaults=True):
    """One of the tools that a choice allows."""

    type: str
    name: str | None = None


class ResponseToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """`tool_choice` that names one function, or, with a `mode`, those of the tools that may be called."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[ChosenTool] | None = None


class TextFormat(msgspec.Struct, frozen=True, omit_defaults=True, rename={"schema_": "schema"}):
    """`text.format`: text, json_object or json_schema."""

    type: str
    name: str | None = None
    schema_: Any = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    """`text`. `verbosity` changes nothing here."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    """`reasoning`. `effort` is the chat request's `reasoning_effort`; the others change nothing here."""

    effort: ReasoningEffort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`. Nothing is obfuscated here."""

    include_obfuscation: bool | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Count | None = None
    include: list[Include] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None
    metadata: Metadata | None = None
    #: refused, each by its name
    background: bool | None = None
    prompt: Any = None
    conversation: Any = None
    context_management: Any = None
    moderation: Any = None
    #: vLLM's and our own extra fields
    top_k: TopK | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: AnyInt | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None
    session_id: SessionId | None = None
    cache_salt: Salt | None = None
    kvray: KvrayFields | None = None
    #: carried by clients by habit; they change nothing here
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    max_tool_calls: Positive | None = None
