"""/cache: the placement page and what it shows, behind the API key.

The page itself, its script and its style tell what every kvray does, and anybody may load them: a browser sends no key
with an address. The page asks for one, keeps it for the tab, and sends it along when it asks for /cache/data.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from cluster.dispatch import Dispatcher
from cluster.openai.callers import Caller
from cluster.openai.surface import Surface
from cluster.placement_page.document import Facts, PageDocument, page_document
from cluster.placement_page.previews import PromptPreviews
from messages.errors import CapacityError, WorkerError
from messages.view import AskView, ViewTold

ASSETS: Final = Path(__file__).parent / "assets"
#: What a browser may do with the page: nothing of another origin, nothing inline, in nobody's frame.
PAGE_HEADERS: Final[dict[str, str]] = msgspec.json.decode((Path(__file__).parent / "headers.json").read_bytes())
_VIEW_AGE_S: Final = 1.0
_FILES: Final = {
    "/cache": ("index.html", "text/html"),
    "/cache/app.css": ("app.css", "text/css"),
    **{f"/cache/{name}.js": (f"{name}.js", "text/javascript") for name in ("app", "parts", "explain")},
}


class PlacementPage:
    """Gathers what the page shows. One event loop."""

    def __init__(self, dispatcher: Dispatcher, surface: Surface, preview_chars: int) -> None:
        self._dispatcher = dispatcher
        self._surface = surface
        self._has_previews = preview_chars > 0
        self._previews = PromptPreviews(surface.tokenizer, preview_chars)
        if self._has_previews:
            dispatcher.note_with(self._previews.note)
        #: of the router, by tenant: being asked for, or told; and until when it is good
        self._views: dict[int | None, tuple[asyncio.Task[ViewTold | None], float]] = {}

    async def document(self, caller: Caller) -> PageDocument:
        """Return what `caller` may see; workers that do not answer within 2 s are without numbers."""
        told = await self._dispatcher.fleet_stats()
        view = await self._view(None if caller.is_operator else caller.owner(None))
        fleet = list(self._dispatcher.fleet.values())
        texts: dict[bytes, str] = {}
        if view is not None and view.prefixes and fleet:
            info = next((info for info in fleet if info.role == "decode"), fleet[0])
            texts = await self._previews.texts(view.prefixes, info.fingerprint, info.block_size)
        others = [one.values for stats in told for one in stats.ingresses]
        own = {**self._dispatcher.table.stats(), **self._surface.metrics.values()}
        facts = Facts(
            made_s=time.time(),
            model=self._surface.model.name,
            tenant=None if caller.is_operator else caller.name,
            tenant_names=self._surface.callers.names,
            has_previews=self._has_previews,
        )
        return page_document(facts, fleet, told, [own, *others], view, texts)

    async def _view(self, tenant: int | None) -> ViewTold | None:
        """Return what the router knows of the fleet, or of this tenant's prefixes; None: it does not answer.

        At most 1 s old: however many ask for one in that second, the router is asked once.
        """
        now_s = time.monotonic()
        self._views = {key: view for key, view in self._views.items() if now_s < view[1]}
        if tenant not in self._views:
            self._views[tenant] = (asyncio.create_task(self._ask_view(tenant)), now_s + _VIEW_AGE_S)
        return await asyncio.shield(self._views[tenant][0])  # one who asks may leave, the others wait on

    async def _ask_view(self, tenant: int | None) -> ViewTold | None:
        try:
            answer = await self._dispatcher.ask_router(AskView(query_id="", tenant=tenant))
        except (CapacityError, WorkerError):
            return None
        assert isinstance(answer, ViewTold)
        return answer


def add_placement_page(app: FastAPI, page: PlacementPage) -> None:
    """Add the page and its data."""
    for path, (name, media_type) in _FILES.items():
        app.add_api_route(path, _giving(ASSETS / name, media_type), include_in_schema=False)

    @app.get("/cache/data", include_in_schema=False)
    async def data(request: Request) -> Response:
        """Give what the page shows; of a tenant its own part."""
        document = await page.document(request.state.caller)
        return Response(
            msgspec.json.encode(document), media_type="application/json", headers={"Cache-Control": "no-store"}
        )


def _giving(path: Path, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = path.read_bytes()

    async def give() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return give
