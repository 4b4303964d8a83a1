"""A client that leaves costs a step: over HTTP, on a model whose step is long beside what HTTP takes."""

from __future__ import annotations

import asyncio
import json
import random
import shutil

import httpx
import pytest

from tests.models import make_tiny_model
from tests.served import Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

MAX_TOKENS = 3000
#: The step that runs when the client leaves, and the one that began before its leaving was noticed.
NUM_STEPS = 2


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    # 500 MB of weights: a step takes 15 ms where memory gives 30 GB/s, which is fast
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    model_dir = make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096, **size)
    arguments = [str(model_dir), "--prefill", "0", "--decode", "1", "--dtype", "float32", "--kv-cache-memory", "512MiB"]
    with serving(*arguments, log_dir=tmp_path_factory.mktemp("log")) as process:
        yield process
    shutil.rmtree(model_dir)


@pytest.fixture
async def http(served):
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        yield client


def ask(*, stream: bool) -> dict:
    prompt = [random.randrange(5, 250) for _ in range(20)]
    return {
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "return_token_ids": True,
    }


def num_generated(served: Served) -> int:
    (worker,) = served.status()["workers"]
    return int(worker["values"]["kvray_generated_tokens_total"])


async def read_and_leave(http: httpx.AsyncClient, num_tokens: int) -> int:
    """Leaves a stream after that many tokens; how many it got."""
    num_received = 0
    async with http.stream("POST", "/v1/completions", json=ask(stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                num_received += len(json.loads(line[6:])["choices"][0]["token_ids"])
            if num_received >= num_tokens:
                break
    return num_received


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 10, 20])
async def test_a_stream_that_is_left_is_generated_for_no_longer_than_two_steps(served, http, num_tokens):
    before = num_generated(served)
    num_received = await read_and_leave(http, num_tokens)
    served.wait_until_idle()
    assert num_generated(served) - before - num_received <= NUM_STEPS


async def test_streams_left_together_are_each_generated_for_no_longer_than_two_steps(served, http):
    before = num_generated(served)
    num_received = sum(await asyncio.gather(*(read_and_leave(http, 3 + 2 * number) for number in range(8))))
    served.wait_until_idle()
    assert num_generated(served) - before - num_received <= 8 * NUM_STEPS


async def test_a_reply_that_is_not_waited_for_is_not_generated(served, http):
    before = num_generated(served)
    with pytest.raises(httpx.ReadTimeout):
        await http.post("/v1/completions", json=ask(stream=False), timeout=0.5)
    await asyncio.sleep(0.2)
    at_once = num_generated(served)
    assert 0 < at_once - before < MAX_TOKENS
    await asyncio.sleep(0.5)
    assert num_generated(served) == at_once
    served.wait_until_idle()
