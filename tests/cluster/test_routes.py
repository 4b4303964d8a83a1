"""Explained routes over HTTP: two ingresses, a real router, prefill and decode worker on one event loop."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import httpx
import pytest
import pytest_asyncio

from cluster.caches import Caches, PromptTokens
from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.openai.app import create_app
from cluster.openai.backend import ServedModel
from cluster.openai.callers import NOBODY, Caller, Callers
from cluster.route_api import add_routes
from cluster.route_log import RouteLog
from cluster.routes import Routes
from decode.worker import DecodeWorker
from kvcache.names import pack_tokens, tenant_salt
from kvrouter.router import RouterConfig
from kvrouter.worker import RouterWorker
from messages.errors import CapacityError, RequestError
from messages.fleet import Stats
from prefill.worker import PrefillWorker
from tests.models import VOCAB_SIZE
from tests.workers import CHANNEL, SECRET, until, worker_options
from text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("one_thread"),
]

ACME = Caller(name="acme", base_salt=tenant_salt("acme", bytes(32)), is_operator=False)
GLOBEX = Caller(name="globex", base_salt=tenant_salt("globex", bytes(32)), is_operator=False)
MAX_KEPT = 50


class Ingress:
    """One ingress, and a client of it."""

    def __init__(self, name, model_dir, router, infos):
        self.log = RouteLog(MAX_KEPT, {})
        options = DispatchOptions(
            ingress_id=name, secret=SECRET, channel=CHANNEL, request_timeout_s=60.0, max_ttft_s=20.0
        )
        self.dispatcher = Dispatcher(options, log=self.log)
        for role in ("decode", "prefill"):
            self.dispatcher.set_workers(role, [info for info in infos if info.role == role])
        self.dispatcher.set_routers([router.address])
        model = ServedModel(
            names=("tiny",),
            max_model_len=512,
            max_prompt_tokens=511,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(VOCAB_SIZE - 1,),
            created_s=1,
        )
        app = create_app(
            self.dispatcher,
            model,
            Tokenizer.load(model_dir),
            version="1",
            callers=Callers([("a-key", NOBODY), ("acme-key", ACME), ("globex-key", GLOBEX)]),
            extend=lambda app, surface: add_routes(
                app, surface, Routes(self.dispatcher, self.log, surface.model.name, MAX_KEPT)
            ),
            on_reply_id=self.log.name_reply,
        )
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=30)

    async def post(self, path, key="a-key", **body):
        reply = await self.http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == 200, reply.text
        return reply

    async def get(self, path, key="a-key", status=200):
        reply = await self.http.get(path, headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == status, reply.text
        return reply.json()

    async def complete(self, prompt, key="a-key", **fields):
        """The reply, and what explains it."""
        reply = await self.post(
            "/v1/completions", key, prompt=prompt, max_tokens=4, return_prompt_sources=True, **fields
        )
        return reply.json(), await self.get(f"/v1/route/{reply.headers['x-request-id']}", key)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def two(model_dir):
    crashes: list[BaseException] = []
    options = worker_options(model_dir)
    workers = [
        PrefillWorker("prefill-1", "127.0.0.1", options, SECRET, crashes.append),
        DecodeWorker("decode-1", "127.0.0.1", options, SECRET, crashes.append),
    ]
    infos = [await worker.start() for worker in workers]
    router = RouterWorker(
        *("router-1", SECRET, "127.0.0.1", CHANNEL, RouterConfig(explained_requests=MAX_KEPT, is_observed=True))
    )
    router.set_fleet(infos)
    ingresses = [Ingress(name, model_dir, router, infos) for name in ("ingress-1", "ingress-2")]
    await until(lambda: len(router._ingresses) == 2 and router.router.stats()["kvray_router_workers"] == 2, 10.0)
    await until(lambda: not router.router.stats()["kvray_router_workers_out_of_step"], 10.0)
    yield ingresses
    for ingress in ingresses:
        await ingress.http.aclose()
        ingress.dispatcher.close()
    router.close()
    for worker in workers:
        await worker.close()
    assert not crashes


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 250) for _ in range(length)]


def tokens_by(runs, field):
    counts = Counter()
    for run in runs:
        counts[run[field]] += run["end"] - run["begin"]
    return dict(counts)


def agrees(reply, explained):
    """The explanation says what the reply does of where its prompt came from."""
    sources = reply["kvray"]["prompt_sources"]
    assert tokens_by(explained["runs"], "source") == {name: count for name, count in sources.items() if count}
    assert explained["num_cached_tokens"] == reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert [run["begin"] for run in explained["runs"]] == [0, *(run["end"] for run in explained["runs"][:-1])]
    assert explained["runs"][-1]["end"] == reply["usage"]["prompt_tokens"] == explained["num_prompt_tokens"]


async def test_a_prompt_that_nobody_had_and_then_the_worker_itself(two):
    first, _ = two
    prompt = prompt_of(100, seed=1)
    reply, explained = await first.complete(prompt)
    agrees(reply, explained)
    assert tokens_by(explained["runs"], "why") == {"never_seen": 96, "prompt_end": 4}
    assert explained["placed_by"] == "router"
    assert explained["state"] == "answered"
    assert explained["ttft_s"] > 0
    assert explained["predicted_ttft_s"] > 0
    await asyncio.sleep(0.2)
    reply, explained = await first.complete(prompt)
    agrees(reply, explained)
    assert explained["runs"][0] == {
        "begin": 0, "end": 96, "source": "device", "holder": "decode-1", "why": None, "missed_holder": None,
    }  # fmt: skip
    (chosen,) = [one for one in explained["predicted"]["candidates"] if one["is_chosen"]]
    assert chosen["matched_tokens"] == {"device": 96}
    assert sum(list(chosen["parts"].values())[:5]) == pytest.approx(chosen["ttft_s"])
    assert sum(chosen["parts"].values()) == pytest.approx(chosen["cost_s"])
    assert "decode-1 alone was chosen" in explained["sentences"][0]
    assert "96 were in the pool of the decode worker" in explained["sentences"][1]


async def test_blocks_that_were_dropped_are_told_as_evicted_and_counted(two):
    first, _ = two
    prompt = prompt_of(64, seed=2)
    await first.complete(prompt)
    await asyncio.sleep(1.2)  # the router writes down once a second what it heard
    before = first.log.stats()['kvray_prompt_misses_total{reason="evicted"}']
    caches = Caches(first.dispatcher)
    await caches.clear(("device",), PromptTokens(pack_tokens(prompt), b""), None, is_dry_run=False)
    await asyncio.sleep(0.2)
    reply, explained = await first.complete(prompt)
    agrees(reply, explained)
    assert tokens_by(explained["runs"], "why") == {"evicted": 48, "prompt_end": 16}
    assert first.log.stats()['kvray_prompt_misses_total{reason="evicted"}'] == before + 48


async def test_every_id_that_a_client_sees_is_found_at_either_ingress(two):
    first, second = two
    text = await first.post("/v1/completions", prompt=prompt_of(40, seed=3), max_tokens=2, request_id="my-own:id.1")
    chat = await first.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=2)
    response = await first.post("/v1/responses", input="Hello", max_output_tokens=16)
    for reply in (text, chat, response):
        for asked in (reply.json()["id"], reply.headers["x-request-id"]):
            for ingress in (first, second):
                found = await ingress.get(f"/v1/route/{asked}")
                assert found["request_id"] == reply.headers["x-request-id"]
                assert found["predicted"]["candidates"], "also what the router priced"
    assert text.headers["x-request-id"] == "my-own:id.1"


async def test_an_unknown_id_is_one_line_and_a_404(two):
    for ingress in two:
        error = (await ingress.get("/v1/route/nobody-knows-it", status=404))["error"]
        assert error["message"].startswith('request_id: got "nobody-knows-it", want one of the last 50')
        assert error["code"] == "not_found"


async def test_a_tenant_sees_its_own_requests_alone_and_operators_all(two):
    first, second = two
    prompt = prompt_of(40, seed=4)
    _, explained = await first.complete(prompt, key="acme-key", cache_salt="mine")
    path = f"/v1/route/{explained['request_id']}"
    for ingress in (first, second):
        assert (await ingress.get(path))["request_id"] == explained["request_id"]
        assert (await ingress.get(path, "acme-key"))["request_id"] == explained["request_id"]
        await ingress.get(path, "globex-key", status=404)
        listed = (await ingress.get("/v1/route?limit=100", "acme-key"))["routes"]
        assert [one["request_id"] for one in listed] == [explained["request_id"]]
        assert (await ingress.get("/v1/route?limit=100", "globex-key"))["routes"] == []
    assert (await first.http.get(path)).status_code == 401


async def test_the_newest_requests_of_all_ingresses_come_first(two):
    first, second = two
    ids = []
    for number, ingress in enumerate((first, second, first)):
        _, explained = await ingress.complete(prompt_of(20, seed=10 + number))
        ids.insert(0, explained["request_id"])
    for ingress in two:
        listed = (await ingress.get("/v1/route?limit=3"))["routes"]
        assert [one["request_id"] for one in listed] == ids
        assert all(one["runs"] and not one["predicted"]["candidates"] for one in listed)
    for limit in ("0", "1001", "x"):
        assert "limit: got" in (await first.get(f"/v1/route?limit={limit}", status=400))["error"]["message"]


async def test_a_prompt_is_explained_before_it_comes_and_nothing_is_reserved(two):
    first, _ = two
    prompt = prompt_of(100, seed=5)
    await first.complete(prompt[:64])
    await asyncio.sleep(0.2)
    explained = (await first.post("/v1/route", prompt=prompt)).json()
    assert explained["state"] == "predicted"
    assert explained["decode_worker"] == "decode-1"
    assert explained["predicted"]["num_possible"] == 2
    assert [(run["begin"], run["end"], run["source"], run["why"]) for run in explained["runs"]] == [
        (0, 64, "device", None),
        (64, 96, "computed", "never_seen"),
        (96, 100, "computed", "prompt_end"),
    ]
    assert len(first.dispatcher.table) == 0
    assert first.log.newest(1, None)[0].num_prompt_tokens == 64, "it is no request"
    reply = await first.http.post("/v1/route", json={"prompts": 1}, headers={"Authorization": "Bearer a-key"})
    assert reply.status_code == 400


async def test_without_a_router_the_own_requests_are_explained_without_reasons(two):
    first, _ = two
    router, address = first.dispatcher._router, first.dispatcher._router_addresses
    first.dispatcher._router_addresses = []
    router.client._lose("cut by the test")
    await until(lambda: first.dispatcher._router is None, 5.0)
    try:
        reply, explained = await first.complete(prompt_of(50, seed=6))
        agrees(reply, explained)
        assert explained["placed_by"] == "hashing"
        assert tokens_by(explained["runs"], "why") == {"not_known": 48, "prompt_end": 2}
        await first.get("/v1/route/nobody-knows-it", status=503)
    finally:
        first.dispatcher.set_routers(address)
        await until(lambda: first.dispatcher._router is not None, 5.0)


class Alone:
    """A dispatcher without workers, whose router hears no other ingress."""

    fleet: dict = {}  # noqa: RUF012

    def answer_records_with(self, _answer):
        pass

    async def router_stats(self):
        return Stats(query_id="", worker_id="r", role="router", values={})


@pytest.mark.parametrize(
    ("log", "max_kept", "wanted"),
    [(None, 0, "observability.level: on"), (RouteLog(0, {}), 0, "observability.explained_requests above 0")],
)
async def test_where_nothing_is_kept_the_refusal_names_the_setting(log, max_kept, wanted):
    routes = Routes(Alone(), log, "tiny", max_kept)
    with pytest.raises(RequestError, match=wanted):
        await routes.find(NOBODY, "x")
    assert await routes.newest(NOBODY, 10) == []
    with pytest.raises(CapacityError, match="no decode worker is there"):
        await routes.predict(PromptTokens(b"", b""), 1)
