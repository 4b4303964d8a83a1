"""The whole cluster as a user starts it, against transformers, under kills, and to its end. One cluster serves all."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import dataclass, field, replace
from functools import cached_property

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from messages.request import SamplingParams
from tests.models import make_tiny_model
from tests.reference import Reference
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
def reference(model_dir):
    return Reference(model_dir)


@pytest.fixture(scope="module")
def served(model_dir, tmp_path_factory):
    # The pool holds one sequence of full length and little more: it evicts and preempts all the time.
    arguments = [
        str(model_dir),
        *("--prefill", str(NUM_PREFILL), "--decode", str(NUM_DECODE)),
        *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory", "5MiB"),
    ]
    with serving(*arguments, log_dir=tmp_path_factory.mktemp("log")) as process:
        yield process


@pytest.fixture
def client(served):
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


@dataclass(frozen=True)
class Ask:
    """One request and what plain transformers would answer."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    extra: dict = field(default_factory=dict)
    is_streamed: bool = False

    @cached_property
    def body(self) -> dict:
        extra = {"return_token_ids": True, "ignore_eos": True, **self.extra}
        if self.stop_token_ids:
            extra["stop_token_ids"] = list(self.stop_token_ids)
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "n": self.n,
            "extra_body": extra,
        }

    def expected(self, reference: Reference, answer: list[list[int]]) -> list[list[int]]:
        """What it must be; `answer` tells which way rounding went where it decides a draw."""
        params = {key: value for key, value in self.extra.items() if key in SamplingParams.__struct_fields__}
        return [
            reference.generate(
                self.prompt,
                SamplingParams(
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    seed=self.seed,
                    choice=choice,
                    stop_token_ids=self.stop_token_ids,
                    **params,
                ),
                like,
            )
            for choice, like in zip(range(self.n), answer, strict=True)
        ]


def mixed_asks(count: int, seed: int | str) -> list[Ask]:
    """Lengths 1 to 4,000, shared prefixes, n, seeds, stops, penalties, every third streamed; the same for a seed."""
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(5, 250) for _ in range(length)]

    shared = [tokens(length) for length in (40, 256, 700, 1500, 3000)]
    asks = []
    for number in range(count):
        kind = rng.random()
        if kind < 0.5:
            prefix = rng.choice(shared)
            prompt = (
                prefix[: rng.randrange(1, len(prefix))]
                if rng.random() < 0.3
                else prefix + tokens(rng.randrange(1, 200))
            )
        else:
            prompt = tokens(
                rng.choice([1, 2, 15, 16, 17, 31, 64, 255, 256, 257, 511, 900, 1800, rng.randrange(1, 4000)])
            )
        asks.append(
            Ask(
                prompt=prompt,
                max_tokens=rng.choice([1, 2, 5, 16, 33, 60]),
                temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
                seed=rng.randrange(2**31),
                n=rng.choice([1, 1, 1, 3]),
                stop_token_ids=tuple(rng.sample(range(5, 250), 6)) if rng.random() < 0.25 else (),
                extra=rng.choice([{}, {}, {"top_k": 20}, {"top_p": 0.8}, {"repetition_penalty": 1.2}, {"min_p": 0.05}]),
                is_streamed=number % 3 == 0,
            )
        )
    return asks


async def ask_all(client, asks: list[Ask], concurrency: int = 24) -> list[list[list[int]] | Exception]:
    """Answers in order; an error in an answer's place."""
    gate = asyncio.Semaphore(concurrency)

    async def one(ask: Ask) -> list[list[int]] | Exception:
        async with gate:
            try:
                return await (streamed if ask.is_streamed else whole)(client, ask)
            except (openai.APIError, httpx.HTTPError) as error:
                return error

    return await asyncio.gather(*(one(ask) for ask in asks))


async def whole(client, ask: Ask) -> list[list[int]]:
    """The token ids of each choice of a reply."""
    reply = await client.completions.create(model=await model_name(client), **ask.body)
    return [choice.model_extra["token_ids"] for choice in reply.choices]


async def streamed(client, ask: Ask) -> list[list[int]]:
    """The token ids of each choice of a stream, which must end as a stream does."""
    stream = await client.completions.create(model=await model_name(client), stream=True, **ask.body)
    token_ids: list[list[int]] = [[] for _ in range(ask.n)]
    reasons: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in reasons, "a chunk after the last one"
            token_ids[choice.index] += choice.model_extra["token_ids"]
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert len(reasons) == ask.n
    return token_ids


async def model_name(client, _names: dict[str, str] = {}) -> str:  # noqa: B006 - a cache
    key = str(client.base_url)
    if key not in _names:
        _names[key] = (await client.models.list()).data[0].id
    return _names[key]


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
