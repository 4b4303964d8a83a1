"""/v1/cache/...: where a prompt's KV lies, what the caches hold, and what is to be dropped, kept, verified, moved.

Whoever has an API key may do all of it, and so bring in whatever bytes under the names of a prompt: the operator's key
is no client's (docs/SECURITY.md).
"""

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

from cluster.caches import Caches, Piece, PromptTokens, Sum
from cluster.openai import prompts
from cluster.openai.body import BodyDecoder, explained, read_body
from cluster.openai.cache_protocol import (
    NODE_TIERS,
    CacheStatsReply,
    CheckRequest,
    ClearRequest,
    CollectRequest,
    EvictRequest,
    ExportRequest,
    ImportRequest,
    LookupReply,
    LookupRequest,
    MoveRequest,
    PinRequest,
    PromptFields,
    UnpinRequest,
    WarmRequest,
    WorkProgress,
    WorkReply,
)
from cluster.openai.callers import Caller, not_allowed
from cluster.openai.conversation import rendered, template_tools
from cluster.openai.docs_schema import answers, body_of
from cluster.openai.errors import bad_field
from cluster.openai.surface import Surface
from cluster.prefixes import Prefixes
from messages.cache import BlocksListed
from messages.errors import RequestError
from messages.fleet import WorkerInfo
from messages.tier import TIERS, Tier

#: Rows of a table, of some 100 bytes each: all of them are gathered before the first is sent, as it tells their number.
_MAX_ROWS: Final = 2_000_000
_PARAMETERS: Final = {
    "parameters": [
        {"name": "format", "in": "query", "schema": {"enum": ["arrow", "parquet", "json"], "default": "arrow"}},
        {"name": "tier", "in": "query", "schema": {"enum": list(TIERS)}, "description": "default: all of them"},
        {"name": "tenant", "in": "query", "schema": {"type": "string"}, "description": "default: all of them"},
    ]
}
_TABLES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "Blocks, a row for each and its tier; X-Num-Rows tells how many rows it is when it is whole"}
}


_MAX_IMPORT_BYTES: Final = 32 << 20  #: of a piece, which has one block at least, however large
_IMPORT_TYPE: Final = "application/msgpack"
_FILES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "An Arrow IPC file, a row for each block; X-Num-Rows tells how many it is when it is whole"}
}
_IMPORT_QUERY: Final = [
    {"name": "cache_salt", "in": "query", "schema": {"type": "string"}, "description": "to name them with"},
    {"name": "tenant", "in": "query", "schema": {"type": "string"}, "description": "whose they become"},
    {
        "name": "tier",
        "in": "query",
        "schema": {"type": "array", "items": {"enum": list(NODE_TIERS)}},
        "description": "may take them in, the nearest first; default: all of them",
    },
]


