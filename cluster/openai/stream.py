"""Answers that stop working when the client leaves: server-sent events, and whole replies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.openai.errors import error_json, send_error
from messages.errors import KvrayError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_encoder = msgspec.json.Encoder()

DONE: Final = b"data: [DONE]\n\n"
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]


def event(value: msgspec.Struct) -> bytes:
    """Write `value` as one server-sent event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


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


class EventStream(Response):
    """Sends events as they come. An error before the first one is a reply with its own status; after it, an event."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self._is_started = False
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as ASGI. When the client leaves, they are closed and nothing more is sent."""
        try:
            await first_of(self._send_all(send), receive)
        except ClientDisconnect:
            logger.debug("the client left its stream")

    async def _send_all(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    if not self._is_started:
                        self._is_started = True
                        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except KvrayError as error:
            await self._send_error(error, send)
            return
        except Exception:
            if not self._is_started:
                raise
            logger.exception("a stream failed")
            await self._send_error(KvrayError("internal error"), send)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, error: KvrayError, send: Send) -> None:
        if not self._is_started:
            await send_error(error, send)
            return
        await send({"type": "http.response.body", "body": b"data: " + error_json(error) + b"\n\n"})
