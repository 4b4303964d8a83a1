"""A module of Ray's dashboard: the placement page at /kvray, behind Ray's own token.

Ray's dashboard imports this under a name of its own, in a process that holds no key of kvray's: what is shown it asks
for by letter boxes in Ray's key-value store, which an ingress empties (cluster/ray_dashboard/letter_boxes.py). An error
while Ray imports its dashboard's modules ends `ray start --head`: here it ends with a line in the dashboard's log.
"""

from __future__ import annotations

import logging

try:
    import asyncio
    import json
    import secrets
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any, TypeVar

    from aiohttp import web
    from ray.dashboard import optional_utils
    from ray.dashboard.utils import DashboardHeadModule

    _Handler = TypeVar("_Handler")
    _ASSETS = Path(__file__).parents[2] / "placement_page" / "assets"
    _TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    _CONTENT = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in _ASSETS.iterdir()}
    _HEADERS = json.loads((Path(__file__).parents[2] / "placement_page" / "headers.json").read_text())
    _NAMESPACE = b"kvray placement page"
    _NUM_BOXES = 8  #: questions at a time; an answer that nobody fetched is overwritten by the next one's
    _TIMEOUT_S = 8.0
    _LOOK_S = 0.05

    def _get(path: str) -> Callable[[_Handler], _Handler]:
        """Have Ray's dashboard call a method for this path."""
        found: Callable[[_Handler], _Handler] = optional_utils.DashboardHeadRouteTable.get(path)
        return found

    class KvrayPlacementPage(DashboardHeadModule):  # type: ignore[misc]  # Ray is not typed
        """The page, its files, and what it asks for."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self._boxes: asyncio.Queue[int] | None = None

        @staticmethod
        def is_minimal_module() -> bool:
            """Say that it needs what the full dashboard needs."""
            return False

        async def run(self) -> None:
            """Do nothing: it answers when somebody looks."""

        @_get("/kvray")
        async def to_page(self, _request: web.Request) -> web.Response:
            """Send a browser to the page."""
            return web.Response(status=307, headers={"Location": "/kvray/cache"})

        @_get("/kvray/cache")
        async def page(self, _request: web.Request) -> web.Response:
            """Give the page."""
            return _file("index.html")

        @_get("/kvray/cache/data")
        async def data(self, _request: web.Request) -> web.Response:
            """Give what the page shows, as an operator sees it."""
            return await self._ask("/cache/data")

        @_get("/kvray/cache/{name}")
        async def file(self, request: web.Request) -> web.Response:
            """Give one of the page's files."""
            return _file(request.match_info["name"])

        @_get("/kvray/v1/route")
        async def requests(self, request: web.Request) -> web.Response:
            """List recent requests."""
            return await self._ask("/v1/route", request.query_string)

        @_get("/kvray/v1/route/{request_id}")
        async def explanation(self, request: web.Request) -> web.Response:
            """Explain a request."""
            return await self._ask(f"/v1/route/{request.match_info['request_id']}")

        async def _ask(self, path: str, query: str = "") -> web.Response:
            """Put a question into a free letter box, wait for the answer, and give it."""
            if self._boxes is None:
                self._boxes = asyncio.Queue()
                for number in range(_NUM_BOXES):
                    self._boxes.put_nowait(number)
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    box = await self._boxes.get()
                    try:
                        return await self._answer(box, {"id": secrets.token_hex(8), "path": path, "query": query})
                    finally:
                        self._boxes.put_nowait(box)
            except TimeoutError:
                return _json(
                    504, {"error": {"message": "no kvray on this Ray cluster answers: none serves, or it starts"}}
                )

        async def _answer(self, box: int, question: dict[str, str]) -> web.Response:
            asked, told = f"asked {box}".encode(), f"told {box}".encode()
            await self.gcs_client.async_internal_kv_put(
                asked, json.dumps(question).encode(), True, namespace=_NAMESPACE, timeout=_TIMEOUT_S
            )
            while True:
                await asyncio.sleep(_LOOK_S)
                value = await self.gcs_client.async_internal_kv_get(told, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
                if value is not None and value.startswith(question["id"].encode()):
                    status, _, body = value.partition(b"\n")
                    await self.gcs_client.async_internal_kv_del(told, False, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
                    return web.Response(
                        status=int(status.split()[1]),
                        body=body,
                        content_type="application/json",
                        headers={"Cache-Control": "no-store"},
                    )

    def _file(name: str) -> web.Response:
        if name not in _CONTENT:
            return _json(404, {"error": {"message": f"got {name[:100]}, want {', '.join(sorted(_CONTENT))}"}})
        body, media_type = _CONTENT[name]
        return web.Response(body=body, content_type=media_type, charset="utf-8", headers=_HEADERS)

    def _json(status: int, document: object) -> web.Response:
        return web.Response(status=status, text=json.dumps(document), content_type="application/json")

except Exception:
    logging.getLogger(__name__).exception("the placement page of kvray is not shown")
