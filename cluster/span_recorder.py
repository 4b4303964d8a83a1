"""Follows the requests of an ingress whose spans are wanted, from the first header to the last byte of their answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.openai.edge import CLIENT_LEFT, path_below_root
from cluster.request_events import Event, Instruction
from cluster.spans import FollowedRequest, RequestSpans, SpanBook, trace_context
from messages.request import GenerateRequest

logger = logging.getLogger(__name__)

#: Requests to others are short, and would hide these.
_PATHS: Final = frozenset(["/v1/chat/completions", "/v1/completions", "/v1/responses"])

_current: ContextVar[FollowedRequest | None] = ContextVar("kvray_followed_request", default=None)


class SpanRecorder:
    """What the HTTP surface and the dispatcher tell of requests, put together. One event loop."""

    def __init__(self, put: Callable[[RequestSpans], None]) -> None:
        """`put` is given each request's spans when its answer has ended; it returns at once."""
        self._put = put
        self._book = SpanBook()

    def start(self, requests: Sequence[GenerateRequest]) -> None:
        """Note that the HTTP request which is being answered here begins as these sequences."""
        followed = _current.get()
        if followed is not None:
            self._book.follow(followed, requests)

    def see(self, event: Event, instructions: Sequence[Instruction], now_s: float) -> None:
        """Take in what happened; never raises: a span is no reason for a request to fail."""
        try:
            self._book.see(event, instructions, now_s)
        except Exception:  # the edge of what is only watched
            logger.exception("spans: %s was not understood", type(event).__name__)

    def end(self, followed: FollowedRequest, status: int) -> None:
        """Have the spans sent of a request whose answer has ended."""
        self._put(self._book.end(followed, status, time.monotonic()))


class SpanEdge:
    """Wraps the application, outermost: begins and ends a request's own span. Plain ASGI: streams pass untouched.

    A trace that the client began (traceparent) goes on; one that it does not want sampled is not followed.
    """

    def __init__(self, app: ASGIApp, *, recorder: SpanRecorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, as ASGI."""
        path = path_below_root(scope) if scope["type"] == "http" else ""
        if path not in _PATHS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = trace_context(headers.get("traceparent", ""), headers.get("tracestate", ""))
        if context is not None and not context.is_sampled:
            await self._app(scope, receive, send)
            return
        followed = FollowedRequest(context, time.monotonic())
        followed.attributes |= {"http.request.method": "POST", "url.path": path}
        status = CLIENT_LEFT

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = _current.set(followed)
        try:
            await self._app(scope, receive, watch)
        finally:
            _current.reset(token)
            followed.attributes["kvray.request_id"] = str(scope.get("state", {}).get("request_id", ""))
            self._recorder.end(followed, status)
