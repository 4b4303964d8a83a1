"""A response's output, as it grows: thoughts, text and calls become items, and the events that tell of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from cluster.openai.replies import ChatTokenLogprob
from cluster.openai.responses.kept import item_id
from cluster.openai.responses.replies import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    FunctionCallItem,
    ItemAdded,
    ItemDone,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    TextDelta,
    TextDone,
)


@dataclass(slots=True)
class _OpenMessage:
    """The message that text is added to."""

    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[ChatTokenLogprob] = field(default_factory=list)

    def part(self) -> OutputText:
        return OutputText(text="".join(self.texts), logprobs=self.logprobs)

    def item(self, status: ItemStatus) -> OutputMessage:
        return OutputMessage(id=self.id, status=status, content=[self.part()])


@dataclass(slots=True)
class _OpenThought:
    """The thought that text is added to."""

    id: str
    texts: list[str] = field(default_factory=list)

    def part(self) -> ReasoningText:
        return ReasoningText(text="".join(self.texts))

    def item(self, status: ItemStatus) -> ReasoningItem:
        return ReasoningItem(id=self.id, status=status, content=[self.part()])


@dataclass(slots=True)
class _OpenCall:
    """The call that arguments are added to."""

    id: str
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def item(self, status: ItemStatus) -> FunctionCallItem:
        arguments = "".join(self.arguments)
        if status == "incomplete" and _is_json(arguments):
            status = "completed"  # the output was cut off right behind it
        return FunctionCallItem(id=self.id, status=status, call_id=self.call_id, name=self.name, arguments=arguments)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class ResponseOutput:
    """The items of one response, in the order in which the model gave them; at most the last one is open."""

    def __init__(self, key: str, num_given: int, emit: Callable[[Event], None]) -> None:
        """Begin an output without items.

        Args:
            key: of the response, from which the ids of items follow.
            num_given: items that the response was given, which come first.
            emit: is told each event as it happens.
        """
        self.items: list[OutputItem] = []
        self.numbers = count()  #: of the response's events
        self._key = key
        self._num_given = num_given
        self._emit = emit
        self._open: _OpenMessage | _OpenThought | _OpenCall | None = None

    @property
    def is_in_message(self) -> bool:
        """Whether the item that is open is a message."""
        return isinstance(self._open, _OpenMessage)

    @property
    def is_empty(self) -> bool:
        """Whether there is no item yet, not even an open one."""
        return self._open is None and not self.items

    def add_text(self, text: str, logprobs: list[ChatTokenLogprob]) -> None:
        """Add a piece of text, with the log-probabilities of its tokens where they are wanted."""
        message = self._open if isinstance(self._open, _OpenMessage) else self._begin_message()
        message.texts.append(text)
        message.logprobs += logprobs
        if text:
            self._emit(
                TextDelta(
                    sequence_number=next(self.numbers),
                    item_id=message.id,
                    output_index=len(self.items),
                    delta=text,
                    logprobs=logprobs,
                )
            )

    def add_thought(self, text: str) -> None:
        """Add a piece of what the model thinks."""
        thought = self._open
        if not isinstance(thought, _OpenThought):
            self.close()
            thought = self._open = _OpenThought(self._item_id("rs"))
            self._emit_item(ItemAdded, ReasoningItem(id=thought.id, status="in_progress", content=[]))
            self._emit_part(PartAdded, thought.id, ReasoningText(text=""))
        thought.texts.append(text)
        self._emit(
            ReasoningDelta(
                sequence_number=next(self.numbers), item_id=thought.id, output_index=len(self.items), delta=text
            )
        )

    def begin_call(self, call_id: str, name: str) -> None:
        """Begin a call, to which arguments will be added."""
        self.close()
        call = self._open = _OpenCall(self._item_id("fc"), call_id, name)
        self._emit_item(ItemAdded, call.item("in_progress"))

    def add_arguments(self, arguments: str) -> None:
        """Add a piece of arguments to the call that is open."""
        call = self._open
        assert isinstance(call, _OpenCall)
        call.arguments.append(arguments)
        if arguments:
            self._emit(
                ArgumentsDelta(
                    sequence_number=next(self.numbers),
                    item_id=call.id,
                    output_index=len(self.items),
                    delta=arguments,
                )
            )

    def close(self, status: ItemStatus = "completed") -> None:
        """End the item that is open, if one is."""
        opened, self._open = self._open, None
        if opened is None:
            return
        index, item = len(self.items), opened.item(status)
        if isinstance(opened, _OpenMessage):
            part = opened.part()
            self._emit(
                TextDone(
                    sequence_number=next(self.numbers),
                    item_id=opened.id,
                    output_index=index,
                    text=part.text,
                    logprobs=part.logprobs,
                )
            )
            self._emit_part(PartDone, opened.id, part)
        elif isinstance(opened, _OpenThought):
            thought = opened.part()
            self._emit(
                ReasoningDone(
                    sequence_number=next(self.numbers), item_id=opened.id, output_index=index, text=thought.text
                )
            )
            self._emit_part(PartDone, opened.id, thought)
        else:
            self._emit(
                ArgumentsDone(
                    sequence_number=next(self.numbers),
                    item_id=opened.id,
                    output_index=index,
                    name=opened.name,
                    arguments="".join(opened.arguments),
                )
            )
        self._emit_item(ItemDone, item)
        self.items.append(item)

    def _begin_message(self) -> _OpenMessage:
        self.close()
        message = self._open = _OpenMessage(self._item_id("msg"))
        self._emit_item(ItemAdded, OutputMessage(id=message.id, status="in_progress", content=[]))
        self._emit_part(PartAdded, message.id, OutputText(text=""))
        return message

    def _emit_item(self, kind: type[ItemAdded | ItemDone], item: OutputItem) -> None:
        self._emit(kind(sequence_number=next(self.numbers), output_index=len(self.items), item=item))

    def _emit_part(self, kind: type[PartAdded | PartDone], item_id: str, part: OutputText | ReasoningText) -> None:
        number = next(self.numbers)
        self._emit(kind(sequence_number=number, item_id=item_id, output_index=len(self.items), part=part))

    def _item_id(self, prefix: str) -> str:
        return item_id(prefix, self._key, self._num_given + len(self.items))
