"""What clients send, field by field: OpenAI's API and vLLM's extra fields.

Bounds that do not depend on the model are in the types, so that they are checked while decoding and show in /docs.
`None` always means the same as leaving the field out. Field names are the API's own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from messages.request import MIN_REPETITION_PENALTY

_I64 = 2**63 - 1

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Count = Annotated[int, Meta(ge=0, le=_I64)]
Positive = Annotated[int, Meta(ge=1, le=_I64)]
AnyInt = Annotated[int, Meta(ge=-_I64 - 1, le=_I64)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
RepetitionPenalty = Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=100.0)]
TopK = Annotated[int, Meta(ge=-1, le=_I64, description="0 or -1: all")]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="smaller is sooner")]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
Salt = Annotated[str, Meta(min_length=1, max_length=256)]
SessionId = Annotated[str, Meta(max_length=256)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]

TokenRange = tuple[Count, Count | None]
HintTokens = Annotated[
    TokenRange, Meta(description="[begin, end) of prompt and answer; end null: to the end. Default: all of them")
]

ReasoningEffort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    Meta(description="a variable of the chat template; enable_thinking too, false with none"),
]
ClientTemplate = Annotated[
    str, Meta(description="a chat template instead of the model's, where the operator takes them from clients")
]
ReturnTokenIds = Annotated[bool, Meta(description="token_ids per choice, and prompt_token_ids")]
ReturnPromptSources = Annotated[
    bool,
    Meta(
        description="kvray.prompt_sources: prompt tokens by where their KV came from; kvray.plans: how it was to be "
        "had, with predicted and actual times; last chunk of a stream"
    ),
]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides tokens."""

    include_usage: bool | None = None  #: a last chunk without choices, with the usage
    continuous_usage_stats: bool | None = None  #: the usage so far on every chunk


class JsonSchemaFormat(msgspec.Struct, frozen=True, rename={"schema_": "schema"}):
    """`response_format.json_schema`."""

    name: str | None = None
    schema_: Any = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`response_format`: text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, rename={"json_": "json"}, forbid_unknown_fields=True):
    """`structured_outputs`, as vLLM names it: at most one structure, and how its JSON is laid out."""

    json_: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  #: in Lark's language or EBNF
    json_object: bool | None = None
    structural_tag: Any = None  #: refused
    whitespace_pattern: str | None = None  #: a regular expression of what may stand between JSON's tokens
    disable_any_whitespace: bool | None = None  #: true: nothing may
    disable_additional_properties: bool | None = None  #: refused: a schema says so itself


class PinHint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kvray.cache.pin`: these tokens' blocks are not evicted from host memory for so long."""

    tokens: HintTokens | None = None
    ttl_s: Annotated[float, Meta(gt=0.0, le=86400.0)] = 300.0


class RetainHint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kvray.cache.retain`: they are worth more than they seem; each step of `priority` doubles it."""

    tokens: HintTokens | None = None
    priority: Annotated[int, Meta(ge=1, le=2)] = 1


class DemoteHint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kvray.cache.demote`: they are worth less; each step of `priority` halves it."""

    tokens: HintTokens | None = None
    priority: Annotated[int, Meta(ge=-2, le=-1)] = -2


class CacheHints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kvray.cache`, where the operator allows it."""

    pin: PinHint | None = None
    retain: RetainHint | None = None
    demote: DemoteHint | None = None


class KvrayFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kvray`: what no other server knows."""

    cache: CacheHints | None = None


class SharedFields(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and text completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: AnyInt | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Count | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=_I64, description="-1: to what the model holds")] | None = (
        None
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None
    session_id: SessionId | None = None
    cache_salt: Salt | None = None
    kvray: KvrayFields | None = None
    return_token_ids: ReturnTokenIds | None = None
    return_tokens_as_token_ids: Annotated[bool, Meta(description="tokens of logprobs as token_id:123")] | None = None
    return_prompt_sources: ReturnPromptSources | None = None
    user: str | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message: text, or what clients put beside it into an assistant's; no media."""

    type: str
    text: str | None = None  #: of text, input_text and output_text
    refusal: str | None = None
    thinking: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """A call that the assistant made earlier in the conversation. `arguments` is JSON text."""

    name: str
    arguments: str | dict[str, Any] | None = None


class PastToolCall(msgspec.Struct, frozen=True):
    """An entry of an assistant message's `tool_calls`."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None  #: an assistant's, in place of content
    tool_calls: list[PastToolCall] | None = None
    function_call: CalledFunction | None = None  #: the older name of a single one
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  #: the newer name of the same
    prefix: bool | None = None  #: others' ways to say continue_final_message: refused
    partial: bool | None = None


class FunctionSpec(msgspec.Struct, frozen=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool; functions only."""

    function: FunctionSpec | None = None
    type: str = "function"


class NamedFunction(msgspec.Struct, frozen=True):
    """The name inside a named tool choice."""

    name: str


class AllowedTool(msgspec.Struct, frozen=True):
    """One of the tools that a choice allows."""

    function: NamedFunction | None = None
    type: str = "function"


class AllowedTools(msgspec.Struct, frozen=True):
    """`tool_choice.allowed_tools`: `mode` is auto or required."""

    mode: str
    tools: list[AllowedTool]


class ToolChoice(msgspec.Struct, frozen=True):
    """`tool_choice` that names one function, or those of the tools that may be called."""

    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None
    type: str = "function"


class ChatRequest(SharedFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: ClientTemplate | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tool_choice: str | ToolChoice | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: Annotated[bool, Meta(description="false: thoughts are made, and not shown")] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None  #: text alone
    #: carried by clients by habit; they change nothing here
    service_tier: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None


class CompletionRequest(SharedFields, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt`: a string, a list of strings, a list of token ids, or a list of such lists."""

    prompt: str | list[Any]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Positive | None = None
    logprobs: Count | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: either `prompt`, or `messages` with what belongs to them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: ClientTemplate | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None