def add_cache(app: FastAPI, surface: Surface, caches: Caches, prefixes: Prefixes) -> None:
    """Add the endpoints that manage what is cached."""
    max_bytes = surface.limits.max_body_bytes
    _add_views(app, surface, caches)
    _add_moves(app, surface, caches)
    _add_files(app, surface, prefixes)
    clear_decoder, check_decoder = BodyDecoder(ClearRequest), BodyDecoder(CheckRequest)
    pin_decoder, unpin_decoder = BodyDecoder(PinRequest), BodyDecoder(UnpinRequest)

    @app.post("/v1/cache/clear", openapi_extra=body_of(ClearRequest), responses=answers(WorkReply))
    async def clear(request: Request) -> Response:
        """Drop blocks from pools and node caches; with `dry_run`, which is the default, say what would go."""
        fields = clear_decoder.decode(await read_body(request, max_bytes))
        tiers = fields.tiers or TIERS
        prompt = await _prompt_of(surface, request, fields)
        if prompt is not None and fields.everything:
            raise bad_field("everything", True, "it false where there is a prompt")
        owner = _owner_to_clear(surface, request, fields) if prompt is None else None
        return _json(await caches.clear(_unique(tiers), prompt, owner, is_dry_run=fields.dry_run))

    @app.post("/v1/cache/pin", openapi_extra=body_of(PinRequest), responses=answers(WorkReply))
    async def pin(request: Request) -> Response:
        """Keep a prompt's blocks in host memory, where they lie there: for `ttl_s` seconds, or for good."""
        fields = pin_decoder.decode(await read_body(request, max_bytes))
        _require_hints(request)
        prompt = await wanted_prompt_of(surface, request, fields)
        ttl_s = math.inf if fields.ttl_s is None else fields.ttl_s
        return _json(await caches.keep(prompt, ttl_s, fields.priority))

    @app.post("/v1/cache/unpin", openapi_extra=body_of(UnpinRequest), responses=answers(WorkReply))
    async def unpin(request: Request) -> Response:
        """Keep a prompt's blocks no longer than others."""
        fields = unpin_decoder.decode(await read_body(request, max_bytes))
        _require_hints(request)
        return _json(await caches.keep(await wanted_prompt_of(surface, request, fields), 0.0, 0))

    @app.post("/v1/cache/check", openapi_extra=body_of(CheckRequest), responses=answers(WorkProgress))
    async def check(request: Request) -> Response:
        """Read and verify blocks, drop damaged ones. Lines of JSON: progress, at last the whole (WorkReply)."""
        fields = check_decoder.decode(await read_body(request, max_bytes))
        prompt = await _prompt_of(surface, request, fields)
        if prompt is None:
            for param in ("cache_salt", "tenant"):
                if getattr(fields, param) is not None:
                    raise bad_field(param, getattr(fields, param), "a prompt or messages with it, or none: everything")
            if not _caller(request).is_operator:
                raise not_allowed("prompt", "check of everything")
        tiers = _unique(fields.tiers or TIERS)
        owners = await caches.owners(tiers)
        return _lines(owners, caches.check(owners, tiers, prompt))


def _add_moves(app: FastAPI, surface: Surface, caches: Caches) -> None:
    max_bytes = surface.limits.max_body_bytes
    evict_decoder, move_decoder = BodyDecoder(EvictRequest), BodyDecoder(MoveRequest)
    warm_decoder, collect_decoder = BodyDecoder(WarmRequest), BodyDecoder(CollectRequest)

    @app.post("/v1/cache/evict", openapi_extra=body_of(EvictRequest), responses=answers(WorkReply))
    async def evict(request: Request) -> Response:
        """Drop a prompt's blocks, but those that are to be kept; with `dry_run`, the default, say what would go."""
        fields = evict_decoder.decode(await read_body(request, max_bytes))
        prompt = await wanted_prompt_of(surface, request, fields)
        tiers = _unique(fields.tiers or TIERS)
        return _json(await caches.clear(tiers, prompt, None, is_dry_run=fields.dry_run, spares_kept=True))

    @app.post("/v1/cache/move", openapi_extra=body_of(MoveRequest), responses=answers(WorkProgress))
    async def move(request: Request) -> Response:
        """Bring a prompt's blocks from one tier of each node to another. Lines of JSON, as check."""
        fields = move_decoder.decode(await read_body(request, max_bytes))
        prompt = await wanted_prompt_of(surface, request, fields)
        if fields.source == fields.target:
            raise bad_field("target", fields.target, "another tier than the source")
        owners = await caches.owners((fields.source,))
        return _lines(owners, caches.move(owners, fields.source, fields.target, prompt))

    @app.post("/v1/cache/warm", openapi_extra=body_of(WarmRequest), responses=answers(WorkProgress))
    async def warm(request: Request) -> Response:
        """Bring a prompt's blocks up to host memory, and to the pool of a worker where one is named. Lines of JSON."""
        fields = warm_decoder.decode(await read_body(request, max_bytes))
        prompt = await wanted_prompt_of(surface, request, fields)
        worker = None if fields.worker_id is None else caches.worker(fields.worker_id)
        owners = [*([] if worker is None else [worker]), *await caches.found()]
        return _lines(owners, caches.warm(owners, worker, prompt))

    @app.post("/v1/cache/gc", openapi_extra=body_of(CollectRequest), responses=answers(WorkProgress))
    async def collect(request: Request) -> Response:
        """Have disk and remote stores give back the room that dropped blocks take. Lines of JSON, as check."""
        fields = collect_decoder.decode(await read_body(request, max_bytes))
        owners = await caches.found()
        return _lines(owners, caches.collect(owners, _unique(fields.tiers or ("disk", "remote"))))


