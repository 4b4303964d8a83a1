"""The HTTP application: OpenAI's endpoints over a Backend."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, TypeAlias

import msgspec
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.openai import replies
from cluster.openai.backend import Backend, HttpLimits, ServedModel
from cluster.openai.body import BodyDecoder, nested_too_deeply, read_body
from cluster.openai.call_recognition import tool_format
from cluster.openai.callers import Callers
from cluster.openai.chat import start_chat
from cluster.openai.completions import start_completion
from cluster.openai.docs_schema import answers, body_of, describe
from cluster.openai.edge import CLIENT_LEFT, DOCS_FILES, Edge, path_below_root
from cluster.openai.errors import error_headers, error_json, model_not_found, shown
from cluster.openai.grammar_checks import GrammarChecks
from cluster.openai.hints import HEADER, with_header
from cluster.openai.metrics import HttpMetrics
from cluster.openai.not_served import not_served
from cluster.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from cluster.openai.responses.endpoints import DOCUMENTED, add_responses
from cluster.openai.responses.kept import KeptResponses
from cluster.openai.responses.store import ResponseStore, StoreLimits
from cluster.openai.surface import Surface
from cluster.openai.thought_recognition import thought_format
from cluster.openai.tokens import detokenize, tokenize
from cluster.openai.unserved import OF_CHATS
from messages.errors import KvrayError, RequestError
from text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_DESCRIPTION: Final = "OpenAI's API, with vLLM's extra fields."


def create_app(
    backend: Backend,
    model: ServedModel,
    tokenizer: Tokenizer,
    *,
    version: str,
    limits: HttpLimits | None = None,
    callers: Callers | None = None,
    allowed_origins: Sequence[str] = (),
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    metrics: HttpMetrics | None = None,
    responses: KeptResponses | None = None,
    extend: Callable[[FastAPI, Surface], None] = lambda _app, _surface: None,
    on_reply_id: Callable[[str, str], None] = lambda _sequence_id, _reply_id: None,
) -> FastAPI:
    """Create the application. Nothing runs before the first request; everything happens on one event loop.

    Args:
        backend: generates.
        model: facts about the model served.
        tokenizer: of that model.
        version: of the product, for /version.
        limits: what one client may ask for.
        callers: where they have keys, every path but those of probes and of /docs wants one; None: everybody.
        allowed_origins: whose pages may call from a browser, as browsers name them; "*": everybody's.
        tool_parser: how the model writes tool calls, by a name of `FORMATS`; None: as its chat template shows it.
        reasoning_parser: how it writes thoughts, by a name of `THOUGHT_FORMATS`; None: as its chat template shows it.
        metrics: where to count; None: in ones of its own.
        responses: those that later requests may go on from; None: what this process keeps, within the defaults.
        extend: adds more endpoints.
        on_reply_id: as `Surface.on_reply_id`.
    """
    kind = tool_format(tokenizer, tool_parser)
    thoughts = thought_format(tokenizer, reasoning_parser)
    limits = limits or HttpLimits()
    surface = Surface(
        backend=backend,
        model=model,
        tokenizer=tokenizer,
        grammars=GrammarChecks(model, tokenizer, limits),
        limits=limits,
        callers=callers or Callers(),
        metrics=metrics or HttpMetrics(),
        tool_format=kind,
        call_ids=_special_ids(tokenizer, kind.marks if kind else ()),
        thought_format=thoughts,
        on_reply_id=on_reply_id,
        thought_ids=_special_ids(tokenizer, thoughts.marks if thoughts else ()),
    )
    app = FastAPIOffline(
        title="kvray", version=version, description=_DESCRIPTION, redoc_url=None, static_url=DOCS_FILES
    )
    describe(app, *DOCUMENTED, wants_api_key=surface.callers.has_keys)
    endpoints = _add_generation(app, surface)
    endpoints |= add_responses(app, surface, responses or KeptResponses(ResponseStore(StoreLimits())))
    _add_models(app, surface)
    _add_tokens(app, surface)
    _add_operations(app, surface, version)
    extend(app, surface)
    for error_kind, handler in _ERROR_HANDLERS.items():
        app.add_exception_handler(error_kind, handler)
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    app.add_middleware(_ShortCut, endpoints=endpoints)
    app.add_middleware(Edge, callers=surface.callers, metrics=surface.metrics, paths=paths)
    if allowed_origins:  # outermost: a page is to read errors, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _special_ids(tokenizer: Tokenizer, marks: Sequence[str]) -> frozenset[int]:
    """Return the special tokens that are, or are in, one of `marks`."""
    text = "\n".join(marks)
    return frozenset(i for i in tokenizer.special_ids if tokenizer.token_text(i) in text)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _request_id(request: Request, asked: str | None) -> str:
    """Return the body's id, else the header's, else a random one; the reply's header will carry it."""
    if asked is not None:
        request.state.request_id = asked
    found: str = request.state.request_id
    return found


_Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


