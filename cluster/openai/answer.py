"""One generation request, ready to be answered whole or as a stream: what chat and text completions do alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from cluster.openai.generation import Generation
from cluster.openai.protocol import SharedFields
from cluster.openai.replies import KvrayExtras
from cluster.openai.stream import EventStream, reply_while_connected
from cluster.openai.surface import Surface


class Answer(ABC):
    """One request's answer, whole or as a stream. It begins when `respond` is awaited; one answer each."""

    def __init__(self, surface: Surface, fields: SharedFields, reply_id: str, generation: Generation) -> None:
        self._surface = surface
        self._id = reply_id
        self._created = int(time.time())
        self._generation = generation
        self._is_begun = [False] * len(generation.requests)  #: by choice: its first piece was given
        self._is_streamed = bool(fields.stream)
        self._has_extras = bool(fields.return_prompt_sources)

    async def respond(self, request: Request) -> Response:
        """Return the HTTP response, a stream where the client asked for one.

        Raises:
            ClientDisconnect: the client left before a whole reply was ready.
            KvrayError: a sequence of a whole reply was refused or failed.
        """
        if self._is_streamed:
            return EventStream(self.events())
        return await reply_while_connected(request, self.reply())

    @abstractmethod
    async def reply(self) -> bytes:
        """Return the whole answer as JSON, once all of it is there.

        Raises:
            KvrayError: a sequence was refused or failed.
        """

    @abstractmethod
    def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as server-sent events.

        Raises:
            KvrayError: a sequence was refused or failed, perhaps after events were given.
        """

    def _extras(self) -> KvrayExtras | UnsetType:
        return self._generation.extras() if self._has_extras else UNSET
