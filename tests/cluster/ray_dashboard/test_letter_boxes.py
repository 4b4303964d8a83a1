import asyncio
import json
import logging

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from cluster.ray_dashboard.letter_boxes import LetterBoxes
from messages.errors import RequestError


class FakeStore:
    """Ray's key-value store as a dictionary. Can fail, and have another ingress be quicker."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.error: Exception | None = None
        self.is_late = False

    def list(self, prefix: bytes) -> list[bytes]:
        if self.error is not None:
            raise self.error
        return [key for key in self.values if key.startswith(prefix)]

    def take(self, key: bytes) -> bytes | None:
        return None if self.is_late else self.values.pop(key, None)

    def put(self, key: bytes, value: bytes) -> None:
        self.values[key] = value

    def ask(self, path: str, query: str = "", number: int = 0) -> None:
        self.values[f"asked {number}".encode()] = json.dumps({"id": "q1", "path": path, "query": query}).encode()

    def told(self, number: int = 0) -> tuple[str, dict]:
        head, _, body = self.values[f"told {number}".encode()].partition(b"\n")
        return head.decode(), json.loads(body)


async def data(request: Request) -> JSONResponse:
    caller = request.state.caller
    return JSONResponse({"is_operator": caller.is_operator, "limit": request.query_params.get("limit")})


async def explain(request: Request) -> JSONResponse:
    raise RequestError(f"request_id: got {request.path_params['request_id']}, want one that is kept", status=404)


async def stall(_: Request) -> JSONResponse:
    await asyncio.sleep(60)
    return JSONResponse({})


async def fail(_: Request) -> JSONResponse:
    raise AssertionError("a bug")


ROUTER = Starlette(
    routes=[
        Route("/cache/data", data),
        Route("/v1/route", data),
        Route("/v1/route/stalls", stall),
        Route("/v1/route/fails", fail),
        Route("/v1/route/{request_id}", explain),
        Route("/v1/cache/stats", data),
    ]
).router


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


async def test_a_question_is_answered_as_to_an_operator(store):
    store.ask("/v1/route", "limit=3")
    assert await LetterBoxes(store, ROUTER).look() == 1
    assert store.told() == ("q1 200", {"is_operator": True, "limit": "3"})
    assert await LetterBoxes(store, ROUTER).look() == 0


async def test_an_error_is_told_with_its_status(store):
    store.ask("/v1/route/r1")
    await LetterBoxes(store, ROUTER).look()
    head, body = store.told()
    assert head == "q1 404"
    assert body["error"]["message"] == "request_id: got r1, want one that is kept"


@pytest.mark.parametrize(
    "path", ["/v1/cache/stats", "/cache/data/", "/v1/route/a/b", "/metrics", "", "/v1/route/" + "x" * 257]
)
async def test_nothing_but_what_the_page_asks_for_is_answered(store, path):
    store.ask(path)
    await LetterBoxes(store, ROUTER).look()
    assert store.told()[0] == "q1 404"


async def test_what_is_no_question_is_answered_so(store):
    store.values[b"asked 3"] = b"{"
    await LetterBoxes(store, ROUTER).look()
    assert store.told(3)[0] == "- 400"


async def test_another_ingress_that_was_quicker_answers_alone(store):
    store.ask("/cache/data")
    store.is_late = True
    assert await LetterBoxes(store, ROUTER).look() == 0
    assert b"told 0" not in store.values


async def test_who_never_answers_is_given_up(store, monkeypatch):
    monkeypatch.setattr("cluster.ray_dashboard.letter_boxes._TIMEOUT_S", 0.05)
    store.ask("/v1/route/stalls")
    await LetterBoxes(store, ROUTER).look()
    assert store.told()[0] == "q1 504"


async def test_a_bug_is_told_as_one_and_ends_nothing(store, caplog):
    store.ask("/v1/route/fails", number=1)
    store.ask("/cache/data", number=2)
    assert await LetterBoxes(store, ROUTER).look() == 2
    assert store.told(1) == ("q1 500", {"error": {"message": "internal error"}})
    assert store.told(2)[0] == "q1 200"
    assert "a bug" in caplog.text


async def test_a_store_that_fails_is_complained_of_once_and_asked_again(store, monkeypatch, caplog):
    monkeypatch.setattr("cluster.ray_dashboard.letter_boxes._IDLE_S", 0.01)
    store.error = ConnectionError("the head is away")
    boxes = LetterBoxes(store, ROUTER)
    with caplog.at_level(logging.WARNING):
        boxes.start()
        await asyncio.sleep(0.2)
    assert [record.getMessage() for record in caplog.records] == [
        "the page on Ray's dashboard cannot be answered for now: the head is away"
    ]
    store.error = None
    store.ask("/cache/data")
    async with asyncio.timeout(5):
        while b"told 0" not in store.values:  # noqa: ASYNC110 - the store has no event
            await asyncio.sleep(0.01)
    boxes.stop()
