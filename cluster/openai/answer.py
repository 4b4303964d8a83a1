"""One generation request, ready to be answered whole or as a stream: what chat and text completions do alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from cluster.openai.generation import Generation
from cluster.openai.protocol import SharedFields, StreamOptions
from cluster.openai.replies import KvrayExtras, Usage
from cluster.openai.stream import DONE, EventStream, event, reply_while_connected
from cluster.openai.surface import Surface
from cluster.openai.transcript import Delta

_encode = msgspec.json.Encoder().encode
_MARK: Final = "\0"  #: stands for an event's text where it is cut out


class Answer(ABC):
    """One request's answer, whole or as a stream. It begins when `respond` is awaited; one answer each.

    What a choice got comes to `_event` where the answer is a stream, to `_add` where it is whole. Events that differ by
    their text alone, which are nearly all of them, are cut out of one that `_event` wrote.
    """

    def __init__(
        self, surface: Surface, fields: SharedFields, reply_id: str, generation: Generation, *, is_text_only: bool
    ) -> None:
        """Make it ready. `is_text_only`: an event says of its tokens only their text, and that as it comes."""
        self._surface = surface
        self._id = reply_id
        self._created = int(time.time())
        self._generation = generation
        self._is_begun = [False] * len(generation.requests)  #: by choice: its first piece was given
        self._is_streamed = bool(fields.stream)
        self._has_extras = bool(fields.return_prompt_sources)
        options = fields.stream_options or StreamOptions()
        self._has_usage = bool(options.include_usage)
        self._shows_usage = bool(options.continuous_usage_stats)  #: in every event
        self._is_text_only = is_text_only and not self._shows_usage
        #: by choice: what stands around the text of each event but the first one and the last
        self._frames: list[list[bytes] | None] = [None] * len(generation.requests)
        #: what stands around, and between, the text of a thought, which an event says twice
        self._thought_frames: list[list[bytes] | None] = [None] * len(generation.requests)

    async def respond(self, request: Request) -> Response:
        """Return the HTTP response, a stream where the client asked for one.

        Raises:
            ClientDisconnect: the client left before a whole reply was ready.
            KvrayError: a sequence of a whole reply was refused or failed.
        """
        if self._is_streamed:
            return EventStream(self._generation, self._surface.turn, self._event_of, self._last_events)
        return await reply_while_connected(request, self._whole())

    async def _whole(self) -> bytes:
        await self._generation.run(self._add)
        return self._reply()

    def _event_of(self, index: int, delta: Delta) -> bytes:
        """Write what a choice got as a server-sent event; nothing where a client could not see it yet."""
        is_thought = delta.reasoning != ""
        if delta.finish_reason is not None or (is_thought and delta.text):
            return self._event(index, delta)
        frames = self._thought_frames if is_thought else self._frames
        frame = frames[index]
        if frame is not None:
            text = delta.reasoning or delta.text
            return _encode(text).join(frame) if text else b""
        data = self._event(index, delta)
        if self._is_text_only and self._is_begun[index]:
            marked = Delta(reasoning=_MARK) if is_thought else Delta(text=_MARK)
            frames[index] = self._event(index, marked).split(_encode(_MARK))
        return data

    def _last_events(self) -> bytes:
        """Write what ends a stream: usage and extras where they were asked for."""
        if not self._has_usage and not self._has_extras:
            return DONE
        return event(self._envelope(self._usage() if self._has_usage else UNSET, self._extras())) + DONE

    def _extras(self) -> KvrayExtras | UnsetType:
        return self._generation.extras() if self._has_extras else UNSET

    def _usage(self) -> Usage:
        return self._generation.usage()

    def _usage_of_event(self) -> Usage | UnsetType | None:
        """Return the usage that an event with a choice carries."""
        if self._shows_usage:
            return self._usage()
        return None if self._has_usage else UNSET

    @abstractmethod
    def _add(self, index: int, delta: Delta) -> None:
        """Keep what a choice of a whole reply got."""

    @abstractmethod
    def _reply(self) -> bytes:
        """Write the whole reply as JSON, once all of it is there."""

    @abstractmethod
    def _event(self, index: int, delta: Delta) -> bytes:
        """Write what a choice got as an event; nothing where a client could not see it yet."""

    @abstractmethod
    def _envelope(self, usage: Usage | UnsetType | None, kvray: KvrayExtras | UnsetType) -> msgspec.Struct:
        """Make an event of a stream that has no choice."""