class _ShortCut:
    """Calls the endpoints that generate, straight: looking for a route and what it depends on is a fifth of a request.

    In FastAPI they are for the documentation, and for other methods.
    """

    def __init__(self, app: ASGIApp, *, endpoints: Mapping[str, _Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI."""
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(path_below_root(scope))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except tuple(_ERROR_HANDLERS) as error:
            handler = next(handler for kind, handler in _ERROR_HANDLERS.items() if isinstance(error, kind))
            response = await handler(request, error)
        await response(scope, receive, send)


def _add_generation(app: FastAPI, surface: Surface) -> dict[str, _Endpoint]:
    """Add the endpoints that generate; return them by path."""
    max_bytes = surface.limits.max_body_bytes
    chat_decoder, completion_decoder = BodyDecoder(ChatRequest), BodyDecoder(CompletionRequest, OF_CHATS)

    @app.post(
        "/v1/chat/completions",
        openapi_extra=body_of(ChatRequest),
        responses=answers(replies.ChatReply, replies.ChatChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """Generate the assistant's next turn."""
        fields = chat_decoder.decode(await read_body(request, max_bytes))
        fields = with_header(fields, request.headers.get(HEADER))
        chat = await start_chat(surface, request.state.caller, fields, _request_id(request, fields.request_id))
        return await chat.respond(request)

    @app.post(
        "/v1/completions",
        openapi_extra=body_of(CompletionRequest),
        responses=answers(replies.CompletionReply, replies.CompletionReply),
    )
    async def completions(request: Request) -> Response:
        """Generate what follows a prompt."""
        fields = completion_decoder.decode(await read_body(request, max_bytes))
        fields = with_header(fields, request.headers.get(HEADER))
        completion = await start_completion(
            surface, request.state.caller, fields, _request_id(request, fields.request_id)
        )
        return await completion.respond(request)

    return {"/v1/chat/completions": chat_completions, "/v1/completions": completions}


def _add_models(app: FastAPI, surface: Surface) -> None:
    model = surface.model
    cards = [
        replies.ModelCard(id=name, created=model.created_s, root=model.name, max_model_len=model.max_model_len)
        for name in model.names
    ]

    @app.get("/v1/models", responses=answers(replies.ModelList))
    async def models() -> Response:
        """List the names under which the model is served."""
        return _json(replies.ModelList(data=cards))

    @app.get("/v1/models/{name:path}", responses=answers(replies.ModelCard))
    async def model_card(name: str) -> Response:
        """Describe the model under one of its names; 404 for another name."""
        for card in cards:
            if card.id == name:
                return _json(card)
        raise model_not_found(name, model.names)


def _add_tokens(app: FastAPI, surface: Surface) -> None:
    max_bytes = surface.limits.max_body_bytes
    tokenize_decoder, detokenize_decoder = BodyDecoder(TokenizeRequest), BodyDecoder(DetokenizeRequest)

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answers(replies.TokenizeReply))
    async def tokenize_text(request: Request) -> Response:
        """Encode text or messages as token ids."""
        fields = tokenize_decoder.decode(await read_body(request, max_bytes))
        return Response(await tokenize(surface, fields), media_type="application/json")

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answers(replies.DetokenizeReply))
    async def detokenize_ids(request: Request) -> Response:
        """Decode token ids to text."""
        fields = detokenize_decoder.decode(await read_body(request, max_bytes))
        return Response(await detokenize(surface, fields), media_type="application/json")

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """Give the tokenizer's configuration, with its special tokens and chat template."""
        return Response(msgspec.json.encode(surface.tokenizer.info()), media_type="application/json")


def _add_operations(app: FastAPI, surface: Surface, version: str) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Answer 200 while this process answers."""
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> Response:
        """Answer 200 when a request could be answered now, else 503; with details."""
        readiness = await surface.backend.ready()
        body = msgspec.json.encode({"ready": readiness.is_ready, **readiness.detail})
        return Response(body, 200 if readiness.is_ready else 503, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        """Give the fleet's and this surface's numbers in the Prometheus text format."""
        if not surface.metrics.is_counting:
            raise RequestError("path: got /metrics, and observability.level is off: nothing is counted", status=404)
        body = surface.metrics.text(await surface.backend.metrics())
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", responses=answers(replies.VersionReply))
    async def version_reply() -> Response:
        """Give the product's version."""
        return _json(replies.VersionReply(version))


def _error_reply(error: KvrayError) -> Response:
    return Response(error_json(error), error.status, headers=error_headers(error), media_type="application/json")


async def _on_serve_error(_: Request, error: KvrayError) -> Response:
    if error.status >= 500:
        logger.warning("%s: %s", type(error).__name__, error.message)
    return _error_reply(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    seen = shown(request.url.path)
    what = not_served(request.url.path)
    if what is not None:
        return _error_reply(RequestError(f"path: got {seen}, and {what}", status=404, code="not_served"))
    if error.status_code == 404:
        return _error_reply(RequestError(f"path: got {seen}, want one that is in /docs", status=404))
    message = f"{request.method} {seen}: {HTTPStatus(error.status_code).phrase}"
    if error.status_code == 405:
        message = f"method: got {request.method} for {seen}, want {(error.headers or {}).get('Allow', 'another')}"
    response = _error_reply(RequestError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    if "GET" in response.headers.get("Allow", "").split(", "):
        response.headers["Allow"] += ", HEAD"
    return response


async def _on_client_left(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_LEFT)  # nobody reads it


async def _on_nested_too_deeply(_: Request, __: RecursionError) -> Response:
    return _error_reply(nested_too_deeply())


_ERROR_HANDLERS: Final[dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]]] = {
    KvrayError: _on_serve_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_client_left,
    RecursionError: _on_nested_too_deeply,
}
