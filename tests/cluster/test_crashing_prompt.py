"""A prompt that ends the process that computes it: two real decode workers go, everybody else's answer comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import NamedTuple

import msgspec
import pytest
import pytest_asyncio

from cluster.dispatch import Dispatcher, DispatchOptions
from kvcache.names import pack_tokens
from messages.request import GenerateRequest, SamplingParams
from tests.cluster.reading import chunks_of
from tests.decode.test_two_hosts import FAULTY
from tests.harness import harness_workers
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.workers import CHANNEL, SECRET, until, worker_options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

NUM_WORKERS = 3
DEADLY = 251  #: tests/faulty_worker.py


class Fleet(NamedTuple):
    dispatcher: Dispatcher
    reference: Reference
    workers: list


@pytest_asyncio.fixture
async def fleet(tmp_path) -> AsyncGenerator[Fleet, None]:
    model_dir = make_tiny_model(tmp_path)
    options = worker_options(model_dir)
    running_worker = harness_workers().running_worker
    with contextlib.ExitStack() as stack:

        def start():
            return stack.enter_context(running_worker("decode", options, SECRET, script=(str(FAULTY), "die")))

        workers = await asyncio.gather(*(asyncio.to_thread(start) for _ in range(NUM_WORKERS)))
        infos = [
            msgspec.structs.replace(worker.info, worker_id=f"decode-{number}") for number, worker in enumerate(workers)
        ]
        dispatcher = Dispatcher(
            DispatchOptions(
                ingress_id="ingress-1", secret=SECRET, channel=CHANNEL, request_timeout_s=60.0, max_ttft_s=20.0
            )
        )
        dispatcher.set_workers("decode", infos)
        yield Fleet(dispatcher, Reference(model_dir), workers)
        dispatcher.close()


def asked(request_id: str, prompt: list[int], num_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        token_ids=pack_tokens(prompt),
        num_prompt_tokens=len(prompt),
        params=SamplingParams(max_tokens=num_tokens, temperature=0.0),
    )


async def test_a_prompt_that_ends_workers_ends_two_and_harms_no_other_request(fleet: Fleet) -> None:
    async def answer(request: GenerateRequest) -> tuple[list[int], str | None]:
        token_ids: list[int] = []
        error = None
        async for chunk in chunks_of(fleet.dispatcher, [request]):
            token_ids += chunk.token_ids
            error = chunk.error.code if chunk.error is not None else None
        return token_ids, error

    prompts = [[5 + i, *range(20, 60)] for i in range(8)]
    answers = [asyncio.create_task(answer(asked(f"good{i}", prompt, 60))) for i, prompt in enumerate(prompts)]
    await asyncio.sleep(0.2)
    bad = asyncio.create_task(answer(asked("bad", [7, 8, DEADLY, 9], 60)))
    got = await asyncio.gather(*answers)
    assert await bad == ([], "worker_lost")
    # Its connections end a moment before a killed process does.
    await until(lambda: sum(worker.process.poll() is not None for worker in fleet.workers) >= 2)
    assert sum(worker.process.poll() is not None for worker in fleet.workers) == 2
    expected = await asyncio.to_thread(lambda: [fleet.reference.greedy(prompt, 60) for prompt in prompts])
    assert got == [(token_ids, None) for token_ids in expected]
