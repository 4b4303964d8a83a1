"""Answers that stop working when the client leaves: server-sent events, and whole replies.

A stream's head leaves once a worker has accepted the request, or with its first event; an error before that is a reply
with its own status. Where a while passes without an event, a comment keeps the connection from looking dead to proxies.

A stream costs no task's turn and no call of ASGI per token. What a turn of the event loop brings to it is one write, to
the client's connection itself where the server lends it (`DIRECT`), else by ASGI. What the client is too slow for waits
here as it will be sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.openai.errors import error_json, send_error
from cluster.openai.generation import Generation
from cluster.openai.transcript import Delta
from messages.errors import KvrayError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_encoder = msgspec.json.Encoder()

_MAX_EVENTS: Final = 64  #: in one write: what waits for a slow client fills no other buffer, and holds nobody up
DIRECT: Final = "kvray.direct"  #: the extension of an ASGI scope that is a DirectWriter
DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": the answer goes on\n\n"  #: an event that clients do not see
#: Without an event for so long, a comment is sent: proxies give up after 30 to 100 s, some of those in offices after 5.
_COMMENT_AFTER_S: Final = 4.0
#: What some clients take for the end of a line in an event, as Python's str.splitlines does; only text has them.
_LINE_ENDS: Final = {b"\xc2\x85": b"\\u0085", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]


def event(value: msgspec.Struct) -> bytes:
    """Write `value` as one server-sent event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def in_one_line(events: bytes) -> bytes:
    """Return `events` with JSON's escapes for characters that some clients would split a line at."""
    for raw, escape in _LINE_ENDS.items():
        events = events.replace(raw, escape)
    return events


async def until_gone(receive: Receive) -> None:
    """Wait until the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return the result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: the client left; `work` has been cancelled and has ended.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        has_left = not working.done()
    finally:
        watching.cancel()
        working.cancel()
        outcome, _ = await asyncio.gather(working, watching, return_exceptions=True)
    if has_left:
        if isinstance(outcome, Exception):
            logger.error("stopping the work of a client that left failed", exc_info=outcome)
        raise ClientDisconnect
    return working.result()


async def reply_while_connected(request: Request, work: Coroutine[Any, Any, bytes]) -> Response:
    """Make a JSON reply of what `work` gives.

    Raises:
        ClientDisconnect: the client left before it was ready.
    """
    return Response(await first_of(work, request.receive), media_type="application/json")


class DirectWriter(Protocol):
    """The connection of a request whose answer has begun, lent by a server to whoever answers, besides ASGI."""

    @property
    def is_paused(self) -> bool:
        """Whether the client has to read first; what is written all the same is kept in memory."""
        ...

    def write(self, data: bytes) -> None:
        """Write a part of the answer's body; never blocks, never fails: a client that left reads nothing."""
        ...

    def on_resume(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever it is not paused any more, until the answer ends."""
        ...


class Turn:
    """The streams that got something in this turn of the event loop: each writes it at the turn's end."""

    def __init__(self) -> None:
        self._streams: list[EventStream] = []

    def add(self, stream: EventStream) -> None:
        """Have `stream` write what it has, once all that comes in this turn is there."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._end)
        self._streams.append(stream)

    def _end(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.send_held()


class EventStream(Response):
    """Sends events as they come. An error before the head has left is a reply with its own status; later, an event."""

    def __init__(
        self,
        generation: Generation,
        turn: Turn,
        event_of: Callable[[int, Delta], bytes],
        last_events: Callable[[], bytes],
        error_event: Callable[[KvrayError], bytes] = lambda error: b"data: " + error_json(error) + b"\n\n",
        first_events: Callable[[], bytes] = lambda: b"",
    ) -> None:
        """Make it ready; nothing runs yet.

        Args:
            generation: what is answered.
            turn: of the loop that this runs on.
            event_of: writes what a choice got as an event, or as nothing.
            last_events: writes what follows when all choices have ended.
            error_event: writes what follows where one failed after the head has left.
            first_events: writes what comes with the head, if that leaves before the first of the others.
        """
        self._generation = generation
        self._turn = turn
        self._event_of = event_of
        self._last_events = last_events
        self._error_event = error_event
        self._first_events = first_events
        self._held: list[bytes] = []  #: not sent yet
        self._writer: DirectWriter | None = None
        self._has_more = asyncio.Event()  #: the coroutine has something to do
        self._has_ended = False
        self._error: KvrayError | None = None
        self._comment_timer: asyncio.TimerHandle | None = None
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as ASGI. When the client leaves, work for them stops and nothing more is sent."""
        try:
            await first_of(self._send_all(scope, send), receive)
        except ClientDisconnect:
            logger.debug("the client left its stream")

    def send_held(self) -> None:
        """Write what is there to the connection that was lent, unless the client has to read first."""
        if self._writer is None or self._has_ended:
            return  # the coroutine below sends it
        while self._held and not self._writer.is_paused:
            self._writer.write(self._taken())

    async def _send_all(self, scope: Scope, send: Send) -> None:
        try:
            self._generation.start(self._take, self._end, self._begin)
            await self._has_more.wait()
            self._has_more.clear()
            if self._error is not None and not self._held:
                await send_error(self._error, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._send_held_by_asgi(send)
            self._lend(scope.get("extensions", {}).get(DIRECT))
            self._comment_later()
            while not self._has_ended:
                await self._has_more.wait()
                self._has_more.clear()
                if self._writer is None:
                    await self._send_held_by_asgi(send)
            self._writer = None  # or what waits for it would overtake what waits for ASGI
            while len(self._held) > _MAX_EVENTS:
                await send({"type": "http.response.body", "body": self._taken(), "more_body": True})
            rest = self._taken() + self._end_of_stream()
            await send({"type": "http.response.body", "body": rest, "more_body": False})
        finally:
            if self._comment_timer is not None:
                self._comment_timer.cancel()
            self._generation.stop()

    async def _send_held_by_asgi(self, send: Send) -> None:
        while self._held and not self._has_ended:
            await send({"type": "http.response.body", "body": self._taken(), "more_body": True})

    def _lend(self, writer: DirectWriter | None) -> None:
        """Write to `writer` from now on, first what came meanwhile."""
        self._writer = writer
        if writer is not None:
            writer.on_resume(self.send_held)
            self.send_held()

    def _begin(self) -> None:
        """Let the head leave: the request will be answered."""
        self._hold(self._first_events())
        self._has_more.set()

    def _comment_later(self) -> None:
        self._comment_timer = asyncio.get_running_loop().call_later(_COMMENT_AFTER_S, self._comment, self._held)

    def _comment(self, held: list[bytes]) -> None:
        """Say that it goes on, if nothing was sent since `held` was what waited: what is sent leaves another list."""
        if self._held is held and not held:
            self._hold(_COMMENT)
        self._comment_later()

    def _take(self, index: int, delta: Delta) -> None:
        self._hold(self._event_of(index, delta))

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        if not data.isascii():
            data = in_one_line(data)
        if not self._held:
            if self._writer is None:
                self._has_more.set()
            else:
                self._turn.add(self)
        self._held.append(data)

    def _end(self, error: KvrayError | None) -> None:
        self._error = error
        self._has_ended = True
        self._has_more.set()

    def _taken(self) -> bytes:
        """Return the next piece of what is held, which is held no longer."""
        taken, self._held = self._held[:_MAX_EVENTS], self._held[_MAX_EVENTS:]
        return b"".join(taken)

    def _end_of_stream(self) -> bytes:
        return in_one_line(self._last_events() if self._error is None else self._error_event(self._error))
