"""OpenAPI of endpoints whose bodies are msgspec types, which FastAPI does not read by itself."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cluster.openai import cache_protocol, protocol, replies, route_protocol
from cluster.openai.errors import ErrorReply

_TEMPLATE: Final = "#/components/schemas/{name}"
_TYPES: Final[tuple[type[msgspec.Struct], ...]] = (
    protocol.ChatRequest,
    protocol.CompletionRequest,
    protocol.TokenizeRequest,
    protocol.DetokenizeRequest,
    replies.ChatReply,
    replies.ChatChunk,
    replies.CompletionReply,
    replies.ModelList,
    replies.ModelCard,
    replies.TokenizeReply,
    replies.DetokenizeReply,
    replies.VersionReply,
    cache_protocol.LookupRequest,
    cache_protocol.LookupReply,
    cache_protocol.ClearRequest,
    cache_protocol.PinRequest,
    cache_protocol.UnpinRequest,
    cache_protocol.CheckRequest,
    cache_protocol.EvictRequest,
    cache_protocol.MoveRequest,
    cache_protocol.WarmRequest,
    cache_protocol.CollectRequest,
    cache_protocol.ExportRequest,
    cache_protocol.ImportRequest,
    cache_protocol.WorkProgress,
    cache_protocol.WorkReply,
    cache_protocol.CacheStatsReply,
    route_protocol.RouteFields,
    route_protocol.RouteReply,
    route_protocol.RouteList,
    ErrorReply,
)


def _reference(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": _TEMPLATE.format(name=kind.__name__)}}


def body_of(kind: type[msgspec.Struct], media_type: str = "application/json") -> dict[str, Any]:
    """Make a route's `openapi_extra` for a body of `kind`."""
    return {"requestBody": {"required": True, "content": {media_type: _reference(kind)}}}


def answers(kind: type[msgspec.Struct], stream: type[msgspec.Struct] | None = None) -> dict[int | str, dict[str, Any]]:
    """Make a route's `responses`: `kind` as JSON, `stream` as server-sent events, errors in OpenAI's form."""
    content: dict[str, Any] = {"application/json": _reference(kind)}
    if stream is not None:
        content["text/event-stream"] = _reference(stream)
    errors = {"description": "An error", "content": {"application/json": _reference(ErrorReply)}}
    return {200: {"description": "The answer", "content": content}, "4XX": errors, "5XX": errors}


def describe(app: FastAPI, *more: type[msgspec.Struct], wants_api_key: bool = False) -> None:
    """Give `app` a schema that includes these types, and `more`; by it /docs asks for an API key if one is wanted."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, types = msgspec.json.schema_components((*_TYPES, *more), ref_template=_TEMPLATE)
            parts = schema.setdefault("components", {})
            parts.setdefault("schemas", {}).update(types)
            if wants_api_key:
                parts["securitySchemes"] = {"API key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"API key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
