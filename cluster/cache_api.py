"""/v1/cache/...: where a prompt's KV lies, what the caches hold, and what is to be dropped, kept and verified."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final, get_args

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from cluster.caches import Caches, PromptTokens, Sum
from cluster.openai import prompts
from cluster.openai.body import BodyDecoder, read_body
from cluster.openai.cache_protocol import (
    CACHE_TIERS,
    CacheStatsReply,
    CacheTier,
    CheckProgress,
    CheckRequest,
    ClearRequest,
    LookupReply,
    LookupRequest,
    PinRequest,
    PromptFields,
    UnpinRequest,
    WorkReply,
)
from cluster.openai.conversation import rendered, template_tools
from cluster.openai.docs_schema import answers, body_of
from cluster.openai.errors import bad_field
from cluster.openai.surface import Surface
from kvcache.names import tenant_of
from messages.cache import BlocksListed
from messages.errors import RequestError
from messages.fleet import WorkerInfo

#: Rows of a table, of some 100 bytes each: all of them are gathered before the first is sent, as it tells their number.
_MAX_ROWS: Final = 2_000_000
_PARAMETERS: Final = {
    "parameters": [
        {"name": "format", "in": "query", "schema": {"enum": ["arrow", "parquet", "json"], "default": "arrow"}},
        {"name": "tier", "in": "query", "schema": {"enum": list(CACHE_TIERS)}, "description": "default: all of them"},
    ]
}
_TABLES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "Blocks, a row for each and its tier; X-Num-Rows tells how many rows it is when it is whole"}
}


def add_cache(app: FastAPI, surface: Surface, caches: Caches) -> None:
    """Add the endpoints that manage what is cached."""
    max_bytes = surface.limits.max_body_bytes
    _add_views(app, surface, caches)
    clear_decoder, check_decoder = BodyDecoder(ClearRequest), BodyDecoder(CheckRequest)
    pin_decoder, unpin_decoder = BodyDecoder(PinRequest), BodyDecoder(UnpinRequest)

    @app.post("/v1/cache/clear", openapi_extra=body_of(ClearRequest), responses=answers(WorkReply))
    async def clear(request: Request) -> Response:
        """Drop blocks from node caches; with `dry_run`, which is the default, say what would go."""
        fields = clear_decoder.decode(await read_body(request, max_bytes))
        tiers = fields.tiers or CACHE_TIERS
        prompt = await _prompt_of(surface, fields)
        tenant = None
        if prompt is None and fields.cache_salt is not None:
            tenant = tenant_of(fields.cache_salt.encode())
            if list(tiers) != ["host"]:
                raise bad_field(
                    "tiers", tiers, '["host"] with a cache_salt alone: no other tier knows whose blocks it has'
                )
        elif (prompt is None) != fields.everything:
            raise bad_field("everything", fields.everything, "a prompt, messages, a cache_salt, or everything: true")
        if tenant is not None and fields.everything:
            raise bad_field("everything", True, "it false where there is a cache_salt")
        return _json(await caches.clear(_unique(tiers), prompt, tenant, is_dry_run=fields.dry_run))

    @app.post("/v1/cache/pin", openapi_extra=body_of(PinRequest), responses=answers(WorkReply))
    async def pin(request: Request) -> Response:
        """Keep a prompt's blocks in host memory, where they lie there: for `ttl_s` seconds, or for good."""
        fields = pin_decoder.decode(await read_body(request, max_bytes))
        prompt = await _wanted_prompt_of(surface, fields)
        ttl_s = math.inf if fields.ttl_s is None else fields.ttl_s
        return _json(await caches.keep(prompt, ttl_s, fields.priority))

    @app.post("/v1/cache/unpin", openapi_extra=body_of(UnpinRequest), responses=answers(WorkReply))
    async def unpin(request: Request) -> Response:
        """Keep a prompt's blocks no longer than others."""
        fields = unpin_decoder.decode(await read_body(request, max_bytes))
        return _json(await caches.keep(await _wanted_prompt_of(surface, fields), 0.0, 0))

    @app.post("/v1/cache/check", openapi_extra=body_of(CheckRequest), responses=answers(CheckProgress))
    async def check(request: Request) -> Response:
        """Read and verify blocks, drop damaged ones. Lines of JSON: progress, at last the whole (WorkReply)."""
        fields = check_decoder.decode(await read_body(request, max_bytes))
        prompt = await _prompt_of(surface, fields)
        if prompt is None and fields.cache_salt is not None:
            raise bad_field("cache_salt", fields.cache_salt, "a prompt or messages with it, or none: everything")
        infos = await caches.found()
        lines = _check_lines(caches, infos, _unique(fields.tiers or CACHE_TIERS), prompt)
        return StreamingResponse(lines, media_type="application/x-ndjson")


