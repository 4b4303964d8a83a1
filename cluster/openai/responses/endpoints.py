"""Adds /v1/responses to the application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from cluster.openai import chat
from cluster.openai.body import BodyDecoder, read_body
from cluster.openai.callers import Caller
from cluster.openai.docs_schema import answers, body_of
from cluster.openai.errors import bad_field
from cluster.openai.hints import HEADER, with_header
from cluster.openai.responses.answer import ResponseAnswer
from cluster.openai.responses.items import is_reference
from cluster.openai.responses.kept import KeptResponses, id_of, item_id
from cluster.openai.responses.protocol import InputItem, InputPart, ResponsesRequest
from cluster.openai.responses.replies import DeletedReply, ItemList, ResponseCreated, ResponseReply
from cluster.openai.responses.store import StoredResponse
from cluster.openai.responses.translation import chat_request, check_served, in_our_names, input_items
from cluster.openai.surface import Surface
from cluster.openai.unserved import NOT_OF_RESPONSES
from messages.errors import RequestError

_PREFIXES: Final = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
#: types that the documentation refers to
DOCUMENTED: Final = (ResponsesRequest, ResponseReply, ResponseCreated, DeletedReply, ItemList)
_MAX_PAGE: Final = 100
_PAGE: Final = 20

_encode = msgspec.json.Encoder().encode


def add_responses(
    app: FastAPI, surface: Surface, kept: KeptResponses
) -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """Add the endpoints; return those that generate, by path."""
    decoder = BodyDecoder(ResponsesRequest, NOT_OF_RESPONSES)

    @app.post(
        "/v1/responses", openapi_extra=body_of(ResponsesRequest), responses=answers(ResponseReply, ResponseCreated)
    )
    async def create_response(request: Request) -> Response:
        """Generate the assistant's next turn, and keep it for a request that goes on from it."""
        fields = decoder.decode(await read_body(request, surface.limits.max_body_bytes))
        return await (await _start(surface, kept, request, fields)).respond(request)

    @app.get("/v1/responses/{response_id}", responses=answers(ResponseReply))
    async def response(request: Request, response_id: str) -> Response:
        """Return a response that is kept."""
        if request.query_params.get("stream", "false") != "false":
            raise bad_field("stream", request.query_params["stream"], "false: a response is streamed once")
        stored = await kept.find("response_id", _owner(surface, request), response_id)
        return Response(stored.reply, media_type="application/json")

    @app.delete("/v1/responses/{response_id}", responses=answers(DeletedReply))
    async def delete_response(request: Request, response_id: str) -> Response:
        """Forget a response; those that went on from it stay."""
        await kept.drop(_owner(surface, request), response_id)
        return Response(_encode(DeletedReply(response_id)), media_type="application/json")

    @app.get("/v1/responses/{response_id}/input_items", responses=answers(ItemList))
    async def list_input_items(request: Request, response_id: str) -> Response:
        """List the items that a response was given, those of responses before it included."""
        stored = await kept.find("response_id", _owner(surface, request), response_id)
        page = _page(stored.given(), request)
        return Response(_encode(page), media_type="application/json")

    return {"/v1/responses": create_response}


def _owner(surface: Surface, request: Request) -> str:
    return surface.callers.owner(request.state.caller, request.headers.get("authorization", ""))


async def _start(surface: Surface, kept: KeptResponses, request: Request, fields: ResponsesRequest) -> ResponseAnswer:
    """Check, render and tokenize a request; nothing runs yet.

    Raises:
        RequestError: a field cannot be served; names it.
    """
    caller: Caller = request.state.caller
    owner = _owner(surface, request)
    check_served(fields, surface.limits)
    previous = None
    if fields.previous_response_id is not None:
        previous = await kept.find("previous_response_id", owner, fields.previous_response_id)
    before = [] if previous is None else previous.conversation()
    own = await _looked_up(kept, owner, before, input_items(fields))
    chat_fields, places = chat_request(fields, before, own)
    if fields.request_id is not None:
        request.state.request_id = fields.request_id
    try:
        chat_fields = with_header(chat_fields, request.headers.get(HEADER))
        begun = await chat.begin(surface, caller, chat_fields, request.state.request_id)
    except RequestError as error:
        raise in_our_names(error, places) from None
    key = kept.new_key()
    surface.on_reply_id(begun.generation.requests[0].request_id, id_of(key))

    def keep(reply: bytes) -> None:
        if fields.store is not False:
            items = _encode([_listed(item, key, number) for number, item in enumerate(own)])
            kept.keep(owner, id_of(key), StoredResponse(reply, items, previous))

    return ResponseAnswer(surface, fields, key, begun, len(own), keep)


async def _looked_up(
    kept: KeptResponses, owner: str, before: Sequence[InputItem], own: Sequence[InputItem]
) -> list[InputItem]:
    """Return a request's input with the items that it only names.

    Raises:
        RequestError: one is not there, or not any more (404); names its place.
    """
    known = {item.id: item for item in before}
    result: list[InputItem] = []
    for index, item in enumerate(own):
        if not is_reference(item):
            result.append(item)
            continue
        param = f"input[{index}].id"
        if item.id is None:
            raise RequestError(f"{param}: missing, want an item's id", param=param, code="missing_required_field")
        if item.id not in known:
            stored = await kept.find_of_item(param, owner, item.id)
            known |= {each.id: each for each in stored.conversation()}
        found = known.get(item.id)
        if found is None:
            raise bad_field(param, item.id, "the id of an item of a response that is kept")
        result.append(found)
    return result


def _listed(item: InputItem, key: str, number: int) -> InputItem:
    """Write an item as it is listed: with a type and an id, content as parts."""
    kind = item.type or "message"
    content = item.content
    if isinstance(content, str) and item.role == "assistant":
        content = [InputPart("output_text", content, annotations=[])]
    elif isinstance(content, str):
        content = [InputPart("input_text", content)]
    return msgspec.structs.replace(
        item,
        type=kind,
        id=item.id or item_id(_PREFIXES[kind], key, number),
        status=item.status or ("completed" if kind != "reasoning" else None),
        content=content,
    )


def _page(items: list[InputItem], request: Request) -> ItemList:
    """Return the items that a request's `order`, `after` and `limit` ask for.

    Raises:
        RequestError: one of them is none.
    """
    query = request.query_params
    order, after, limit = query.get("order", "desc"), query.get("after"), query.get("limit", str(_PAGE))
    if order not in ("asc", "desc"):
        raise bad_field("order", order, "asc or desc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= _MAX_PAGE):
        raise bad_field("limit", limit, f"1 to {_MAX_PAGE}")
    if order == "desc":
        items = items[::-1]
    if after is not None:
        place = next((index for index, item in enumerate(items) if item.id == after), None)
        if place is None:
            raise bad_field("after", after, "the id of one of the items")
        items = items[place + 1 :]
    page = items[: int(limit)]
    return ItemList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(items) > len(page),
    )
