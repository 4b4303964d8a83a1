"""An ingress's side of the page on Ray's dashboard: questions lie in Ray's key-value store, answers come beside them.

    asked N    {"id", "path", "query"}, by the dashboard; whoever of the ingresses takes it away answers it
    told N     the id, the status, a line's end, and the body, which the dashboard takes away

The dashboard's process holds no key of kvray's, and whoever gets past its token commands the Ray cluster, and with it
every process of kvray: it is shown what an operator is. One look a second costs 0.4 ms; while somebody looks at the
page it is four a second.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, Final, Protocol

import msgspec
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.types import ASGIApp, Message

from cluster.openai.callers import NOBODY
from messages.errors import KvrayError

logger = logging.getLogger(__name__)

NAMESPACE: Final = b"kvray placement page"
#: What the page asks for; nothing else is answered.
_PATHS: Final = re.compile(r"/cache/data|/v1/route(/[^/]{1,256})?")
_IDLE_S: Final = 1.0  #: between two looks
_BUSY_S: Final = 0.25  #: the same while somebody looks at the page
_BUSY_FOR_S: Final = 10.0
_TIMEOUT_S: Final = 5.0


class KeyValues(Protocol):
    """Ray's internal key-value store; its calls block."""

    def list(self, prefix: bytes) -> list[bytes]:
        """Return the keys that begin so."""
        ...

    def take(self, key: bytes) -> bytes | None:
        """Take a value away and return it; None: somebody else did."""
        ...

    def put(self, key: bytes, value: bytes) -> None:
        """Put a value, over any that is there."""
        ...


class _Question(msgspec.Struct, frozen=True):
    id: str
    path: str
    query: str = ""


class LetterBoxes:
    """Answers what lies in them, from `start` to `stop`. One event loop."""

    def __init__(self, store: KeyValues, router: ASGIApp) -> None:
        """Look into `store`; `router` answers, which is that of the HTTP application, without its outer layers."""
        self._store = store
        self._router = AsyncExitStackMiddleware(router)  # which FastAPI's routes want around them
        self._task: asyncio.Task[None] | None = None
        self._busy_until_s = 0.0

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.get_running_loop().create_task(self._look())

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    async def look(self) -> int:
        """Answer all questions that are there; return how many.

        Raises:
            Exception: the store fails.
        """
        keys = await asyncio.to_thread(self._store.list, b"asked ")
        num_answered = 0
        for key in keys:
            value = await asyncio.to_thread(self._store.take, key)
            if value is None:
                continue
            answer = await self._answered(value)
            await asyncio.to_thread(self._store.put, b"told " + key.removeprefix(b"asked "), answer)
            num_answered += 1
        return num_answered

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        is_failing = False
        while True:
            try:
                if await self.look():
                    self._busy_until_s = loop.time() + _BUSY_FOR_S
                is_failing = False
            except Exception as error:  # noqa: BLE001 - Ray raises many kinds while its head is away
                if not is_failing:
                    logger.warning("the page on Ray's dashboard cannot be answered for now: %s", error)
                is_failing = True
            await asyncio.sleep(_BUSY_S if loop.time() < self._busy_until_s else _IDLE_S)

    async def _answered(self, value: bytes) -> bytes:
        try:
            question = msgspec.json.decode(value, type=_Question)
        except msgspec.DecodeError as error:
            return f"- 400\n{_error(f'question: {error}')}".encode()
        status, body = 404, _error("path: want /cache/data or /v1/route").encode()
        if _PATHS.fullmatch(question.path):
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    status, body = await _get(self._router, question.path, question.query)
            except TimeoutError:
                status, body = 504, _error(f"no answer within {_TIMEOUT_S:g} s").encode()
            except Exception:  # whoever asked is told, others go on being answered
                logger.exception("GET %s for Ray's dashboard failed", question.path)
                status, body = 500, _error("internal error").encode()
        return f"{question.id} {status}\n".encode() + body


async def _get(router: ASGIApp, path: str, query: str) -> tuple[int, bytes]:
    """Have the application answer an operator's GET; return status and body."""
    told: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        told.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [],
        "client": None,
        "server": None,
        "state": {"caller": NOBODY, "request_id": "dashboard"},
    }
    try:
        await router(scope, receive, send)
    except KvrayError as error:
        return error.status, _error(error.message).encode()
    status = next(message["status"] for message in told if message["type"] == "http.response.start")
    return status, b"".join(message.get("body", b"") for message in told)


def _error(message: str) -> str:
    return msgspec.json.encode({"error": {"message": message}}).decode()


class RayKeyValues:
    """The key-value store of the Ray cluster that this process belongs to."""

    def list(self, prefix: bytes) -> list[bytes]:
        """As KeyValues."""
        from ray.experimental.internal_kv import _internal_kv_list

        found: list[bytes] = _internal_kv_list(prefix, namespace=NAMESPACE)
        return found

    def take(self, key: bytes) -> bytes | None:
        """As KeyValues: of several who take it one deletes it."""
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

        value: bytes | None = _internal_kv_get(key, namespace=NAMESPACE)
        return value if value is not None and _internal_kv_del(key, namespace=NAMESPACE) else None

    def put(self, key: bytes, value: bytes) -> None:
        """As KeyValues."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)
