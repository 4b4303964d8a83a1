"""Streams of events: what is one write, what waits for a slow client, and in which order it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cluster.openai.stream import DIRECT, EventStream, Turn, event
from cluster.openai.transcript import Delta
from messages.errors import CapacityError, KvrayError

HEADERS_AND_FIRST = 2  #: messages of ASGI before a connection is lent


class SimpleText(msgspec.Struct):
    text: str


class Speaker:
    """A generation that says what the test tells it to, and a client of its stream, who reads by `is_reading`."""

    def __init__(self, *, lends: bool = True, event_of: Callable[[int, Delta], bytes] | None = None) -> None:
        self.is_stopped = False
        self.sent: list[dict[str, Any]] = []  #: by ASGI
        self.written: list[bytes] = []  #: to the connection
        self.is_paused = False
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.left = asyncio.Event()
        self.has_begun = asyncio.Event()
        self.resumed: Callable[[], None] | None = None
        self._turn = Turn()
        generation: Any = SimpleNamespace(start=self._start, stop=self._stop)
        self.stream = EventStream(generation, self._turn, event_of or (lambda _, d: d.text.encode()), lambda: b"[DONE]")
        scope = {"type": "http", "extensions": {DIRECT: self} if lends else {}}
        self.answering = asyncio.ensure_future(self.stream(scope, self._receive, self._send))

    def _start(
        self,
        on_delta: Callable[[int, Delta], None],
        on_end: Callable[[KvrayError | None], None],
        on_accepted: Callable[[], None],
    ) -> None:
        self.on_delta, self.end, self.accept = on_delta, on_end, on_accepted
        self.has_begun.set()

    def _stop(self) -> None:
        self.is_stopped = True

    async def _receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self.is_paused:
            await self.may_send.wait()
        self.sent.append(message)

    # -------------------------------------------------------------------------------------------- the lent connection

    def write(self, data: bytes) -> None:
        self.sent.append({"body": data, "is_direct": True})
        self.written.append(data)

    def on_resume(self, callback: Callable[[], None]) -> None:
        self.resumed = callback

    def pause(self) -> None:
        self.is_paused = True
        self.may_send.clear()

    def resume(self) -> None:
        """As a server does it: ASGI's sender is woken, which goes on later, and who writes directly is told."""
        self.is_paused = False
        self.may_send.set()
        if self.resumed is not None:
            self.resumed()

    # ------------------------------------------------------------------------------------------------------- the test

    async def say(self, *texts: str) -> None:
        """Let these come in one turn of the loop."""
        await self.has_begun.wait()
        for text in texts:
            self.on_delta(0, Delta(text=text))
        await turns()

    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture(params=[True, False], ids=["lent", "by ASGI"])
def lends(request) -> Iterator[bool]:
    return request.param


async def test_what_comes_in_one_turn_is_one_write(lends):
    speaker = Speaker(lends=lends)
    await speaker.say("a")
    assert speaker.body() == b"a", "the first token does not wait for another"
    await speaker.say("b", "c", "d")
    await speaker.say("e")
    speaker.on_delta(0, Delta(text="f"))
    speaker.end(None)
    await speaker.answering
    bodies = [message["body"] for message in speaker.sent[1:]]
    assert bodies == [b"a", b"bcd", b"e", b"f[DONE]"]
    assert speaker.written == ([b"bcd", b"e"] if lends else [])
    assert [message.get("more_body") for message in speaker.sent if "is_direct" not in message][-1] is False
    assert speaker.is_stopped


async def test_what_a_slow_client_is_too_slow_for_waits_and_comes_in_order(lends):
    speaker = Speaker(lends=lends)
    await speaker.say("a")
    speaker.pause()
    words = [f"<{number}>" for number in range(500)]
    for word in words:
        await speaker.say(word)
    assert speaker.body() == b"a"
    speaker.resume()
    await turns()
    assert speaker.body().decode() == "a" + "".join(words)
    assert max(len(message.get("body", b"")) for message in speaker.sent) < 64 * 6, "no other buffer is filled with it"


async def test_nothing_is_overtaken_where_a_stream_ends_while_its_client_is_slow(lends):
    speaker = Speaker(lends=lends)
    await speaker.say("a")
    speaker.pause()
    words = [f"<{number}>" for number in range(300)]
    for word in words:
        await speaker.say(word)
    speaker.end(None)
    await turns()
    assert not speaker.answering.done(), "the request is answered when its client has been sent all of it"
    speaker.resume()
    await speaker.answering
    assert speaker.body().decode() == "a" + "".join(words) + "[DONE]"


async def test_a_pause_may_begin_in_the_middle_of_what_waits():
    speaker = Speaker()
    await speaker.say("a")
    speaker.pause()
    words = [f"<{number}>" for number in range(300)]
    await speaker.say(*words)
    write = speaker.write

    def write_and_pause(data: bytes) -> None:
        write(data)
        speaker.pause()

    speaker.write = write_and_pause  # type: ignore[method-assign]
    speaker.resume()
    assert len(speaker.written) == 1
    while len(speaker.written) < 5:
        speaker.resume()
    assert b"".join(speaker.written).decode() == "".join(words)
    speaker.left.set()
    await speaker.answering


