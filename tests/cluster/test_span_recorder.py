"""Requests over HTTP through real workers and the real router, and the spans that are told of them."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import pytest_asyncio

from cluster.dispatch import Dispatcher, DispatchOptions
from cluster.openai.app import create_app
from cluster.openai.backend import ServedModel
from cluster.span_recorder import SpanEdge, SpanRecorder
from cluster.spans import RequestSpans
from decode.worker import DecodeWorker
from kvrouter.worker import RouterWorker
from prefill.worker import PrefillWorker
from tests.models import EOS, VOCAB_SIZE
from tests.workers import CHANNEL, SECRET, worker_options
from text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("one_thread"),
]

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROMPT = list(range(5, 205))


class Served:
    """A client, what the ingress told of its requests, and the workers."""

    def __init__(self, client: httpx.AsyncClient, told: list[RequestSpans], recorder: SpanRecorder) -> None:
        self.client = client
        self.told = told
        self.recorder = recorder

    async def complete(self, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        self.told.clear()
        body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
        return await self.client.post("/v1/completions", json=body, headers=headers)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(model_dir):
    crashes: list[BaseException] = []
    options = worker_options(model_dir)
    decode = DecodeWorker("decode-1", "127.0.0.1", options, SECRET, crashes.append)
    prefill = PrefillWorker("prefill-1", "127.0.0.1", options, SECRET, crashes.append)
    infos = [await decode.start(), await prefill.start()]
    router = RouterWorker("router-1", SECRET, "127.0.0.1", CHANNEL)
    router.set_fleet(infos)
    told: list[RequestSpans] = []
    recorder = SpanRecorder(told.append)
    dispatcher = Dispatcher(
        DispatchOptions(ingress_id="i", secret=SECRET, channel=CHANNEL, request_timeout_s=60.0, max_ttft_s=20.0),
        spans=recorder,
    )
    dispatcher.set_workers("decode", infos[:1])
    dispatcher.set_workers("prefill", infos[1:])
    dispatcher.set_routers([router.address])
    async with asyncio.timeout(10):
        while True:
            if router.router.stats()["kvray_router_workers"] == 2:
                break
            await asyncio.sleep(0.01)
    tokenizer = Tokenizer.load(model_dir)
    eos = tokenizer.backend.token_to_id(EOS)
    model = ServedModel(
        names=("m",),
        max_model_len=infos[0].max_model_len,
        max_prompt_tokens=infos[0].max_model_len - 1,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(eos,),
        created_s=1,
    )
    app = create_app(dispatcher, model, tokenizer, version="1")
    app.add_middleware(SpanEdge, recorder=recorder)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kvray", timeout=60) as client:
        yield Served(client, told, recorder)
    dispatcher.close()
    router.close()
    await decode.close()
    await prefill.close()
    assert not crashes


async def test_an_answer_has_a_span_for_each_stage_that_lie_within_it_in_order(served):
    response = await served.complete(headers={"traceparent": PARENT, "x-request-id": "mine"})
    assert response.status_code == 200, response.text
    [told] = served.told
    assert told.context is not None
    assert told.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert told.whole.attributes["kvray.request_id"] == "mine"
    assert told.whole.attributes["http.response.status_code"] == 200
    assert told.whole.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert told.whole.attributes["gen_ai.usage.output_tokens"] == 4
    names = [stage.name for stage in told.stages]
    assert [name for name in names if name != "load"] == ["route", "queue", "prefill", "decode"]
    for stage in told.stages:
        assert told.whole.begin_s <= stage.begin_s <= stage.end_s <= told.whole.end_s
    by_name = {stage.name: stage for stage in told.stages}
    assert by_name["route"].attributes["kvray.placed_by"] == "router"
    assert by_name["prefill"].attributes["kvray.computed_blocks"] == -(-len(PROMPT) // 16)
    assert by_name["route"].end_s == by_name["queue"].begin_s
    assert by_name["queue"].end_s <= by_name["prefill"].begin_s
    assert by_name["prefill"].end_s == by_name["decode"].begin_s
    assert not [stage.error for stage in told.stages if stage.error]


async def test_what_is_held_is_counted_where_it_lay_and_hardly_computed(served):
    prompt = list(range(30, 230))
    await served.complete(prompt=prompt)
    await served.complete(prompt=prompt)
    [told] = served.told
    by_name = {stage.name: stage for stage in told.stages}
    held = by_name["queue"].attributes["kvray.device_blocks"]
    loaded = by_name["load"].attributes["kvray.peer_blocks"] if "load" in by_name else 0
    assert held + loaded == len(prompt) // 16
    assert by_name["prefill"].attributes["kvray.computed_blocks"] == 1


async def test_a_stream_ends_its_span_with_its_last_byte_and_choices_have_their_own(served):
    response = await served.complete(stream=True, n=2)
    assert response.text.endswith("data: [DONE]\n\n")
    [told] = served.told
    assert told.whole.attributes["kvray.sequences"] == 2
    assert [stage.name for stage in told.stages].count("decode") == 2
    assert told.whole.attributes["gen_ai.usage.output_tokens"] == 8


async def test_an_answer_that_a_stop_string_ends_is_no_error(served):
    text = (await served.complete()).json()["choices"][0]["text"]
    response = await served.complete(stop=[text[:1]], max_tokens=40)
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    [told] = served.told
    assert (told.whole.error, [stage.error for stage in told.stages if stage.error]) == ("", [])
    assert (told.stages[-1].name, told.stages[-1].attributes["kvray.finish_reason"]) == ("decode", "left")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
    ],
)
async def test_chats_and_responses_are_followed_likewise(served, path, fields):
    served.told.clear()
    response = await served.client.post(path, json={**fields, "temperature": 0})
    assert response.status_code == 200, response.text
    [told] = served.told
    assert told.whole.name == f"POST {path}"
    assert {"route", "queue", "decode"} <= {stage.name for stage in told.stages}


async def test_what_is_refused_before_it_runs_has_its_own_span_alone(served):
    response = await served.complete(max_tokens=-1)
    assert response.status_code == 400
    [told] = served.told
    assert (told.whole.attributes["http.response.status_code"], told.whole.error, told.stages) == (400, "", ())


async def test_a_trace_that_is_not_sampled_and_what_generates_nothing_are_not_followed(served):
    assert (await served.complete(headers={"traceparent": f"{PARENT[:-2]}00"})).status_code == 200
    assert (await served.client.get("/v1/models")).status_code == 200
    assert served.told == []


async def test_nothing_is_kept_of_requests_that_have_ended(served):
    await served.complete()
    assert len(served.recorder._book) == 0


async def test_a_book_that_fails_fails_no_request(served, monkeypatch, caplog):
    def fail(*_args: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(served.recorder._book, "see", fail)
    assert (await served.complete()).status_code == 200
    assert "was not understood" in caplog.text
    assert isinstance(served.told[0], RequestSpans)
