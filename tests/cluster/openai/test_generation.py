"""A client request's sequences: read together, ended together, counted by prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from cluster.openai.generation import Generation
from cluster.openai.metrics import HttpMetrics
from cluster.openai.replies import KvrayExtras, PromptSourceCounts, PromptTokensDetails, Usage
from cluster.openai.transcript import Delta, TextOptions, Transcript
from messages.errors import CapacityError, KvrayError, WorkerError
from messages.request import GenerateRequest, SamplingParams
from messages.stream import PromptSources, TokenChunk

Deltas = list[tuple[int, Delta]]


class World:
    """Generations over one backend that speaks from a script, and what is counted of them."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.metrics = HttpMetrics()

    def generation(self, num_prompts: int = 1, num_choices: int = 1, stop: tuple[str, ...] = ()) -> Generation:
        """Prompts of 10, 20, ... tokens."""
        requests = [
            GenerateRequest(
                request_id=f"p{prompt}c{choice}",
                token_ids=b"",
                num_prompt_tokens=10 * (prompt + 1),
                params=SamplingParams(max_tokens=50, choice=choice, stop_token_ids=(self.backend.eos,)),
            )
            for prompt in range(num_prompts)
            for choice in range(num_choices)
        ]
        transcripts = [Transcript(self.backend.tokenizer, TextOptions(stop=stop)) for _ in requests]
        return Generation(self.backend, self.metrics, requests, transcripts, num_choices)

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def world(backend) -> World:
    return World(backend)