async def test_an_error_before_the_first_event_has_its_own_status_and_later_it_is_an_event(lends):
    early = Speaker(lends=lends)
    await early.has_begun.wait()
    early.end(CapacityError("full"))
    await early.answering
    assert early.sent[0]["status"] == 429
    late = Speaker(lends=lends)
    await late.say("a")
    late.on_delta(0, Delta(text="b"))
    late.end(CapacityError("full"))
    await late.answering
    assert late.sent[0]["status"] == 200
    assert late.body().startswith(b'abdata: {"error":{"message":"full"')
    assert b"[DONE]" not in late.body()


async def test_an_error_in_the_turn_of_the_first_event_comes_after_it(lends):
    speaker = Speaker(lends=lends)
    await speaker.has_begun.wait()
    speaker.on_delta(0, Delta(text="a"))
    speaker.end(CapacityError("full"))
    await speaker.answering
    assert speaker.sent[0]["status"] == 200
    assert speaker.body().startswith(b"adata: {")


async def test_the_head_leaves_once_the_request_is_accepted_and_what_fails_later_is_an_event(lends):
    speaker = Speaker(lends=lends)
    await speaker.has_begun.wait()
    speaker.accept()
    await turns()
    assert [message["type"] for message in speaker.sent] == ["http.response.start"]
    assert (speaker.sent[0]["status"], speaker.body()) == (200, b"")
    speaker.end(CapacityError("full"))
    await speaker.answering
    assert speaker.body().startswith(b'data: {"error":{"message":"full"')


async def test_what_comes_after_the_head_left_early_is_one_write_a_turn(lends):
    speaker = Speaker(lends=lends)
    await speaker.has_begun.wait()
    speaker.accept()
    await turns()
    await speaker.say("a", "b")
    await speaker.say("c")
    speaker.end(None)
    await speaker.answering
    assert [message["body"] for message in speaker.sent[1:]] == [b"ab", b"c", b"[DONE]"]
    assert speaker.written == ([b"ab", b"c"] if lends else [])


async def test_an_error_in_the_turn_in_which_it_was_accepted_is_a_status_still(lends):
    speaker = Speaker(lends=lends)
    await speaker.has_begun.wait()
    speaker.accept()
    speaker.end(CapacityError("full"))
    await speaker.answering
    assert speaker.sent[0]["status"] == 429


async def test_a_comment_comes_where_nothing_else_does_and_only_there(lends, monkeypatch):
    monkeypatch.setattr("cluster.openai.stream._COMMENT_AFTER_S", 0.0)
    speaker = Speaker(lends=lends)
    await speaker.has_begun.wait()
    speaker.accept()
    while speaker.body().count(b": the answer goes on\n\n") < 3:  # noqa: ASYNC110 - nobody tells of a comment
        await asyncio.sleep(0)
    monkeypatch.setattr("cluster.openai.stream._COMMENT_AFTER_S", 600.0)
    await asyncio.sleep(0)
    comments = speaker.body()
    await speaker.say("a")
    speaker.end(None)
    await speaker.answering
    assert speaker.body().removeprefix(comments).replace(b": the answer goes on\n\n", b"") == b"a[DONE]"
    assert comments.replace(b": the answer goes on\n\n", b"") == b""


async def test_no_comment_comes_between_tokens_nor_while_the_client_does_not_read(lends, monkeypatch):
    monkeypatch.setattr("cluster.openai.stream._COMMENT_AFTER_S", 0.0)
    speaker = Speaker(lends=lends)
    await speaker.say("a")
    speaker.pause()
    await speaker.say("b")
    sent = speaker.body()
    await speaker.say("c", "d")
    speaker.stream._comment(speaker.stream._held)
    assert speaker.body() == sent
    speaker.resume()
    speaker.end(None)
    await speaker.answering
    assert speaker.body().replace(b": the answer goes on\n\n", b"") == b"abcd[DONE]"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
async def test_no_event_has_what_some_clients_take_for_the_end_of_a_line(character):
    speaker = Speaker(event_of=lambda _, delta: event(SimpleText(delta.text)))
    await speaker.say(f"é{character}漢")
    speaker.end(CapacityError(f"seen{character}"))
    await speaker.answering
    body = speaker.body().decode()
    assert len(body.splitlines()) == len(body.split("\n")) - 1
    first, last, _ = body.split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == {"text": f"é{character}漢"}
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == f"seen{character}"


async def test_a_client_that_leaves_ends_the_work_and_is_sent_nothing_more(lends):
    speaker = Speaker(lends=lends)
    await speaker.say("a")
    speaker.left.set()
    await speaker.answering
    assert speaker.is_stopped
    assert len(speaker.sent) == HEADERS_AND_FIRST


async def test_what_adds_nothing_to_see_is_no_event(lends):
    speaker = Speaker(lends=lends)
    await speaker.say("")
    assert speaker.sent == [], "not even a beginning"
    await speaker.say("a")
    await speaker.say("")
    assert len(speaker.sent) == HEADERS_AND_FIRST
    speaker.end(None)
    await speaker.answering
