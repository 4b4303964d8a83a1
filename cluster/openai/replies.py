"""What goes back to clients: OpenAI's objects, with the extra fields that vLLM's clients know.

Optional extras are UNSET, which leaves them out of the JSON; None is a null that OpenAI's own replies have.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

ChatFinish = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: int  #: nobody had to compute them


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Of the output's tokens, where thoughts are told from content."""

    reasoning_tokens: int  #: of thoughts


class Usage(msgspec.Struct, frozen=True):
    """Tokens read and written. With n choices the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class PromptSourceCounts(msgspec.Struct, frozen=True):
    """Prompt tokens by where their KV came from; they add up to usage.prompt_tokens."""

    device: int  #: already in the decode worker's pool
    host: int  #: in the memory of a node's cache
    peer: int  #: in another worker's pool, and pulled
    disk: int  #: on a node's disk
    remote: int  #: in the store that all nodes reach
    computed: int  #: computed for this request


class PlannedLoad(msgspec.Struct, frozen=True):
    """Prompt tokens [begin, end) that were to be loaded."""

    begin: int
    end: int
    tier: str  #: where their owner had them: device, host, disk, remote
    owner: str  #: channel endpoint of the worker or node cache


class PromptPlanReply(msgspec.Struct, frozen=True):
    """How the decode worker meant to get a prompt's KV, and what it took. In seconds; predicted as of then."""

    ttft_s: float  #: from the request to its first token, as this ingress saw it
    predicted_ttft_s: float  #: by the router; 0 where there was none
    moved_bytes: int  #: that came from other owners until the first token
    predicted_load_s: float  #: of loading what others hold
    predicted_compute_s: float  #: of computing that instead
    is_mixed: bool  #: the head of it was to be computed meanwhile
    handed_over_by: str  #: the prefill worker that was asked for the rest, or ""
    loads: list[PlannedLoad]


class KvrayExtras(msgspec.Struct, frozen=True):
    """Under `kvray`, where the request has `return_prompt_sources`."""

    prompt_sources: PromptSourceCounts
    plans: list[PromptPlanReply] | UnsetType = UNSET  #: one for each prompt, where its worker told


class PromptLogprob(msgspec.Struct, frozen=True):
    """A candidate for a prompt token, in vLLM's shape."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]

# ----------------------------------------------------------------------------------------------- text completions


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Four lists of one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  #: characters into the choice's text


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, or a piece of one in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: ChatFinish | None = None
    stop_reason: int | str | None = None  #: the stop string or the client's stop token that ended it
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionReply(msgspec.Struct, frozen=True, kw_only=True):
    """Reply and stream chunk of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    kvray: KvrayExtras | UnsetType = UNSET


# ----------------------------------------------------------------------------------------------- chat completions


class ChatTopLogprob(msgspec.Struct, frozen=True):
    """A likely alternative."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """A token that was generated."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """A function's name and arguments; in a stream, arguments come in pieces and the name with the first."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call; in a stream, `index` says which one a piece belongs to."""

    function: FunctionCall
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatReplyMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's turn. A thought goes by both names that vLLM's clients read, the newer one first."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A whole choice."""

    index: int
    message: ChatReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """Reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    kvray: KvrayExtras | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a message, as ChatReplyMessage has it."""

    role: Literal["assistant"] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish | None = None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Stream chunk of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    kvray: KvrayExtras | UnsetType = UNSET


# ----------------------------------------------------------------------------------------------- others


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvray"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Reply of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeReply(msgspec.Struct, frozen=True, kw_only=True):
    """Reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(msgspec.Struct, frozen=True):
    """Reply of /detokenize."""

    prompt: str


class VersionReply(msgspec.Struct, frozen=True):
    """Reply of /version."""

    version: str
