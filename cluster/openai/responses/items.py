"""The items of a conversation as chat messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec

from cluster.openai.errors import bad_field
from cluster.openai.protocol import CalledFunction, ChatMessage, ContentPart, PastToolCall
from cluster.openai.responses.protocol import InputItem, InputPart
from messages.errors import RequestError

T = TypeVar("T")

_ROLES: Final = ("user", "assistant", "system", "developer")
_TEXT_PARTS: Final = ("input_text", "output_text", "text")
_KINDS: Final = "message, function_call, function_call_output, reasoning or item_reference"


def is_reference(item: InputItem) -> bool:
    """Tell whether an item is only the id of one that was given before."""
    return item.type == "item_reference" or (item.type is None and item.role is None and item.id is not None)


def chat_messages(items: Iterable[tuple[str, InputItem]]) -> tuple[list[ChatMessage], list[str]]:
    """Turn items, each with its place in the request, into messages, with the place that each of them begins at.

    What a model said, called and thought between two words of others is one message. References are looked up before.

    Raises:
        RequestError: an item lacks what its type wants, or is of a type that is not served; names its place.
    """
    conversation = _Conversation()
    for place, item in items:
        conversation.add(place, item)
    conversation.end_turn()
    return conversation.messages, conversation.places


class _Conversation:
    """Messages as they grow; the assistant's turn that items are still added to is the last one."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self.places: list[str] = []
        self._turn: ChatMessage | None = None
        self._call_ids: set[str] = set()

    def add(self, place: str, item: InputItem) -> None:
        match item.type or "message":
            case "message":
                self._message(place, item)
            case "function_call":
                self._call(place, item)
            case "function_call_output":
                self._output(place, item)
            case "reasoning":
                self._thought(place, item)
            case other:
                raise bad_field(f"{place}.type", other, f"{_KINDS}: other items are not served")

    def end_turn(self) -> None:
        """Begin a message of its own with what the assistant says next."""
        turn, self._turn = self._turn, None
        if turn is not None and turn.content is None and not turn.tool_calls:
            self.messages.pop()  # a thought that led to nothing
            self.places.pop()

    def _message(self, place: str, item: InputItem) -> None:
        role = _wanted(f"{place}.role", item.role, ", ".join(_ROLES))
        if role not in _ROLES:
            raise bad_field(f"{place}.role", role, ", ".join(_ROLES))
        content = _content(f"{place}.content", item.content)
        if role != "assistant":
            self.end_turn()
            self._append(place, ChatMessage(role=role, content=content))
            return
        turn = self._turn
        if turn is not None and turn.content is not None and not turn.tool_calls:
            self.end_turn()
            turn = None
        said = turn.content if turn is not None else None
        self._grow(place, content=content if said is None else _parts(said) + _parts(content))

    def _call(self, place: str, item: InputItem) -> None:
        call_id = _wanted(f"{place}.call_id", item.call_id, "the call's id")
        name = _wanted(f"{place}.name", item.name, "a function's name")
        arguments = _wanted(f"{place}.arguments", item.arguments, "JSON text")
        self._call_ids.add(call_id)
        call = PastToolCall(function=CalledFunction(name, arguments), id=call_id)
        calls = self._turn.tool_calls if self._turn is not None else None
        self._grow(place, tool_calls=[*(calls or ()), call])

    def _output(self, place: str, item: InputItem) -> None:
        call_id = _wanted(f"{place}.call_id", item.call_id, "the call's id")
        if call_id not in self._call_ids:
            raise bad_field(f"{place}.call_id", call_id, "the id of a function_call before it")
        content = _content(f"{place}.output", item.output)
        self.end_turn()
        self._append(place, ChatMessage(role="tool", tool_call_id=call_id, content=content))

    def _thought(self, place: str, item: InputItem) -> None:
        """Take a thought; one that is told only encrypted, or not at all, is none."""
        texts: list[str] = []
        if item.content:
            texts = _texts(f"{place}.content", item.content, ("reasoning_text",))
        elif item.summary:
            texts = _texts(f"{place}.summary", item.summary, ("summary_text",))
        if texts:
            before = self._turn.reasoning_content if self._turn is not None else None
            self._grow(place, reasoning_content="\n".join([*([before] if before else ()), *texts]))

    def _append(self, place: str, message: ChatMessage) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _grow(self, place: str, **changes: object) -> None:
        """Add to the assistant's turn, or begin one."""
        if self._turn is None:
            self._turn = ChatMessage(role="assistant")
            self._append(place, self._turn)
        self._turn = self.messages[-1] = msgspec.structs.replace(self._turn, **changes)


def _wanted(param: str, value: T | None, wanted: str) -> T:
    if value is None:
        raise RequestError(f"{param}: missing, want {wanted}", param=param, code="missing_required_field")
    return value


def _parts(content: str | list[str | ContentPart]) -> list[str | ContentPart]:
    return [ContentPart("text", content)] if isinstance(content, str) else content


def _content(param: str, content: str | list[InputPart] | None) -> str | list[str | ContentPart]:
    """Return text as text, several parts as parts: how a template puts them together is its own affair."""
    texts = _texts(param, content)
    return "".join(texts) if len(texts) < 2 else [ContentPart("text", text) for text in texts]


def _texts(param: str, content: str | list[InputPart] | None, kinds: tuple[str, ...] = _TEXT_PARTS) -> list[str]:
    if isinstance(content, str):
        return [content]
    texts: list[str] = []
    for index, part in enumerate(_wanted(param, content, "text")):
        place = f"{param}[{index}]"
        if part.type == "refusal" and kinds is _TEXT_PARTS:
            texts.append(_wanted(f"{place}.refusal", part.refusal, "text"))
        elif part.type in kinds:
            texts.append(_wanted(f"{place}.text", part.text, "text"))
        else:
            wanted = " or ".join(kinds)
            raise bad_field(f"{place}.type", part.type, f"{wanted}: this model reads no images, audio or files")
    return texts
