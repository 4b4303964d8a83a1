"""The outermost layer but CORS: request ids, API keys, counting. Plain ASGI: streams pass through untouched."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection
from secrets import token_hex
from typing import Final
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.openai.callers import Callers, not_allowed
from cluster.openai.errors import send_error, shown
from cluster.openai.metrics import HttpMetrics
from cluster.openai.not_served import not_served
from messages.errors import KvrayError, RequestError

logger = logging.getLogger(__name__)
access = logging.getLogger("cluster.access")  # one line for each request; its level switches it off

DOCS_FILES: Final = "/docs/files"  #: below it lies what a browser loads for /docs
#: For probes, which hold no key, and for the pages on which a person enters one; they tell what every kvray does.
OPEN_PATHS: Final = (
    "/health",
    "/ready",
    "/version",
    "/docs",
    "/openapi.json",
    "/cache",
    "/cache/app.css",
    "/cache/app.js",
    "/cache/parts.js",
    "/cache/explain.js",
)
_NOT_SERVED: Final = "not served"  #: the label of paths that others serve and nobody here
#: What a tenant may ask who is no operator. All other paths show, or touch, what is others' too.
TENANT_PATHS: Final = frozenset(
    {
        *OPEN_PATHS,
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{id}",
        "/v1/responses",
        "/v1/responses/{id}",
        "/v1/responses/{id}/input_items",
        "/v1/route",
        "/v1/route/{id}",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/cache/data",
        *(f"/v1/cache/{verb}" for verb in ("lookup", "stats", "table", "clear", "pin", "unpin", "check")),
    }
)
_WITH_NAMES: Final = (
    (re.compile(r"/v1/models/.*", re.DOTALL), "/v1/models/{id}"),
    (re.compile(rf"{DOCS_FILES}/.*", re.DOTALL), "/docs"),
    (re.compile(r"/v1/responses/[^/]+"), "/v1/responses/{id}"),
    (re.compile(r"/v1/responses/[^/]+/input_items"), "/v1/responses/{id}/input_items"),
    (re.compile(r"/v1/route/[^/]+"), "/v1/route/{id}"),
)
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_MAX_PATH: Final = 200  #: characters of a path that the access log shows
CLIENT_LEFT: Final = 499  # as nginx logs it; never sent


class Edge:
    """Wraps the application; leaves `caller` and `request_id` in the scope's state; handlers may put another id."""

    def __init__(self, app: ASGIApp, *, callers: Callers, metrics: HttpMetrics, paths: Collection[str]) -> None:
        self._app = app
        self._callers = callers
        self._metrics = metrics
        self._paths = frozenset(paths)  # known ones; others share a label, or a scanner could fill memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, as ASGI: with a request id, after its API key was checked, counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self._metrics, self._label(scope), scope, send).run(self._guarded, receive)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "OPTIONS":  # a browser's preflight never has a key, and nothing here answers any other
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        caller = self._callers.find(Headers(scope=scope).get("authorization", ""))
        label = self._label(scope)
        if caller is None and label not in OPEN_PATHS:
            error = RequestError(
                "Authorization: want Bearer and one of the server's API keys", code="invalid_api_key", status=401
            )
            await send_error(error, send)
            return
        if caller is not None and not caller.is_operator and label not in TENANT_PATHS | {_NOT_SERVED}:
            await send_error(not_allowed(None, f"path {shown(path_below_root(scope))}"), send)
            return
        scope["state"]["caller"] = caller
        await self._app(scope, receive, send)

    def _label(self, scope: Scope) -> str:
        path = path_below_root(scope)
        if path in self._paths:
            return path
        for pattern, label in _WITH_NAMES:
            if pattern.fullmatch(path):
                return label
        return "other" if not_served(path) is None else _NOT_SERVED


class _Exchange:
    """One request and its response."""

    def __init__(self, metrics: HttpMetrics, label: str, scope: Scope, send: Send) -> None:
        self._metrics = metrics
        self._label = label
        self._scope = scope
        self._send = send
        self._status = CLIENT_LEFT
        self._is_started = False
        self._is_complete = False
        sent_id = Headers(scope=scope).get("x-request-id", "")
        self._state = scope.setdefault("state", {})
        self._state["request_id"] = sent_id if _REQUEST_ID.fullmatch(sent_id) else token_hex(16)

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        started_s = time.perf_counter()
        try:
            await app(self._scope, receive, self._forward)
        except Exception:
            logger.exception("%s %s failed", self._scope["method"], self._label)
            if self._is_started:
                raise  # the server cuts the connection, which is all that can be said now
            await send_error(KvrayError("internal error"), self._forward)
        finally:
            status = self._status if self._is_complete else CLIENT_LEFT
            self._metrics.count_http(self._label, status, has_left=status == CLIENT_LEFT)
            if access.isEnabledFor(logging.INFO):
                self._log(status, time.perf_counter() - started_s)

    def _log(self, status: int, seconds: float) -> None:
        """Write the line of the access log; a query may hold a cache_salt and is left out."""
        host, port = self._scope.get("client") or ("-", 0)
        access.info(
            '%s:%d "%s %s HTTP/%s" %d %.1f ms %s',
            host,
            port,
            self._scope["method"],
            quote(self._scope["path"][:_MAX_PATH]),
            self._scope.get("http_version", "1.1"),
            status,
            seconds * 1000,
            self._state["request_id"],
        )

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_started = True
            self._status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._state["request_id"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True
        await self._send(message)


def _without_body(send: Send) -> Send:
    """Return a sender of an answer's head alone: what a GET would get, which HEAD asks for (RFC 9110, 9.3.2)."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


def path_below_root(scope: Scope) -> str:
    """Return a request's path below the application's root."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"
