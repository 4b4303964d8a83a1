"""The dispatcher with real decode workers and the real router, one event loop: what a lost worker does to an answer."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Sequence

import httpx
import pytest
import pytest_asyncio
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.openai.app import create_app
from cluster.openai.backend import ServedModel
from cluster.openai.metrics import HttpMetrics
from decode.worker import DecodeWorker
from kvcache.names import pack_tokens
from kvrouter.worker import RouterWorker
from messages.errors import WorkerError
from messages.fleet import Stats
from messages.request import GenerateRequest, SamplingParams
from messages.route import RouteRequest
from messages.stream import TokenBatch, TokenChunk
from tests.cluster.reading import chunks_of
from tests.models import EOS, VOCAB_SIZE
from tests.workers import CHANNEL, SECRET, engine_of, worker_options
from text.tokenizer import Tokenizer
from transport.secret import ClusterSecret

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("one_thread"),
]

NUM_WORKERS = 3

_numbers = itertools.count()


async def eventually(predicate: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if predicate():
                return
            await asyncio.sleep(0.01)


class Fleet:
    """Decode workers, a router, and a dispatcher whose channels to workers can be cut; a cluster.openai Backend."""

    def __init__(self, workers: list[DecodeWorker], router: RouterWorker, dispatcher: Dispatcher) -> None:
        self.workers = workers
        self.router = router
        self.dispatcher = dispatcher
        self.cancel, self.leave, self.ready = dispatcher.cancel, dispatcher.leave, dispatcher.ready
        self.metrics = dispatcher.metrics
        self.cuts_after: list[int] = []  #: chunks of the next request after which its worker is lost
        self.num_cuts = 0

    def start(self, requests: Sequence[GenerateRequest], take: Callable[[TokenChunk | None], None]) -> None:
        cuts_after, self.cuts_after = self.cuts_after, []
        numbers = itertools.count(1)

        def take_and_cut(chunk: TokenChunk | None) -> None:
            take(chunk)
            if chunk is not None and next(numbers) in cuts_after:
                asyncio.get_running_loop().call_soon(self.cut)

        self.dispatcher.start(requests, take_and_cut)

    def cut(self) -> None:
        """Lose every worker that something runs on."""
        for worker_id in set(self.dispatcher.table._num_sequences):
            self.num_cuts += 1
            self.dispatcher._workers[worker_id].client._lose("cut by the test")

    async def settle(self) -> None:
        """Nothing may be left anywhere, soon."""
        await eventually(
            lambda: (
                not any(engine_of(worker).pool.num_used for worker in self.workers)
                and not self.router.router.stats()["kvray_router_requests"]
            )
        )
        assert self.router.router.stats().get("kvray_router_forgotten_total", 0) == 0, "told, not only swept"
        assert len(self.dispatcher.table) == 0
        assert self.dispatcher._readers == {}
        self.dispatcher.table.check_invariants()
        self.router.router.check_invariants()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def started(model_dir):
    crashes: list[BaseException] = []
    options = worker_options(model_dir)
    workers = [
        DecodeWorker(f"decode-{number}", "127.0.0.1", options, SECRET, crashes.append) for number in range(NUM_WORKERS)
    ]
    infos = [await worker.start() for worker in workers]
    router = RouterWorker("router-1", SECRET, "127.0.0.1", CHANNEL)
    router.set_fleet(infos)
    dispatcher = Dispatcher(
        DispatchOptions(ingress_id="ingress-1", secret=SECRET, channel=CHANNEL, request_timeout_s=60.0, max_ttft_s=20.0)
    )
    dispatcher.set_workers("decode", infos)
    dispatcher.set_routers([router.address])
    yield Fleet(workers, router, dispatcher)
    dispatcher.close()
    router.close()
    for worker in workers:
        await worker.close()
    assert not crashes


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(started):
    started.cuts_after, started.num_cuts = [], 0
    await eventually(lambda: started.router.router.stats()["kvray_router_workers"] == NUM_WORKERS)
    yield started
    await started.settle()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 250) for _ in range(length)]


def asks(prompt: list[int], n: int = 1, **params: object) -> list[GenerateRequest]:
    """`n` choices, with a salt of their own: nothing is cached for them."""
    base = f"r{next(_numbers)}"
    values = {"max_tokens": 40, "temperature": 0.0, **params}
    return [
        GenerateRequest(
            request_id=f"{base}-{choice}",
            token_ids=pack_tokens(prompt),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(choice=choice, **values),
            salt=base.encode(),
        )
        for choice in range(n)
    ]


async def outputs(backend: Fleet, requests: list[GenerateRequest]) -> list[list[int]]:
    """The token ids of each choice, of which all must end well."""
    token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ended: list[str] = []
    async for chunk in chunks_of(backend, requests):
        assert chunk.error is None, chunk.error
        assert chunk.request_id not in ended
        token_ids[chunk.request_id] += chunk.token_ids
        if chunk.finish_reason is not None:
            ended.append(chunk.request_id)
    assert sorted(ended) == sorted(token_ids)
    return list(token_ids.values())


# --------------------------------------------------------------------------------------- exact, whatever is lost when


@pytest.mark.parametrize("cuts_after", [[1], [7], [3, 20]], ids=["at the first token", "later", "twice"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.8, "top_p": 0.8, "seed": 6},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"min_tokens": 30, "stop_token_ids": tuple(range(5, 250))},
        {"stop_token_ids": tuple(range(5, 25)), "temperature": 1.0, "seed": 7},
    ],
    ids=["greedy", "seeded", "top_p", "penalties", "min_tokens", "stop tokens"],
)
async def test_a_stream_that_moves_gives_the_tokens_of_plain_transformers(fleet, reference, params, cuts_after):
    prompt = prompt_of(100)
    fleet.cuts_after = cuts_after
    requests = asks(prompt, **params)
    (got,) = await outputs(fleet, requests)
    assert got == reference.generate(prompt, requests[0].params, got)
    assert 1 <= fleet.num_cuts <= len(cuts_after)


async def test_choices_that_have_not_ended_go_on_beside_those_that_have(fleet, reference):
    prompt = prompt_of(50, seed=1)
    params = {"temperature": 1.0, "seed": 3, "stop_token_ids": tuple(range(5, 30)), "max_tokens": 30}
    requests = asks(prompt, 5, **params)
    expected = [reference.generate(prompt, request.params) for request in requests]
    lengths = sorted(map(len, expected))
    assert lengths[0] + 2 < lengths[-1], "one ends early, so that the cut comes after its end"
    fleet.cuts_after = [5 * lengths[0] + 3]
    got = await outputs(fleet, requests)
    assert got == [reference.generate(prompt, r.params, like) for r, like in zip(requests, got, strict=True)]
    assert fleet.num_cuts == 1


async def test_many_requests_survive_the_loss_of_their_worker_and_all_of_them_are_exact(fleet, reference):
    prompts = [prompt_of(length, seed=length) for length in (1, 16, 17, 60, 129, 300)] * 2
    tasks = [asyncio.create_task(outputs(fleet, asks(prompt))) for prompt in prompts]
    await asyncio.sleep(0.15)
    fleet.cut()
    got = [choice for choices in await asyncio.gather(*tasks) for choice in choices]
    assert got == [reference.greedy(prompt, 40) for prompt in prompts]
    assert fleet.num_cuts > 0


async def test_who_leaves_at_a_chunk_is_ended_where_the_next_one_has_placed_it(fleet):
    dispatcher = fleet.dispatcher
    requests = asks(prompt_of(50), 2, max_tokens=400)
    first, second = (request.request_id for request in requests)
    dispatcher.start(requests, lambda chunk: dispatcher.leave(first))
    while first not in dispatcher.table._placed:  # noqa: ASYNC110  # before its first chunk
        await asyncio.sleep(0)
    assert first in dispatcher._readers, "nothing has come of it yet"
    worker_id = dispatcher.table._placed[first].request.worker_id
    failed = TokenChunk(request_id=second, finish_reason="error", error=WorkerError("broken").info())
    # A stop string that only the surface knows, and a choice that failed, in one step.
    dispatcher._on_worker_message(worker_id, TokenBatch(chunks=[TokenChunk(request_id=first, token_ids=[7]), failed]))
    await fleet.settle()


# -------------------------------------------------------------------------------------------- what else moves with it


@pytest_asyncio.fixture(loop_scope="module")
async def http(fleet, model_dir):
    tokenizer = Tokenizer.load(model_dir)
    eos = tokenizer.backend.token_to_id(EOS)
    model = ServedModel(
        names=("tiny",),
        max_model_len=1024,
        max_prompt_tokens=1000,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(eos,),
        created_s=1,
    )
    app = create_app(fleet, model, tokenizer, version="1")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://kvray", timeout=60) as client:
        yield client


def told(reply: dict) -> dict:
    """A reply without what is new in each: how a prompt was to be had says how long that took."""
    kept = {key: value for key, value in reply.items() if key not in ("id", "created", "kvray")}
    return kept | {"prompt_sources": reply["kvray"]["prompt_sources"]}


def near(value: object) -> object:
    """Equal to `value` but for the last digits of what was computed in another batch."""
    if isinstance(value, dict):
        return {key: near(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [near(entry) for entry in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


async def complete(client: httpx.AsyncClient, **fields: object) -> dict:
    body = {
        "prompt": "the quick brown fox",
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": f"s{next(_numbers)}",
        "return_token_ids": True,
        "return_prompt_sources": True,
        **fields,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("cut_after", [1, 6])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 4},
        {"logprobs": 3},
        {"prompt_logprobs": 2},
        {"echo": True, "logprobs": 2},
        {"min_tokens": 20, "ignore_eos": False, "temperature": 1.5, "seed": 1},
        {"structured_outputs": {"regex": "[0-9]{3}(-[0-9]{3}){8}"}, "ignore_eos": False},
        {"structured_outputs": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 12}}},
        {"repetition_penalty": 1.3, "logit_bias": {"70": 1.0}},
    ],
    ids=["plain", "n", "logprobs", "prompt_logprobs", "echo", "min_tokens", "regex", "json", "penalties"],
)
async def test_a_reply_is_the_same_whether_or_not_its_worker_was_lost(fleet, http, fields, cut_after):
    whole = await complete(http, **fields)
    fleet.cuts_after = [cut_after]
    moved = await complete(http, **fields)
    assert told(moved) == near(told(whole))
    assert moved["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in moved["choices"])
    assert fleet.num_cuts == 1


async def test_a_stop_string_that_began_before_the_move_ends_the_text_after_it(fleet, http):
    digits = {"structured_outputs": {"regex": "[0-9]{40}"}}
    text = (await complete(http, **digits))["choices"][0]["text"]
    stop = text[2:20]
    fleet.cuts_after = [text.index(stop) + 4]
    (choice,) = (await complete(http, **digits, stop=stop))["choices"]
    assert (choice["text"], choice["stop_reason"]) == (text[: text.index(stop)], stop)
    assert fleet.num_cuts == 1


async def test_a_streamed_chat_that_moves_says_what_a_whole_one_says(fleet, http):
    body = {"messages": [{"role": "user", "content": "lantern"}], "max_tokens": 40, "temperature": 0}
    whole = (await http.post("/v1/chat/completions", json=body)).json()
    fleet.cuts_after = [9]
    streamed = await http.post("/v1/chat/completions", json={**body, "stream": True})
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    (message,) = whole["choices"]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == message["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == message["finish_reason"]
    assert fleet.num_cuts == 1


# ------------------------------------------------------------------------------------------------------ nothing is left


@pytest.mark.parametrize("patience_s", [0.0, 0.0005, 0.002, 0.01, 0.05])
async def test_clients_that_leave_at_any_moment_leave_nothing_anywhere(fleet, patience_s):
    """`fleet` sees to it at the end."""
    tasks = [asyncio.create_task(outputs(fleet, asks(prompt_of(200), 2, max_tokens=500))) for _ in range(8)]
    await asyncio.sleep(patience_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_router_that_is_lost_is_done_without_and_found_again(fleet):
    (expected,) = await outputs(fleet, asks(prompt_of(60)))
    fleet.dispatcher._router.client._lose("cut by the test")
    await asyncio.sleep(0)
    assert await outputs(fleet, asks(prompt_of(60))) == [expected]
    await eventually(lambda: fleet.dispatcher._router is not None)
    assert await outputs(fleet, asks(prompt_of(60))) == [expected]


async def test_workers_and_the_router_are_asked_for_their_numbers(fleet):
    stats = await fleet.dispatcher.fleet_stats()
    assert sorted(one.worker_id for one in stats) == ["decode-0", "decode-1", "decode-2", "router-1"]


async def test_workers_are_asked_for_their_numbers_once_a_second_whoever_asks(fleet, http, monkeypatch):
    asked = []
    ask = fleet.dispatcher._ask_stats

    async def counting(connection: object) -> Stats:
        asked.append(connection)
        return await ask(connection)

    monkeypatch.setattr(fleet.dispatcher, "_ask_stats", counting)
    fleet.dispatcher._stats_end_s = 0.0  # `fleet` asks too
    one_who_leaves = asyncio.ensure_future(fleet.dispatcher.fleet_stats())
    await asyncio.sleep(0)
    pages = asyncio.gather(*(http.get("/metrics") for _ in range(10)))
    one_who_leaves.cancel()
    assert all("kvray_steps" in page.text for page in await pages)
    await fleet.dispatcher.fleet_stats()
    assert len(asked) == 4
    fleet.dispatcher._stats_end_s = 0.0  # a second later
    await fleet.dispatcher.fleet_stats()
    assert len(asked) == 8


async def test_the_metrics_page_has_every_workers_numbers_and_what_the_dispatcher_counts(fleet, http):
    fleet.cuts_after = [3]
    await complete(http)
    page = (await http.get("/metrics")).text
    found = {family.name: family for family in text_string_to_metric_families(page)}
    assert {sample.labels["worker"] for sample in found["kvray_steps"].samples} == {"decode-0", "decode-1", "decode-2"}
    assert found["kvray_requests_moved"].samples[0].value >= 1
    assert {sample.labels["by"] for sample in found["kvray_requests_placed"].samples} == {"router", "hashing"}
    assert "Not described" not in page


async def test_whichever_ingress_is_asked_all_of_them_are_on_the_page(fleet, http):
    (router_address,) = fleet.dispatcher._router_addresses
    count = HttpMetrics("ingress-2")
    count.generation_tokens.num_tokens += 7
    other = Dispatcher(dataclasses.replace(fleet.dispatcher._options, ingress_id="ingress-2"), count.values)
    other.set_routers([router_address])
    await complete(http)

    async def page() -> dict[str, Metric]:
        fleet.dispatcher._stats_end_s = 0.0
        text = (await http.get("/metrics")).text
        names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
        assert len(names) == len(set(names))
        return {family.name: family for family in text_string_to_metric_families(text)}

    async def page_with(*ingresses: str) -> dict[str, Metric]:
        async with asyncio.timeout(10):
            while True:
                found = await page()
                if {sample.labels["ingress"] for sample in found["kvray_requests_moved"].samples} == set(ingresses):
                    return found
                await asyncio.sleep(0.1)

    found = await page_with("ingress-1", "ingress-2")
    ingresses = {sample.labels.get("ingress") for sample in found["kvray_requests_placed"].samples}
    assert ingresses == {"ingress-1", "ingress-2"}
    tokens = {sample.labels.get("ingress", "own"): sample.value for sample in found["kvray_generation_tokens"].samples}
    assert tokens["ingress-2"] == 7.0
    latency = found["kvray_request_latency_seconds"]
    assert latency.type == "histogram"
    assert {sample.labels.get("ingress", "own") for sample in latency.samples} == {"own", "ingress-2"}
    other.close()
    await page_with("ingress-1")


async def test_an_ingress_that_tells_no_numbers_is_known_to_the_router_all_the_same(fleet):
    options = dataclasses.replace(fleet.dispatcher._options, ingress_id="silent", tells_stats=False)
    silent = Dispatcher(options, HttpMetrics("silent", is_counting=False).values)
    silent.set_routers(fleet.dispatcher._router_addresses)
    await eventually(lambda: "silent" in [told.worker_id for told in fleet.router._ingresses.values()])
    (told,) = (told for told in fleet.router._ingresses.values() if told.worker_id == "silent")
    assert told.values == {}
    assert silent._tell_timer is None
    silent.close()


async def test_clients_that_leave_within_milliseconds_leave_nothing_behind(fleet):
    """Cancelled while they are placed, between the router's answer and the first token, and after it."""
    rng = random.Random(5)
    prompts = [prompt_of(20, seed) for seed in range(8)]

    async def leave(delay_s: float, requests: list[GenerateRequest]) -> None:
        task = asyncio.create_task(outputs(fleet, requests))
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for _ in range(12):
        await asyncio.gather(*(leave(rng.uniform(0, 0.02), asks(rng.choice(prompts))) for _ in range(100)))
    await fleet.settle()


