"""/v1/route: why a request went where it went and what came of it, and where a prompt would go."""

from __future__ import annotations

from typing import Final

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from cluster.cache_api import wanted_prompt_of
from cluster.openai.body import BodyDecoder, read_body
from cluster.openai.docs_schema import answers, body_of
from cluster.openai.errors import bad_field
from cluster.openai.route_protocol import RouteFields, RouteList, RouteReply
from cluster.openai.surface import Surface
from cluster.routes import Routes

_MAX_LISTED: Final = 1000
_LISTED: Final = 20
_QUERY: Final = {
    "parameters": [
        {
            "name": "limit",
            "in": "query",
            "schema": {"type": "integer", "minimum": 1, "maximum": _MAX_LISTED, "default": _LISTED},
        }
    ]
}


def add_routes(app: FastAPI, surface: Surface, routes: Routes) -> None:
    """Add the endpoints that explain routes."""
    decoder = BodyDecoder(RouteFields)

    @app.post("/v1/route", openapi_extra=body_of(RouteFields), responses=answers(RouteReply))
    async def predict(request: Request) -> Response:
        """Tell where a prompt would go if it came now, and why. Nothing is reserved, and nothing runs."""
        fields = decoder.decode(await read_body(request, surface.limits.max_body_bytes))
        prompt = await wanted_prompt_of(surface, request, fields)
        return _json(await routes.predict(prompt, fields.max_tokens))

    @app.get("/v1/route", openapi_extra=_QUERY, responses=answers(RouteList))
    async def newest(request: Request) -> Response:
        """List the newest requests, the newest first; a tenant sees its own."""
        limit = request.query_params.get("limit", str(_LISTED))
        if not (limit.isascii() and limit.isdecimal() and len(limit) <= 4 and 1 <= int(limit) <= _MAX_LISTED):
            raise bad_field("limit", limit, f"1 to {_MAX_LISTED}")
        return _json(RouteList(routes=await routes.newest(request.state.caller, int(limit))))

    @app.get("/v1/route/{request_id}", responses=answers(RouteReply))
    async def explain(request: Request, request_id: str) -> Response:
        """Tell why a request went where it went, and what came of it. The id is a reply's, or its x-request-id."""
        return _json(await routes.find(request.state.caller, request_id))


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