def _add_views(app: FastAPI, surface: Surface, caches: Caches) -> None:
    decoder = BodyDecoder(LookupRequest)
    tabling = asyncio.Lock()

    @app.post("/v1/cache/lookup", openapi_extra=body_of(LookupRequest), responses=answers(LookupReply))
    async def lookup(request: Request) -> Response:
        """Tell which of a prompt's tokens lie where."""
        fields = decoder.decode(await read_body(request, surface.limits.max_body_bytes))
        return _json(await caches.lookup(await _wanted_prompt_of(surface, fields)))

    @app.get("/v1/cache/stats", responses=answers(CacheStatsReply))
    async def stats() -> Response:
        """Tell what workers and node caches hold, by tier."""
        return _json(await caches.stats())

    @app.get("/v1/cache/table", openapi_extra=_PARAMETERS, responses=_TABLES)
    async def table(request: Request) -> Response:
        """List all that node caches hold, as an Arrow stream, a Parquet file or JSON."""
        from cluster.cache_table import MEDIA_TYPES, CacheTable, Listed, TableFormat

        query = request.query_params
        wanted: TableFormat | None = next(
            (one for one in get_args(TableFormat) if one == query.get("format", "arrow")), None
        )
        if wanted is None:
            raise bad_field("format", query.get("format"), "arrow, parquet or json")
        tiers = [tier for tier in CACHE_TIERS if tier == query.get("tier", tier)]
        if not tiers:
            raise bad_field("tier", query.get("tier"), f"one of {', '.join(CACHE_TIERS)}")
        async with tabling:  # one at a time is in memory before it is sent
            made = CacheTable([Listed(*part) for part in await _gathered(caches, tiers)])
        return StreamingResponse(
            made.pieces(wanted), media_type=MEDIA_TYPES[wanted], headers={"X-Num-Rows": str(made.num_rows)}
        )


async def _gathered(caches: Caches, tiers: Sequence[CacheTier]) -> list[tuple[WorkerInfo, CacheTier, BlocksListed]]:
    parts: list[tuple[WorkerInfo, CacheTier, BlocksListed]] = []
    num_rows = 0
    async with aclosing(caches.listed(tiers)) as listing:
        async for part in listing:
            num_rows += part[2].num_blocks
            if num_rows > _MAX_ROWS:
                raise RequestError(
                    f"table: got more than {_MAX_ROWS} blocks, want tier=, so that there are fewer",
                    param="tier",
                    code="table_too_large",
                )
            parts.append(part)
    return parts


async def _check_lines(
    caches: Caches, infos: Sequence[WorkerInfo], tiers: Sequence[CacheTier], prompt: PromptTokens | None
) -> AsyncGenerator[bytes, None]:
    total = Sum(len(infos))
    verified: Counter[tuple[str, CacheTier]] = Counter()
    damaged: Counter[tuple[str, CacheTier]] = Counter()
    async with aclosing(caches.check(infos, tiers, prompt)) as pieces:
        async for piece in pieces:
            total.add(piece)
            key = (piece.info.worker_id, piece.tier)
            verified[key] += piece.done.num_done
            damaged[key] += piece.done.num_damaged
            line = CheckProgress(
                worker_id=piece.info.worker_id,
                tier=piece.tier,
                blocks=verified[key],
                damaged=damaged[key],
                held=max(piece.done.num_held, verified[key]),
            )
            yield msgspec.json.encode(line) + b"\n"
    yield msgspec.json.encode(total.reply()) + b"\n"


async def _wanted_prompt_of(surface: Surface, fields: PromptFields) -> PromptTokens:
    prompt = await _prompt_of(surface, fields)
    if prompt is None:
        raise RequestError("prompt: missing, want a prompt or messages", param="prompt", code="missing_required_field")
    return prompt


async def _prompt_of(surface: Surface, fields: PromptFields) -> PromptTokens | None:
    """Tokenize the prompt that is meant as the endpoints do that answer it; None: there is none.

    Raises:
        RequestError: it is none that a model served here could answer: too long, for example.
    """
    surface.check_model(fields.model)
    if fields.prompt is None and fields.messages is None:
        return None
    if fields.prompt is not None and fields.messages is not None:
        raise RequestError("prompt: want either prompt or messages", param="prompt", code="invalid_value")
    salt = (fields.cache_salt or "").encode()
    if fields.messages is not None:
        tools = template_tools(fields.tools) if fields.tools else None
        text = rendered(surface.tokenizer, fields.messages, fields, tools)
        return PromptTokens(await _encoded(surface, "messages", text, bool(fields.add_special_tokens)), salt)
    assert fields.prompt is not None
    found = prompts.prompts_of(fields.prompt, surface.model)
    if len(found) != 1:
        raise bad_field("prompt", fields.prompt, "one prompt")
    [prompt] = found
    if isinstance(prompt, str):
        return PromptTokens(await _encoded(surface, "prompt", prompt, fields.add_special_tokens is not False), salt)
    return PromptTokens(prompts.packed(prompts.fitted("prompt", prompt, None, None, surface.model)), salt)


async def _encoded(surface: Surface, param: str, text: str, adds_special: bool) -> bytes:
    prompts.check_chars(param, text, surface.max_token_chars, surface.model)
    token_ids = await surface.encode(text, add_special_tokens=adds_special)
    return prompts.packed(prompts.fitted(param, token_ids, None, None, surface.model))


def _unique(tiers: Sequence[CacheTier]) -> list[CacheTier]:
    """Return the tiers in order, each once."""
    return [tier for tier in CACHE_TIERS if tier in tiers]


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