def _add_files(app: FastAPI, surface: Surface, prefixes: Prefixes) -> None:
    export_decoder = BodyDecoder(ExportRequest)
    import_decoder = msgspec.msgpack.Decoder(ImportRequest)

    @app.post("/v1/cache/export", openapi_extra=body_of(ExportRequest), responses=_FILES)
    async def export(request: Request) -> Response:
        """Give a prompt's blocks, as far as they are held from its head on, as an Arrow IPC file."""
        from cluster.prefix_file import MEDIA_TYPE, written

        fields = export_decoder.decode(await read_body(request, surface.limits.max_body_bytes))
        prefix = await prefixes.held(await wanted_prompt_of(surface, request, fields))
        pieces = written(prefix.model, prefix.num_blocks, prefix.pieces)
        first = await anext(pieces)  # what is not there any more is an error, and no file that is cut off

        async def whole() -> AsyncGenerator[bytes, None]:
            yield first
            async for piece in pieces:
                yield piece

        return StreamingResponse(whole(), media_type=MEDIA_TYPE, headers={"X-Num-Rows": str(prefix.num_blocks)})

    @app.post(
        "/v1/cache/import",
        openapi_extra=body_of(ImportRequest, _IMPORT_TYPE) | {"parameters": _IMPORT_QUERY},
        responses=answers(WorkReply),
    )
    async def take_in(request: Request) -> Response:
        """Put some blocks of an exported file into host memory, and a store below it; damaged ones: none at all."""
        body = await read_body(request, max(surface.limits.max_body_bytes, _MAX_IMPORT_BYTES), _IMPORT_TYPE)
        try:
            piece = import_decoder.decode(body)
        except msgspec.ValidationError as error:
            refusal = explained(error, ImportRequest, lambda _: "another")
            raise RequestError(refusal.message, param=refusal.param, code="invalid_body") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"body: got {error}, want blocks in MessagePack", code="invalid_body") from None
        query = request.query_params
        meant = surface.callers.meant(_caller(request), query.get("tenant"))
        cache_salt, wanted = query.get("cache_salt"), query.getlist("tier") or NODE_TIERS
        tiers: list[Tier] = [tier for tier in NODE_TIERS if tier in wanted]
        if unknown := set(wanted).difference(NODE_TIERS):
            raise bad_field("tier", min(unknown), f"one of {', '.join(NODE_TIERS)}")
        return _json(await prefixes.put(piece, meant.salt(cache_salt), meant.owner(cache_salt), tiers))


def _add_views(app: FastAPI, surface: Surface, caches: Caches) -> None:
    decoder = BodyDecoder(LookupRequest)
    tabling = asyncio.Lock()

    @app.post("/v1/cache/lookup", openapi_extra=body_of(LookupRequest), responses=answers(LookupReply))
    async def lookup(request: Request) -> Response:
        """Tell which of a prompt's tokens lie where."""
        fields = decoder.decode(await read_body(request, surface.limits.max_body_bytes))
        return _json(await caches.lookup(await wanted_prompt_of(surface, request, fields)))

    @app.get("/v1/cache/stats", responses=answers(CacheStatsReply))
    async def stats(request: Request) -> Response:
        """Tell what workers and node caches hold, by tier; a tenant is told what its own blocks take."""
        caller = _caller(request)
        return _json(await caches.stats(None if caller.is_operator else caller.name))

    @app.get("/v1/cache/table", openapi_extra=_PARAMETERS, responses=_TABLES)
    async def table(request: Request) -> Response:
        """List what pools and node caches hold, of a tenant its own, as an Arrow stream, a Parquet file or JSON."""
        from cluster.cache_table import MEDIA_TYPES, CacheTable, Listed, TableFormat

        query = request.query_params
        wanted: TableFormat | None = next(
            (one for one in get_args(TableFormat) if one == query.get("format", "arrow")), None
        )
        if wanted is None:
            raise bad_field("format", query.get("format"), "arrow, parquet or json")
        tiers = [tier for tier in TIERS if tier == query.get("tier", tier)]
        if not tiers:
            raise bad_field("tier", query.get("tier"), f"one of {', '.join(TIERS)}")
        caller, tenant = _caller(request), query.get("tenant")
        owner = None if tenant is None and caller.is_operator else surface.callers.meant(caller, tenant).owner(None)
        async with tabling:  # one at a time is in memory before it is sent
            made = CacheTable([Listed(*part) for part in await _gathered(caches, tiers, owner)], surface.callers.names)
        return StreamingResponse(
            made.pieces(wanted), media_type=MEDIA_TYPES[wanted], headers={"X-Num-Rows": str(made.num_rows)}
        )


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _require_hints(request: Request) -> None:
    """Refuse a tenant that may not say what is to be kept."""
    caller = _caller(request)
    if not (caller.is_operator or caller.may_hint):
        raise not_allowed(None, "to say what is to be kept")