class Reading:
    """A generation that runs, and what it told so far."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.backend: Any = generation._backend
        self.deltas: Deltas = []
        self.end: asyncio.Future[KvrayError | None] = asyncio.get_running_loop().create_future()
        generation.start(lambda index, delta: self.deltas.append((index, delta)), self.end.set_result)
        self.speaking = list(self.backend.speaking.values())

    async def stop(self) -> None:
        """Stop it, and wait until what spoke has ended, too."""
        self.generation.stop()
        await asyncio.gather(*self.speaking, return_exceptions=True)

    async def until(self, condition: Callable[[Deltas], bool]) -> None:
        for _ in range(100):
            if condition(self.deltas):
                return
            await asyncio.sleep(0)
        pytest.fail(f"not in 100 turns of the loop: {self.deltas}")


async def all_of(generation: Generation) -> Deltas:
    reading = Reading(generation)
    error = await reading.end
    await reading.stop()
    if error is not None:
        raise error
    return reading.deltas


def texts(deltas: Deltas) -> dict[int, str]:
    found: dict[int, str] = {}
    for index, delta in deltas:
        found[index] = found.get(index, "") + delta.text
    return found


def said(world: World, lines: dict[str, str]) -> Callable[[GenerateRequest], list[TokenChunk]]:
    return lambda request: world.backend.spoken(request, lines[request.request_id])


# ---------------------------------------------------------------------------------------------------------------- ends


async def test_choices_come_interleaved_and_it_is_over_with_the_last_of_them(world):
    world.backend.script = said(world, {"p0c0": "a", "p0c1": "bcd"})
    deltas = await all_of(world.generation(num_choices=2))
    assert texts(deltas) == {0: "a", 1: "bcd"}
    assert [index for index, _ in deltas] == [0, 1, 0, 1, 1, 1]
    assert [index for index, delta in deltas if delta.finish_reason] == [0, 1]
    assert world.backend.num_active == 0


async def test_a_choice_that_met_its_stop_string_is_cancelled_and_the_others_go_on(world):
    world.backend.script = said(world, {"p0c0": "abc", "p0c1": "xxxxx"})
    deltas = await all_of(world.generation(num_choices=2, stop=("b",)))
    assert texts(deltas) == {0: "a", 1: "xxxxx"}
    assert world.backend.cancelled == ["p0c0"]


async def test_what_still_comes_for_a_choice_that_is_over_is_not_shown(world):
    world.backend.cancel = lambda request_id: None  # too late: its chunks are on their way
    world.backend.script = said(world, {"p0c0": "abcdef", "p0c1": "xxx"})
    generation = world.generation(num_choices=2, stop=("b",))
    assert texts(await all_of(generation)) == {0: "a", 1: "xxx"}
    assert generation.usage().completion_tokens == 2 + 4


async def test_the_last_choice_to_meet_a_stop_string_needs_no_cancel(world):
    world.backend.says("abcdef")
    assert texts(await all_of(world.generation(stop=("c",)))) == {0: "ab"}
    assert world.backend.cancelled == []
    assert world.backend.num_active == 0, "all work is stopped when nobody reads on"


async def test_a_choice_that_ended_by_itself_is_not_cancelled(world):
    world.backend.script = said(world, {"p0c0": "a", "p0c1": "bcd"})
    await all_of(world.generation(num_choices=2, stop=("never",)))
    assert world.backend.cancelled == []


async def test_chunks_of_sequences_that_are_not_ours_are_passed_over(world):
    def script(request: GenerateRequest) -> list[TokenChunk]:
        chunks = world.backend.spoken(request, "ab")
        return [replace(chunks[-1], request_id="somebody else's"), *chunks]

    world.backend.script = script
    assert texts(await all_of(world.generation())) == {0: "ab"}


# -------------------------------------------------------------------------------------------------------------- errors


async def test_a_failed_choice_ends_all_with_its_error(world):
    def script(request: GenerateRequest) -> list[TokenChunk]:
        chunks = world.backend.spoken(request, "abc")
        if request.params.choice == 1:
            chunks[1] = TokenChunk(
                request_id=request.request_id, finish_reason="error", error=CapacityError("full").info()
            )
        return chunks

    world.backend.script = script
    with pytest.raises(CapacityError, match="full"):
        await all_of(world.generation(num_choices=2))
    assert (world.backend.num_active, world.backend.num_closed_early) == (0, 1)
    assert world.counted("kvray_choices_finished_total", reason="refused") == 2


async def test_sequences_that_stop_coming_without_a_last_token_are_an_error(world):
    world.backend.script = lambda request: world.backend.spoken(request, "abc")[: 2 + 9 * request.params.choice]
    with pytest.raises(WorkerError, match="1 of 2 sequences ended without a last token") as caught:
        await all_of(world.generation(num_choices=2))
    assert caught.value.code == "stream_ended"
    assert world.counted("kvray_choices_finished_total", reason="error") == 1
    assert world.counted("kvray_choices_finished_total", reason="stop") == 1


async def test_closing_it_stops_the_work_and_counts_what_was_open_as_abandoned(world):
    world.backend.script = said(world, {"p0c0": "a", "p0c1": "bcdefgh"})
    reading = Reading(world.generation(num_choices=2))
    await reading.until(lambda deltas: any(delta.finish_reason for _, delta in deltas))
    assert world.counted("kvray_requests_running") == 1
    await reading.stop()
    assert not reading.end.done(), "nothing is told any more"
    assert (world.backend.num_active, world.backend.num_closed_early) == (0, 1)
    assert world.counted("kvray_requests_running") == 0
    assert world.counted("kvray_choices_finished_total", reason="stop") == 1
    assert world.counted("kvray_choices_finished_total", reason="abandoned") == 1


# -------------------------------------------------------------------------------------------------------------- counts


async def test_a_prompt_counts_once_however_many_choices_it_has(world):
    generation = world.generation(num_prompts=2, num_choices=3)
    world.backend.says("abcd")
    await all_of(generation)
    # of every prompt one token is told to come from the device and two from a peer
    assert generation.usage() == Usage(10 + 20, 6 * 5, 30 + 30, PromptTokensDetails(2 * 3))
    assert generation.extras() == KvrayExtras(
        PromptSourceCounts(device=2, host=0, peer=4, disk=0, remote=0, computed=24)
    )


async def test_of_a_prompts_choices_the_first_one_tells_where_its_tokens_came_from(world):
    def script(request: GenerateRequest) -> list[TokenChunk]:
        first, *rest = world.backend.spoken(request, "ab")
        told = PromptSources(computed=10) if request.params.choice == 0 else PromptSources(device=8, computed=2)
        return [replace(first, sources=told), *rest]

    world.backend.script = script
    generation = world.generation(num_choices=2)
    await all_of(generation)
    assert generation.usage().prompt_tokens_details.cached_tokens == 0
    assert generation.extras().prompt_sources.computed == 10


async def test_usage_grows_with_what_came_and_nothing_is_cached_before_it_is_told(world):
    world.backend.says("abc")
    generation = world.generation()
    assert generation.usage() == Usage(10, 0, 10, PromptTokensDetails(0))
    reading = Reading(generation)
    await reading.until(lambda deltas: len(deltas) == 1)
    assert generation.usage() == Usage(10, 1, 11, PromptTokensDetails(3))
    await reading.stop()


async def test_every_token_and_source_is_counted_for_the_metrics_page(world):
    world.backend.says("abc")
    await all_of(world.generation(num_choices=2))
    assert world.counted("kvray_generation_tokens_total") == 8
    assert world.counted("kvray_prompt_tokens_total", source="peer") == 4
    assert world.counted("kvray_choices_finished_total", reason="stop") == 2
    assert world.counted("kvray_time_to_first_token_seconds_count") == 1
    assert world.counted("kvray_inter_token_latency_seconds_count") == 6
    assert world.counted("kvray_request_latency_seconds_count") == 1


async def test_that_a_request_was_accepted_comes_first_and_is_no_delta(world):
    world.backend.accepts = True
    generation = world.generation()
    generation.requests = [replace(one, wants_word=True) for one in generation.requests]
    came: list[object] = []
    end = asyncio.get_running_loop().create_future()
    generation.start(lambda _, delta: came.append(delta.text), end.set_result, lambda: came.append("accepted"))
    assert await end is None
    generation.stop()
    assert (came[0], "".join(came[1:])) == ("accepted", "Hello, world")
