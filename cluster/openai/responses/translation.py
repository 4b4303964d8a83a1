"""A request to /v1/responses as a chat request, and what is wrong with that one in the names of the first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from cluster.openai.backend import HttpLimits
from cluster.openai.errors import bad_field
from cluster.openai.protocol import (
    AllowedTool,
    AllowedTools,
    ChatMessage,
    ChatRequest,
    FunctionSpec,
    JsonSchemaFormat,
    NamedFunction,
    ResponseFormat,
    Tool,
    ToolChoice,
)
from cluster.openai.responses.items import chat_messages
from cluster.openai.responses.protocol import (
    InputItem,
    ResponsesRequest,
    ResponseTool,
    ResponseToolChoice,
    TextFormat,
)
from messages.errors import RequestError

#: fields that mean the same in both requests
_SAME: Final = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "chat_template_kwargs",
    "parallel_tool_calls",
    "priority",
    "request_id",
    "session_id",
    "cache_salt",
    "kvray",
    "user",
)
_REFUSED: Final = {
    "prompt": "no value: prompts are not kept here, only responses",
    "conversation": "no value: conversations are not kept here, only responses (previous_response_id)",
    "context_management": "no value: conversations are not compacted here",
    "moderation": "no value: nothing is moderated here",
}
_HOSTED: Final = "function: tools that the server runs itself, and custom ones, are not served"
#: how the chat request's fields are called here
_NAMES: Final = (
    (re.compile(r"max_completion_tokens$"), "max_output_tokens"),
    (re.compile(r"response_format\.json_schema\b"), "text.format"),
    (re.compile(r"response_format\b"), "text.format"),
    (re.compile(r"(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"tool_choice\.allowed_tools\b"), "tool_choice"),
    (re.compile(r"tool_choice\.function\b"), "tool_choice"),
)


def check_served(fields: ResponsesRequest, limits: HttpLimits) -> None:
    """Refuse by name what is not built.

    Raises:
        RequestError: a field asks for it.
    """
    if fields.background:
        raise bad_field("background", True, "false: a response is made while its client waits")
    for name, wanted in _REFUSED.items():
        value = getattr(fields, name)
        if value is not None:
            raise bad_field(name, value, wanted)
    if fields.truncation not in (None, "disabled"):
        raise bad_field("truncation", fields.truncation, "disabled: what does not fit is refused, not cut")
    if fields.top_logprobs is not None and fields.top_logprobs > limits.max_logprobs:
        raise bad_field("top_logprobs", fields.top_logprobs, f"0 to {limits.max_logprobs}")


def input_items(fields: ResponsesRequest) -> list[InputItem]:
    """Return the request's own input as items."""
    if isinstance(fields.input, str):
        return [InputItem(type="message", role="user", content=fields.input)]
    return fields.input


def chat_request(
    fields: ResponsesRequest, before: Sequence[InputItem], own: Sequence[InputItem]
) -> tuple[ChatRequest, list[str]]:
    """Make the chat request that asks for the same, and where each of its messages comes from.

    Args:
        fields: the request.
        before: the conversation that `previous_response_id` stands for.
        own: its input, references looked up.

    Raises:
        RequestError: an item, a tool or a choice is none that is served.
    """
    is_text = isinstance(fields.input, str)
    items = [("previous_response_id", item) for item in before]
    items += [("input" if is_text else f"input[{index}]", item) for index, item in enumerate(own)]
    messages, places = chat_messages(items)
    if fields.instructions is not None:
        messages.insert(0, ChatMessage(role="system", content=fields.instructions))
        places.insert(0, "instructions")
    has_logprobs = shows_logprobs(fields)
    text_format = fields.text.format if fields.text is not None else None
    request = ChatRequest(
        messages=messages,
        tools=None if fields.tools is None else [_tool(index, tool) for index, tool in enumerate(fields.tools)],
        tool_choice=_tool_choice(fields.tool_choice),
        max_completion_tokens=fields.max_output_tokens,
        logprobs=has_logprobs,
        top_logprobs=fields.top_logprobs if has_logprobs else None,
        response_format=None if text_format is None else _response_format(text_format),
        reasoning_effort=None if fields.reasoning is None else fields.reasoning.effort,
        **{name: getattr(fields, name) for name in _SAME},
    )
    return request, places


def shows_logprobs(fields: ResponsesRequest) -> bool:
    """Tell whether the text's tokens come with their log-probabilities."""
    return "message.output_text.logprobs" in (fields.include or ())


def in_our_names(error: RequestError, places: Sequence[str]) -> RequestError:
    """Return what is wrong with a chat request as what is wrong with the request that it was made of.

    `places`: where each of its messages comes from.
    """
    if error.param is None:
        return error
    param = _our_name(error.param, places)
    message = error.message.replace(error.param, param)
    return RequestError(message, param=param, code=error.code, status=error.status, retry_after_s=error.retry_after_s)


def _our_name(param: str, places: Sequence[str]) -> str:
    message = re.match(r"messages(?:\[(\d+)\])?", param)
    if message is not None:
        if message[1] is None:
            return "input" + param[message.end() :]
        place = places[int(message[1])]
        return place + param[message.end() :] if place.startswith("input") else place
    for name, ours in _NAMES:
        param = name.sub(ours, param)
    return re.sub(r"(tool_choice\.tools\[\d+\])\.function\b", r"\1", param)


def _tool(index: int, tool: ResponseTool) -> Tool:
    if tool.type != "function":
        raise bad_field(f"tools[{index}].type", tool.type, _HOSTED)
    if tool.name is None:
        param = f"tools[{index}].name"
        raise RequestError(f"{param}: missing, want a function's name", param=param, code="missing_required_field")
    return Tool(function=FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict))


def _tool_choice(wanted: str | ResponseToolChoice | None) -> str | ToolChoice | None:
    if wanted is None or isinstance(wanted, str):
        return wanted
    if wanted.type == "function":
        return ToolChoice(function=None if wanted.name is None else NamedFunction(wanted.name))
    if wanted.type != "allowed_tools":
        raise bad_field("tool_choice.type", wanted.type, _HOSTED.replace("function", "function or allowed_tools", 1))
    for name in ("mode", "tools"):
        if getattr(wanted, name) is None:
            param = f"tool_choice.{name}"
            raise RequestError(f"{param}: missing, want a mode and tools", param=param, code="missing_required_field")
    allowed = [
        AllowedTool(function=None if tool.name is None else NamedFunction(tool.name), type=tool.type)
        for tool in wanted.tools or ()
    ]
    return ToolChoice(type="allowed_tools", allowed_tools=AllowedTools(wanted.mode or "", allowed))


def _response_format(wanted: TextFormat) -> ResponseFormat:
    if wanted.type != "json_schema":
        return ResponseFormat(wanted.type)
    return ResponseFormat(wanted.type, JsonSchemaFormat(wanted.name, wanted.schema_, wanted.strict))
