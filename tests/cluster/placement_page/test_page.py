"""The placement page in a real Chromium: what it shows, by keyboard, to a screen reader, in both colour schemes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.openai.backend import ServedModel
from tests.browser import browser, watched
from tests.cluster.openai.cache_world import managed
from tests.cluster.placement_page.looking import busy
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
async def world(tmp_path, tokenizer: Tokenizer, served_model: Callable[..., ServedModel]):
    async with managed(tmp_path, tokenizer, served_model(tokenizer), preview_chars=60) as made:
        await busy(made)
        yield made


async def enter(page, key: str) -> None:
    await page.get_by_label("Key").fill(key)
    await page.keyboard.press("Enter")


async def test_who_has_a_key_sees_where_the_cache_lies(world, tmp_path):
    origin = str(world.http.base_url).rstrip("/")
    async with browser() as chromium, watched(chromium, origin) as seen:
        page = seen.page
        await page.goto(f"{origin}/cache")
        await page.get_by_role("heading", name="API key").wait_for()
        await enter(page, "wrong")
        await page.get_by_text("does not know this key").wait_for()
        await enter(page, "a-key")
        await page.get_by_role("rowheader", name="decode-1").first.wait_for()
        await page.get_by_text("Live").wait_for()
        assert await page.get_by_role("status").inner_text() == "Live, every 2 s"
        assert "does not know" not in await page.inner_text("main")
        text = await page.inner_text("#owners")
        assert "Node node-1" in text
        hottest = page.locator("#prefixes tr").first
        assert (await hottest.locator("td").nth(1).inner_text()) == "96"
        assert "decode-1 (device)" in await page.inner_text("#prefixes")
        await hottest.get_by_role("button").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_text("chat-2").wait_for()
        await dialog.get_by_text("It is not kept").wait_for()
        await page.keyboard.press("Escape")
        await page.locator("#requests-note", has_text="This server keeps no explanations").wait_for()
        assert not await seen.scrolls_sideways()
        assert await page.locator("#owners").evaluate(
            "e => e.closest('.scroll').scrollWidth <= e.closest('.scroll').clientWidth"
        )
        assert await seen.violations() == []
        assert seen.foreign == []
        # What was asked for on purpose: with a wrong key and none, and explanations that are not kept.
        assert [one for one in seen.complaints if "401" not in one and "404" not in one] == []