# --------------------------------------------------------------------------------------------------- more than enough


@pytest.mark.parametrize("has_router", [True, False])
async def test_who_would_wait_too_long_is_told_when_to_come_again_and_a_short_request_is_served(
    fleet, http, monkeypatch, has_router
):
    alone_s = fleet.router.router.explain(RouteRequest(request_id="r", names=b"", num_prompt_tokens=600, max_tokens=1))[
        0
    ].ttft_s
    router, table = fleet.router.router, fleet.dispatcher.table
    monkeypatch.setattr(router, "_config", dataclasses.replace(router._config, max_ttft_s=4 * alone_s))
    monkeypatch.setattr(table, "_limits", dataclasses.replace(table._limits, max_ttft_s=4 * alone_s))
    if not has_router:
        fleet.dispatcher.set_routers([])
        fleet.dispatcher._router.client._lose("cut by the test")
        await eventually(lambda: not table._has_router)

    async def ask(prompt: list[int]) -> httpx.Response:
        return await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2, "ignore_eos": True})

    asked = [asyncio.create_task(ask(prompt_of(600, seed=1000 + number))) for number in range(60)]
    await eventually(lambda: any(task.done() and task.result().status_code == 429 for task in asked))
    short = await ask(prompt_of(20, seed=2000))
    replies = await asyncio.gather(*asked)
    if not has_router:
        fleet.dispatcher.set_routers([fleet.router.address])
        await eventually(lambda: table._has_router)
    assert short.status_code == 200, short.text
    assert {reply.status_code for reply in replies} == {200, 429}
    refused = [reply for reply in replies if reply.status_code == 429]
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert {reply.json()["error"]["code"] for reply in refused} == {"overloaded"}
    assert len(replies) - len(refused) >= 3, "every worker has some"


