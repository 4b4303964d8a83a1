"""What the placement page's data say, over real HTTP, channels, router and node cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from cluster.openai.backend import ServedModel
from cluster.ray_dashboard.letter_boxes import LetterBoxes
from kvcache.names import pack_tokens
from messages.request import GenerateRequest, SamplingParams
from tests.cluster.openai.cache_world import ACME, BLOCK_BYTES, PROMPT, bearer, managed, names_of
from tests.cluster.placement_page.looking import busy
from tests.cluster.ray_dashboard.test_letter_boxes import FakeStore
from text.tokenizer import Tokenizer

FILES = ("/cache", "/cache/app.js", "/cache/parts.js", "/cache/explain.js", "/cache/app.css")


@pytest.fixture
async def world(tmp_path, tokenizer: Tokenizer, served_model: Callable[..., ServedModel]):
    async with managed(tmp_path, tokenizer, served_model(tokenizer), preview_chars=40) as made:
        await busy(made)
        yield made


async def page_data(world, key: str = "a-key") -> dict:
    reply = await world.http.get("/cache/data", headers=bearer(key))
    assert reply.status_code == 200, reply.text
    assert reply.headers["cache-control"] == "no-store"
    return reply.json()


@pytest.mark.slow
async def test_what_the_router_believes_is_what_owners_hold(world):
    async with asyncio.timeout(10):  # a node cache tells its numbers every second
        while True:
            data = await page_data(world)
            worker, cache = data["owners"]
            if cache["tiers"]["disk"]["blocks"] == 12:
                break
            await asyncio.sleep(0.1)
    assert worker["tiers"]["device"]["known_blocks"] == 3
    assert worker["tiers"]["device"]["hits"] == 12
    assert worker["tiers"]["device"]["capacity_bytes"] == 100 * BLOCK_BYTES
    for tier in ("host", "disk"):
        assert cache["tiers"][tier]["known_blocks"] == cache["tiers"][tier]["blocks"] == 12
    assert cache["tenants"]["acme"]["host"] == {"bytes": 6 * BLOCK_BYTES, "quota_bytes": 8 * BLOCK_BYTES}
    assert (worker["is_answering"], worker["is_in_step"], worker["node"]) == (True, True, "node-1")
    assert data["has_router"] is True
    assert data["tenant"] == ""
    assert set(data["prompt_tokens"]) == {"device", "host", "peer", "disk", "remote", "computed"}


async def test_the_hottest_prefix_is_told_with_who_holds_it(world):
    first, second = (await page_data(world))["prefixes"]
    assert (first["name"], first["num_tokens"]) == (names_of(PROMPT)[5].hex(), 96)
    assert first["num_requests"] == pytest.approx(3, rel=0.01)
    assert (first["last_request"], first["tenant"], second["tenant"]) == ("chat-2", "", "acme")
    assert [(run["begin"], run["end"]) for run in first["runs"]] == [(0, 48), (48, 96)]
    assert {tier for _, tier in first["runs"][0]["holders"]} == {"device", "host", "disk"}


async def test_a_tenant_sees_its_own_part_alone(world):
    data = await page_data(world, "acme-key")
    assert data["tenant"] == "acme"
    assert [prefix["last_request"] for prefix in data["prefixes"]] == ["acme-1"]
    assert [(owner["role"], owner.get("tiers"), list(owner["tenants"])) for owner in data["owners"]] == [
        ("decode", None, ["acme"]),
        ("cache", None, ["acme"]),
    ]
    assert (data["prompt_tokens"], data["counts"], data["placed"], data["ttft_count"]) == ({}, {}, {}, 0)
    data = await page_data(world, "globex-key")
    assert data["prefixes"] == []
    for owner in data["owners"]:
        assert {one["bytes"] for one in owner["tenants"].pop("globex").values()} == {0}
        assert owner["tenants"] == {}


async def test_data_want_a_key_and_the_page_itself_does_not(world):
    async with httpx.AsyncClient(base_url=str(world.http.base_url), verify=False) as stranger:
        reply = await stranger.get("/cache/data")
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in FILES:
            reply = await stranger.get(path)
            assert reply.status_code == 200, path
            assert "'unsafe" not in reply.headers["content-security-policy"]
            assert reply.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
            assert reply.headers["x-content-type-options"] == "nosniff"
            for told in ("decode-1", "acme", "a-key"):
                assert told not in reply.text


def test_no_file_of_the_page_names_another_origin(served_model):
    from cluster.placement_page.endpoints import ASSETS

    for path in ASSETS.iterdir():
        text = path.read_text()
        assert "http:" not in text, path
        assert "https:" not in text, path
        assert "style=" not in text, path  # which the policy forbids
        assert "innerHTML" not in text, path


async def test_text_is_shown_to_whose_it_is_where_an_ingress_saw_it(world):
    for salt, request_id in ((b"", "chat-9"), (ACME.salt(None), "acme-9")):
        request = GenerateRequest(
            request_id=request_id,
            token_ids=pack_tokens(PROMPT),
            num_prompt_tokens=len(PROMPT),
            params=SamplingParams(max_tokens=1),
            salt=salt,
        )
        world.dispatcher.start([request], lambda _: None)
        world.dispatcher.leave(request_id)
    data = await page_data(world)
    assert data["has_previews"] is True
    assert all(" … " in prefix["text"] for prefix in data["prefixes"])
    assert all(len(prefix["text"]) == 43 for prefix in data["prefixes"])
    own = await page_data(world, "acme-key")
    assert [prefix["text"] is None for prefix in own["prefixes"]] == [False]


async def test_without_a_router_the_rest_is_shown_and_said_to_be_so(world):
    world.dispatcher.set_routers([])
    world.router.close()
    async with asyncio.timeout(10):
        while (data := await page_data(world))["has_router"]:
            pass
    assert data["prefixes"] == []
    assert data["owners"][0]["worker_id"] == "decode-1"
    assert "running" not in data["owners"][0]


async def test_rays_dashboard_is_answered_as_an_operator_is(world):
    store = FakeStore()
    store.ask("/cache/data")
    store.ask("/v1/route/r1", number=1)
    assert await LetterBoxes(store, world.app.router).look() == 2
    head, document = store.told()
    assert head == "q1 200"
    assert {**document, "made_s": 0} == {**await page_data(world), "made_s": 0}
    assert store.values[b"told 1"].startswith(b"q1 404\n")


@pytest.mark.slow
async def test_however_many_look_the_router_is_asked_once_a_second(world):
    num_asked = 0
    router = world.router.router
    view = router.view

    def counting(question, now_s):
        nonlocal num_asked
        num_asked += 1
        return view(question, now_s)

    router.view = counting
    await asyncio.gather(*(page_data(world, key) for key in ("a-key", "acme-key") * 10))
    assert num_asked == 2  # one for each who may see another part
    await asyncio.sleep(1.1)
    await page_data(world)
    assert num_asked == 3