def _owner_to_clear(surface: Surface, request: Request, fields: ClearRequest) -> int | None:
    """Say whose blocks are to be cleared where no prompt says which; None: everybody's."""
    caller = _caller(request)
    meant = surface.callers.meant(caller, fields.tenant)
    if meant.name and fields.cache_salt is not None:
        raise bad_field("cache_salt", fields.cache_salt, "a prompt or messages with it: blocks of tenants know no more")
    is_somebodys = fields.tenant is not None or fields.cache_salt is not None
    if fields.everything == is_somebodys:
        wanted = "a prompt, messages, a tenant, a cache_salt, or everything: true"
        raise bad_field("everything", fields.everything, "it false where there is one" if is_somebodys else wanted)
    return None if fields.everything and caller.is_operator else meant.owner(fields.cache_salt)


async def _gathered(
    caches: Caches, tiers: Sequence[Tier], owner: int | None
) -> list[tuple[WorkerInfo, Tier, BlocksListed]]:
    parts: list[tuple[WorkerInfo, Tier, BlocksListed]] = []
    num_rows = 0
    async with aclosing(caches.listed(tiers, owner)) as listing:
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


def _lines(owners: Sequence[WorkerInfo], pieces: AsyncGenerator[Piece, None]) -> Response:
    """Tell how far a long work is, a line for each piece, and at last the whole."""

    async def lines() -> AsyncGenerator[bytes, None]:
        total = Sum(owners)
        done: Counter[tuple[str, Tier]] = Counter()
        damaged: Counter[tuple[str, Tier]] = Counter()
        async with aclosing(pieces):
            async for piece in pieces:
                total.add(piece)
                key = (piece.info.worker_id, piece.tier)
                done[key] += piece.done.num_done
                damaged[key] += piece.done.num_damaged
                line = WorkProgress(
                    worker_id=piece.info.worker_id,
                    tier=piece.tier,
                    blocks=done[key],
                    damaged=damaged[key],
                    held=max(piece.done.num_held, done[key]),
                )
                yield msgspec.json.encode(line) + b"\n"
        yield msgspec.json.encode(total.reply()) + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def wanted_prompt_of(surface: Surface, request: Request, fields: PromptFields) -> PromptTokens:
    """Tokenize the prompt that is meant. Raises RequestError also where there is none."""
    prompt = await _prompt_of(surface, request, fields)
    if prompt is None:
        raise RequestError("prompt: missing, want a prompt or messages", param="prompt", code="missing_required_field")
    return prompt


async def _prompt_of(surface: Surface, request: Request, fields: PromptFields) -> PromptTokens | None:
    """Tokenize the prompt that is meant as the endpoints do that answer it; None: there is none.

    Raises:
        RequestError: no model served here could answer it: it is too long, for example; or it is another tenant's.
    """
    surface.check_model(fields.model)
    if fields.prompt is None and fields.messages is None:
        return None
    if fields.prompt is not None and fields.messages is not None:
        raise RequestError("prompt: want either prompt or messages", param="prompt", code="invalid_value")
    salt = surface.callers.meant(_caller(request), fields.tenant).salt(fields.cache_salt)
    if fields.messages is not None:
        tools = template_tools(fields.tools) if fields.tools else None
        text = rendered(
            surface.tokenizer, fields.messages, fields, tools, takes_template=surface.limits.takes_chat_template
        )
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
    return prompts.packed(await prompts.encoded(surface, param, text, add_special_tokens=adds_special))


def _unique(tiers: Sequence[Tier]) -> list[Tier]:
    """Return the tiers in order, each once."""
    return [tier for tier in TIERS if tier in tiers]


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
