"""A real Chromium, headless, and what every page of ours has to keep in it.

Wants Debian's chromium, playwright from PyPI, and axe-core from npm: `make browser` gets them. Tests skip without.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
AXE = ROOT / "build" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
LAPTOP = {"width": 1366, "height": 768}
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Any]:
    """Chromium, as playwright drives it; skips where either is missing."""
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not there: make browser")
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("chromium is not there: make browser")
    async with playwright.async_playwright() as driver:
        chromium = await driver.chromium.launch(executable_path=found, args=_ARGUMENTS)
        try:
            yield chromium
        finally:
            await chromium.close()


class Watched:
    """A page, and what went wrong on it."""

    def __init__(self, page: Any, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.complaints: list[str] = []  #: of the console; failed loads that are asked for are told here, too
        self.foreign: list[str] = []  #: addresses of others that it asked for
        page.on("console", lambda one: self.complaints.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda one: None if one.url.startswith((origin, "data:")) else self.foreign.append(one.url))

    async def violations(self) -> list[str]:
        """What axe finds against WCAG 2.2 AA; skips where axe is missing."""
        if not AXE.exists():
            pytest.skip("axe-core is not there: make browser")
        await self.page.evaluate(AXE.read_text())
        rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
        found = await self.page.evaluate("rules => axe.run(document, {runOnly: rules})", rules)
        return [
            f"{one['id']}: {one['nodes'][0]['html']} {one['nodes'][0]['failureSummary']}" for one in found["violations"]
        ]

    async def scrolls_sideways(self) -> bool:
        return await self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


@contextlib.asynccontextmanager
async def watched(chromium: Any, origin: str, scheme: str = "light", **options: Any) -> AsyncIterator[Watched]:
    """A page in a context of its own, as on a laptop."""
    context = await chromium.new_context(viewport=LAPTOP, color_scheme=scheme, **options)
    try:
        yield Watched(await context.new_page(), origin)
    finally:
        await context.close()