async def test_who_leaves_while_it_takes_a_chunk_takes_nothing_more(fleet):
    requests = asks(prompt_of(20), n=3)
    taken: list[TokenChunk | None] = []

    def take(chunk: TokenChunk | None) -> None:
        taken.append(chunk)
        fleet.dispatcher.leave(requests[0].request_id)  # chunks of its other choices came with this one

    fleet.dispatcher.start(requests, take)
    await eventually(lambda: bool(taken))
    await fleet.settle()
    assert len(taken) == 1


async def test_a_choice_may_be_cancelled_while_a_chunk_of_it_is_taken(fleet):
    requests = asks(prompt_of(20), n=2)
    taken: list[TokenChunk] = []
    ended = asyncio.Event()

    def take(chunk: TokenChunk | None) -> None:
        if chunk is None:
            ended.set()
            return
        taken.append(chunk)
        fleet.dispatcher.cancel(requests[0].request_id)

    fleet.dispatcher.start(requests, take)
    await asyncio.wait_for(ended.wait(), 20)
    assert sum(len(chunk.token_ids) for chunk in taken if chunk.request_id == requests[1].request_id) == 40
    assert sum(len(chunk.token_ids) for chunk in taken if chunk.request_id == requests[0].request_id) <= 1


# ----------------------------------------------------------------------------------------------------- another secret


async def test_an_ingress_with_another_secret_tells_its_clients_so(fleet, caplog):
    stranger = Dispatcher(dataclasses.replace(fleet.dispatcher._options, secret=ClusterSecret.generate()))
    stranger.set_workers("decode", list(fleet.dispatcher.fleet.values()))
    stranger.set_routers([fleet.router.address])
    chunks = [chunk async for chunk in chunks_of(stranger, asks(prompt_of(10)))]
    stranger.close()
    assert chunks[-1].error is not None
    assert "it has another cluster secret (key id" in chunks[-1].error.message
    assert "router lost (it has another cluster secret" in caplog.text
    assert "worker decode-0 lost: it has another cluster secret" in caplog.text


async def test_options_show_no_secret(fleet):
    assert SECRET.hex() not in repr(fleet.dispatcher._options)
