"""The whole cluster as a user starts it, against transformers, under kills, and to its end. One cluster serves all."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import replace

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.asking import Ask, ask_all, mixed_asks, model_name
from tests.models import make_tiny_model
from tests.served import serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

NUM_PREFILL = NUM_DECODE = 2
MAX_MODEL_LEN = 4352
WHOLE_AGAIN_S = 15.0
DEPLOYMENTS = ("Prefill", "Router", "Decode", "Ingress")
LOAD = 12  #: requests at a time while something is lost


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def served(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    config = directory / "kvray.yaml"
    config.write_text("http: {max_ttft_s: 600}")  # nothing is refused, however slow the machine is
    # The pool holds one sequence of full length and little more: it evicts and preempts all the time.
    arguments = [
        str(model_dir),
        *("--config", str(config)),
        *("--prefill", str(NUM_PREFILL), "--decode", str(NUM_DECODE)),
        *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory", "5MiB"),
    ]
    with serving(*arguments, log_dir=directory) as process:
        yield process


@pytest.fixture
def client(served):
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


async def test_two_hundred_mixed_requests_equal_transformers_one_by_one(served, client, reference):
    rng = random.Random(11)
    # beside the mix, outputs that outgrow the pool: 30 x 500 tokens into two pools of 5,120
    growing = [Ask(prompt=[rng.randrange(5, 250) for _ in range(200)], max_tokens=300) for _ in range(30)]
    asks = [*mixed_asks(200, seed=1), *growing]
    got = await ask_all(client, asks, concurrency=32)
    failed = [answer for answer in got if isinstance(answer, Exception)]
    assert not failed
    for ask, answer in zip(asks, got, strict=True):
        assert answer == ask.expected(reference, answer), ask
    served.wait_until_idle()
    values = [worker["values"] for worker in served.status()["workers"]]
    assert sum(value["kvray_preemptions_total"] for value in values) > 0
    assert sum(value.get('kvray_transfer_bytes_total{road="shm"}', 0) for value in values) > 0


async def test_the_same_long_prompt_again_reports_cached_tokens(client):
    rng = random.Random(2)
    prompt = [rng.randrange(5, 250) for _ in range(1000)]
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
    first = await client.completions.create(model=await model_name(client), **body)
    again = await client.completions.create(model=await model_name(client), **body)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= 960
    assert again.choices[0].text == first.choices[0].text


async def test_a_stream_and_a_reply_say_the_same(client):
    body = {"messages": [{"role": "user", "content": "Grüße, 世界 🌍! " * 20}], "max_tokens": 40, "temperature": 0}
    whole = await client.chat.completions.create(model=await model_name(client), **body)
    stream = await client.chat.completions.create(
        model=await model_name(client), stream=True, stream_options={"include_usage": True}, **body
    )
    text, usage, reasons = "", None, []
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_a_streams_head_does_not_wait_for_its_first_token(served, client):
    rng = random.Random(3)
    name = await model_name(client)
    prompts = [[rng.randrange(5, 250) for _ in range(4000)] for _ in range(17)]
    before = [
        asyncio.ensure_future(client.completions.create(model=name, prompt=prompt, max_tokens=64, temperature=0))
        for prompt in prompts[:-1]
    ]
    body = {"prompt": prompts[-1], "max_tokens": 2, "stream": True}
    async with httpx.AsyncClient(timeout=120) as http:
        async with http.stream("POST", f"{served.url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            num_answered = sum(answer.done() for answer in before)
            lines = [line async for line in response.aiter_lines()]
        assert num_answered < len(before), "its head came while those before it were computed"
        assert lines[-2:] == ["data: [DONE]", ""]
        assert {line for line in lines if not line.startswith("data: ")} <= {"", ": the answer goes on"}
        body["max_tokens"] = 10**6
        refused = await http.post(f"{served.url}/v1/completions", json=body)
        assert refused.status_code == 400, "what is refused has its status still"
    await asyncio.gather(*before)


def num_moved(served) -> float:
    """How often a request was placed anew."""
    page = httpx.get(f"{served.url}/metrics", timeout=10).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    return families["kvray_requests_moved"].samples[0].value


@pytest.mark.parametrize(
    ("deployment", "number"),
    [
        *(
            pytest.param(name, signal.SIGKILL, id=f"{name} killed")
            for name in ("Prefill", "Router", "Decode", "Ingress")
        ),
        pytest.param("Decode", signal.SIGSTOP, id="Decode stopped"),
        *(
            pytest.param(name, signal.SIGSTOP, id=f"{name} stopped", marks=pytest.mark.long)
            for name in DEPLOYMENTS
            if name != "Decode"
        ),
    ],
)
async def test_a_replica_lost_under_load_costs_no_token_and_no_hang(served, client, reference, deployment, number):
    served.wait_until_whole(NUM_PREFILL, NUM_DECODE, 60)
    asks = mixed_asks(60, seed=f"{deployment} {number.name}")
    moved = num_moved(served) if deployment == "Decode" else 0
    load = asyncio.create_task(ask_all(client, asks, concurrency=LOAD))
    await asyncio.sleep(0.7)
    victim = served.replicas(deployment)[0]
    victim.send_signal(number)
    lost_s = time.monotonic()
    try:
        got = await asyncio.wait_for(load, 120)
        whole_s = await asyncio.to_thread(served.wait_until_whole, NUM_PREFILL, NUM_DECODE, 60)
        whole_s = time.monotonic() - lost_s if whole_s > 0.5 else whole_s
    finally:
        if victim.is_running():
            victim.kill()
    errors = [answer for answer in got if isinstance(answer, Exception)]
    if deployment == "Ingress":  # its connections break; who comes while it is replaced waits
        assert 0 < len(errors) <= LOAD
        assert all(isinstance(error, openai.APIConnectionError | httpx.TransportError) for error in errors)
    else:
        assert not errors
    if deployment == "Decode":
        assert num_moved(served) > moved
    for ask, answer in zip(asks, got, strict=True):
        if not isinstance(answer, Exception):
            assert answer == ask.expected(reference, answer), ask
    assert whole_s < WHOLE_AGAIN_S + (10 if number == signal.SIGSTOP else 0)
    served.wait_until_idle()


async def test_requests_outlive_all_decode_workers_at_once(served, client, reference):
    served.wait_until_whole(NUM_PREFILL, NUM_DECODE, 60)
    asks = [replace(ask, is_streamed=True, max_tokens=60) for ask in mixed_asks(LOAD, seed="all")]
    moved = num_moved(served)
    load = asyncio.create_task(ask_all(client, asks, concurrency=LOAD))
    await asyncio.sleep(0.7)
    for victim in served.replicas("Decode"):
        victim.kill()
    got = await asyncio.wait_for(load, 120)
    assert num_moved(served) > moved
    assert not [answer for answer in got if isinstance(answer, Exception)]
    for ask, answer in zip(asks, got, strict=True):
        assert answer == ask.expected(reference, answer), ask
    served.wait_until_whole(NUM_PREFILL, NUM_DECODE, 60)
    served.wait_until_idle()


async def test_ctrl_c_ends_everything_within_ten_seconds(served):
    """The last test of this module: there is no cluster after it."""
    body = {"prompt": [7] * 100, "max_tokens": 4000, "stream": True, "ignore_eos": True}
    is_streaming = asyncio.Event()

    async def read_stream() -> None:
        async with (
            httpx.AsyncClient(timeout=60) as http,
            http.stream("POST", f"{served.url}/v1/completions", json=body) as response,
        ):
            async for _line in response.aiter_lines():
                is_streaming.set()

    reader = asyncio.create_task(read_stream())
    await asyncio.wait_for(is_streaming.wait(), 30)
    seconds = await asyncio.to_thread(served.stop)
    (outcome,) = await asyncio.gather(reader, return_exceptions=True)
    assert outcome is None or isinstance(outcome, httpx.HTTPError)
    assert seconds < 10
    assert served.process.returncode == 0
