"""The placement page in a real Chromium: what it shows, by keyboard, to a screen reader, in both colour schemes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster.openai.backend import ServedModel
from tests.browser import browser, watched
from tests.cluster.openai.cache_world import managed
from tests.cluster.placement_page.looking import busy
from tests.cluster.placement_page.told import explained_request, large_document
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


async def by_hand(seen, key: str = "a-key") -> None:
    """Come to the page with a key."""
    await seen.page.goto(f"{seen.origin}/cache")
    await enter(seen.page, key)
    await seen.page.get_by_text("Live").wait_for()


def told(page, pattern: str, document: object):
    """Have the browser be told this instead of asking the server."""
    return page.route(pattern, lambda route: route.fulfill(json=document))


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_request_opens_its_explanation_by_keyboard_alone(world, scheme):
    async with browser() as chromium, watched(chromium, str(world.http.base_url).rstrip("/"), scheme) as seen:
        page = seen.page
        request = explained_request()
        await told(page, "**/v1/route?limit=20", {"routes": [request]})
        await told(page, "**/v1/route/chat-1", request)
        await by_hand(seen)
        button = page.locator("#requests button")
        await button.wait_for()
        assert "299 evicted" in await page.inner_text("#requests")
        for _ in range(40):
            await page.keyboard.press("Tab")
            if await button.evaluate("one => one === document.activeElement"):
                break
        await page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        await dialog.get_by_text("decode-1 was cheapest").wait_for()
        text = await dialog.inner_text()
        for words in (
            "7 placements",
            "chosen: decode-1",
            "device 512, host 256",
            "last held by cache-1",
            "820 ms",
        ):
            assert words in text
        assert "handoff" not in text  # a part that is nought everywhere
        assert await seen.violations() == []
        assert not await seen.scrolls_sideways()
        await page.keyboard.press("Escape")
        assert await button.evaluate("one => one === document.activeElement")


@pytest.mark.long
async def test_a_tenant_is_shown_its_own_and_not_the_fleet(world):
    async with browser() as chromium, watched(chromium, str(world.http.base_url).rstrip("/")) as seen:
        await by_hand(seen, "acme-key")
        text = await seen.page.inner_text("main")
        assert "Yours in host" in text
        for others in ("Transfers", "Where the KV of prompts came from", "Predicted TTFT"):
            assert others not in text
        assert await seen.page.locator("#prefixes tr").count() == 1
        assert await seen.violations() == []
        await seen.page.get_by_role("button", name="Forget the key").click()
        await seen.page.get_by_role("heading", name="API key").wait_for()
        assert "decode-1" not in await seen.page.content()
        await enter(seen.page, "a-key")  # another's page comes in the place of the first one's
        await seen.page.get_by_role("heading", name="Transfers").wait_for()


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_two_hundred_workers_fit_the_screen_and_are_drawn_in_no_time(world, scheme):
    async with browser() as chromium, watched(chromium, str(world.http.base_url).rstrip("/"), scheme) as seen:
        page = seen.page
        await page.route("**/cache/data", lambda route: route.fulfill(json=large_document()))
        await page.goto(f"{seen.origin}/cache")
        await page.locator("#owners tr").nth(260).wait_for(state="attached")
        assert await page.locator("#owners tr").count() == 200 + 2 * 25 + 25
        drawn_ms = await page.evaluate(
            "async () => { const one = document.querySelector('#filter'); const began = performance.now();"
            " one.dispatchEvent(new Event('input')); document.body.offsetHeight; return performance.now() - began; }"
        )
        assert drawn_ms < 200
        assert not await seen.scrolls_sideways()
        table = page.locator("#owners").locator("xpath=ancestor::div[1]")
        assert await table.evaluate("one => one.scrollWidth <= one.clientWidth")
        await page.get_by_label("Only with").fill("cache-node-00000003")
        assert await page.locator("#owners tr").count() == 3
        assert await page.locator("#owners td.bad").count() == 0
        await page.get_by_label("Only with").fill("decode-00000009")
        assert "(behind)" in await page.inner_text("#owners")
        assert await seen.violations() == []


@pytest.mark.long
async def test_it_asks_only_while_somebody_sees_it_and_says_when_nobody_answers(world):
    async with browser() as chromium, watched(chromium, str(world.http.base_url).rstrip("/")) as seen:
        page = seen.page
        asked: list[str] = []
        page.on("request", lambda one: asked.append(one.url) if one.url.endswith("/cache/data") else None)
        await by_hand(seen)
        await page.evaluate(
            "() => { Object.defineProperty(document, 'visibilityState',"
            " {get: () => (window.isHidden ? 'hidden' : 'visible')}); window.isHidden = true; }"
        )
        await asyncio.sleep(2.5)  # one may be under way
        num_asked = len(asked)
        await asyncio.sleep(5)
        assert len(asked) == num_asked
        await page.evaluate("window.isHidden = false; document.dispatchEvent(new Event('visibilitychange'))")
        await asyncio.sleep(1)
        assert len(asked) > num_asked
        await page.route("**/cache/data", lambda route: route.abort())
        await page.get_by_role("status").get_by_text("it cannot be reached").wait_for()
        assert "decode-1" in await page.inner_text("#owners")  # what was seen last stays
        await page.unroute("**/cache/data")
        await page.get_by_role("status").get_by_text("Live").wait_for()
