"""Chat messages and tools as chat templates expect them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cluster.openai.cache_protocol import PromptFields
from cluster.openai.errors import bad_field
from cluster.openai.protocol import ChatMessage, ChatRequest, ContentPart, PastToolCall, TokenizeRequest, Tool
from messages.errors import RequestError
from text.tokenizer import Tokenizer

#: kinds of parts, and the field that has the text of each
_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def _template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Turn `messages` into plain dicts, "developer" into "system". Roles are the chat template's to check.

    Raises:
        RequestError: there is no message, no content where there must be some, or content that is not text.
    """
    if not messages:
        raise bad_field("messages", [], "at least one message")
    return [_template_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _template_message(param: str, message: ChatMessage) -> dict[str, Any]:
    if message.content is None and message.role not in ("assistant", "function"):
        raise RequestError(
            f"{param}.content: missing, want text", param=f"{param}.content", code="missing_required_field"
        )
    for name in ("prefix", "partial"):
        if getattr(message, name):
            raise bad_field(f"{param}.{name}", True, "continue_final_message beside messages")
    thoughts, content = _content(f"{param}.content", message.content or message.refusal or message.content)
    result: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    calls = message.tool_calls or [PastToolCall(call) for call in [message.function_call] if call is not None]
    if calls:
        result["tool_calls"] = [_template_call(call) for call in calls]
    for name in ("name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            result[name] = value
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    if reasoning is not None or thoughts:
        result["reasoning_content"] = "\n".join(thoughts) if reasoning is None else reasoning
    return result


def _content(param: str, content: str | list[str | ContentPart] | None) -> tuple[list[str], str | list[dict[str, Any]]]:
    """Return the thoughts and the text of a message's content; several parts of text stay parts."""
    if content is None or isinstance(content, str):
        return [], content or ""
    thoughts: list[str] = []
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        text = part if isinstance(part, str) else _text_of(f"{param}[{index}]", part)
        if isinstance(part, ContentPart) and part.type == "thinking":
            thoughts.append(text)
        else:
            parts.append({"type": "text", "text": text})
    return thoughts, parts


def _text_of(param: str, part: ContentPart) -> str:
    field = _TEXT_FIELDS.get(part.type)
    if field is None:
        raise bad_field(f"{param}.type", part.type, '"text": this model reads no images, audio or files')
    text: str | None = getattr(part, field)
    if text is None:
        raise RequestError(
            f"{param}.{field}: missing, want text", param=f"{param}.{field}", code="missing_required_field"
        )
    return text


def _template_call(call: PastToolCall) -> dict[str, Any]:
    arguments = call.function.arguments or {}
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Turn `tools` into plain dicts; what the client left out stays out.

    Raises:
        RequestError: a tool is no function, or two have one name.
    """
    seen: set[str] = set()
    result: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if tool.type != "function":
            raise bad_field(f"{place}.type", tool.type, '"function": other kinds of tools are not served')
        if tool.function is None:
            param = f"{place}.function"
            raise RequestError(f"{param}: missing, want a function", param=param, code="missing_required_field")
        if tool.function.name in seen:
            raise bad_field(f"tools[{index}].function.name", tool.function.name, "a name that no other tool has")
        seen.add(tool.function.name)
        function = {k: v for k, v in msgspec.structs.asdict(tool.function).items() if v is not None}
        result.append({"type": "function", "function": function})
    return result


def template_kwargs(fields: ChatRequest | TokenizeRequest | PromptFields) -> dict[str, Any]:
    """Return the variables that a client gives to the chat template: its own, and what its effort comes to."""
    own = fields.chat_template_kwargs or {}
    effort = fields.reasoning_effort if isinstance(fields, ChatRequest) else None
    if effort is None:
        return own
    return {"enable_thinking": effort != "none", **own, "reasoning_effort": effort}


def rendered(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    fields: ChatRequest | TokenizeRequest | PromptFields,
    tools: list[dict[str, Any]] | None,
    *,
    takes_template: bool = False,
) -> str:
    """Render `messages` by the chat template, the assistant's turn begun unless `fields` say otherwise.

    `takes_template`: a client may bring its own.

    Raises:
        RequestError: the template or the model cannot take a message; or a client brings a template that may not.
    """
    if fields.chat_template is not None and not takes_template:
        raise RequestError(
            "chat_template: got one, want none: this server renders by the model's own (http.client_chat_template)",
            param="chat_template",
            code="not_allowed",
        )
    continues = bool(fields.continue_final_message)
    return tokenizer.render_chat(
        _template_messages(messages),
        tools=tools,
        add_generation_prompt=not continues if fields.add_generation_prompt is None else fields.add_generation_prompt,
        continue_final_message=continues,
        template_kwargs=template_kwargs(fields),
        chat_template=fields.chat_template,
    )
