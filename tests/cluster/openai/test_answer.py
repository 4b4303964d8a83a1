"""What chat and text answers do alike: as a stream or whole, with the extras that were asked for."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import msgspec
import pytest
from msgspec import UNSET
from starlette.requests import ClientDisconnect, Request

from cluster.openai.answer import Answer
from cluster.openai.generation import Generation
from cluster.openai.metrics import HttpMetrics
from cluster.openai.protocol import SharedFields
from cluster.openai.replies import KvrayExtras, PromptSourceCounts
from cluster.openai.stream import DONE, Turn
from cluster.openai.transcript import Delta, TextOptions, Transcript
from messages.errors import CapacityError
from messages.request import GenerateRequest, SamplingParams


class Shout(Answer):
    """The text so far, in capitals."""

    said = b""

    def _add(self, index: int, delta: Delta) -> None:
        self.said += self._event(index, delta)

    def _reply(self) -> bytes:
        return self.said

    def _event(self, index: int, delta: Delta) -> bytes:
        return delta.text.upper().encode()

    def _envelope(self, usage: object, kvray: object) -> Nothing:
        return Nothing()


class Nothing(msgspec.Struct):
    """What ends a stream that says nothing else."""


@pytest.fixture
def answer(backend):
    """An answer to a prompt of three tokens with two choices."""

    def make(**fields: object) -> Shout:
        requests = [
            GenerateRequest(
                request_id=f"r{choice}",
                token_ids=b"",
                num_prompt_tokens=3,
                params=SamplingParams(max_tokens=9, choice=choice, stop_token_ids=(backend.eos,)),
            )
            for choice in range(2)
        ]
        transcripts = [Transcript(backend.tokenizer, TextOptions()) for _ in requests]
        generation = Generation(backend, HttpMetrics(), requests, transcripts, num_choices=2)
        surface = SimpleNamespace(turn=Turn())
        return Shout(surface, SharedFields(**fields), "id", generation, is_text_only=False)  # type: ignore[arg-type]

    return make


def client(*, leaves_after_s: float = 60.0) -> Request:
    async def receive() -> dict[str, object]:
        await asyncio.sleep(leaves_after_s)
        return {"type": "http.disconnect"}

    return Request({"type": "http", "headers": []}, receive)


async def sent(response, request: Request) -> list[dict]:
    messages: list[dict] = []

    async def send(message: dict) -> None:
        messages.append(message)

    await response(request.scope, request.receive, send)
    return messages


@pytest.mark.parametrize("stream", [None, False])
async def test_an_answer_is_one_piece_of_json_unless_a_stream_is_asked_for(answer, backend, stream):
    backend.says("ab")
    response = await answer(stream=stream).respond(client())
    assert (response.media_type, response.body) == ("application/json", b"AABB")


async def test_a_stream_sends_its_events_as_they_come(answer, backend):
    backend.says("ab")
    request = client()
    response = await answer(stream=True).respond(request)
    assert backend.requests == [], "nothing runs before the response is sent"
    start, *parts = await sent(response, request)
    assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert b"".join(part["body"] for part in parts) == b"AABB" + DONE
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]
    assert len(parts) > 2, "what came in another turn was not waited for"


async def test_an_error_of_a_whole_reply_is_raised_and_of_a_stream_is_its_reply(answer, backend):
    backend.refusal = CapacityError("full")
    with pytest.raises(CapacityError):
        await answer().respond(client())
    request = client()
    response = await answer(stream=True).respond(request)
    assert (await sent(response, request))[0]["status"] == 429


async def test_a_client_that_leaves_before_its_reply_is_whole_stops_the_work(answer, backend):
    backend.delay_s = 30
    with pytest.raises(ClientDisconnect):
        await answer().respond(client(leaves_after_s=0.02))
    assert (backend.num_active, backend.num_closed_early) == (0, 1)


@pytest.mark.parametrize("asked", [None, False, True])
async def test_sources_are_told_only_to_who_asks(answer, asked):
    given = answer(return_prompt_sources=asked)
    await given._whole()
    told = KvrayExtras(PromptSourceCounts(device=1, host=0, peer=2, disk=0, remote=0, computed=0))
    assert given._extras() == (told if asked else UNSET)


def test_an_answer_is_as_old_as_the_moment_it_was_begun_and_no_choice_has_begun(answer):
    before_s = int(time.time())
    given = answer()
    assert before_s <= given._created <= time.time()
    assert given._is_begun == [False, False]
