"""One question to a real socket: whatever the server does, an outcome comes of it, in time."""

from __future__ import annotations

import socket
import time

import pytest

from cluster.bench.answers import FEWER_EVENTS, NO_USAGE
from cluster.bench.sending import Answer, Deadlines, Sender
from messages.errors import ConfigError
from tests.cluster.bench.lying_server import Server, serving

QUICK = Deadlines(request_s=1.0, silence_s=0.3, ready_s=0.3)
BODY = {"prompt": [1, 2, 3, 4], "max_tokens": 5}


async def ask(server: Server, deadlines: Deadlines = QUICK) -> Answer:
    async with Sender(server.url, "key", deadlines) as sender:
        return await sender.ask("/v1/completions", BODY, num_sent_tokens=4, max_tokens=5, wants_all=True)


async def test_a_good_answer_is_timed_and_counted():
    with serving(mode="sources", step_s=0.02) as server:
        answer = await ask(server)
    outcome = answer.outcome
    assert (outcome.fault, outcome.remarks) == (None, set())
    assert (outcome.num_prompt_tokens, outcome.num_output_tokens, outcome.num_cached_tokens) == (4, 5, 2)
    assert outcome.sources == {"device": 2, "computed": 2}
    assert answer.token_ids == [200, 201, 202, 203, 204]
    assert len(outcome.gaps_s) == 4
    assert min(outcome.gaps_s) > 0.01
    assert 0 < outcome.ttft_s < outcome.ttft_s + sum(outcome.gaps_s) <= outcome.e2e_s


async def test_events_in_any_pieces_are_the_same_events():
    with serving(mode="in bytes") as server:
        answer = await ask(server)
    assert answer.outcome.fault is None
    assert answer.outcome.num_events == 5


@pytest.mark.parametrize(
    ("mode", "remark", "num_events", "num_tokens"),
    [("no usage", NO_USAGE, 5, 5), ("in pairs", FEWER_EVENTS, 3, 5)],
)
async def test_what_makes_figures_less_than_they_seem_is_remarked(mode, remark, num_events, num_tokens):
    with serving(mode=mode) as server:
        outcome = (await ask(server)).outcome
    assert outcome.fault is None
    assert outcome.remarks == {remark}
    assert (outcome.num_events, outcome.num_output_tokens) == (num_events, num_tokens)


@pytest.mark.parametrize(
    ("mode", "fault", "detail"),
    [
        ("status", "HTTP 503", "no worker is there"),
        ("redirect", "HTTP 302", ""),
        ("no stream", "no event stream", "content type application/json"),
        ("no http", "no HTTP", ""),
        ("hangs up", "cut off", ""),
        ("error", "error in the stream", "the worker was lost"),
        ("garbage", "events that are no chunks", "quotes"),
        ("wrong types", "events that are no chunks", "text"),
        ("endless event", "endless event", "no end of it"),
        ("endless", "more tokens than asked for", "for 5 tokens"),
        ("no tokens", "no tokens", "0 events"),
        ("cut off", "cut off", ""),
        ("silent end", "cut off", "after 1 events with tokens"),
        ("hangs", "hung", "nothing came for 0.3 s"),
        ("drips", "too slow", "within 1 s"),
        ("missing", "tokens missing", "3 of 5"),
        ("claims more", "more tokens than asked for", "6 of 5"),
        ("impossible hits", "usage that cannot be", "5 of 4 prompt tokens"),
        ("no numbers", "usage without numbers", ""),
    ],
)
async def test_what_is_no_answer_is_a_fault_of_its_kind_in_time(mode, fault, detail):
    with serving(mode=mode) as server:
        began_s = time.monotonic()
        outcome = (await ask(server)).outcome
        taken_s = time.monotonic() - began_s
    assert (outcome.fault, detail in outcome.detail) == (fault, True), outcome.detail
    assert "\n" not in outcome.detail
    assert taken_s < 5


async def test_nobody_there_is_a_fault():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        outcome = (await ask(Server(port=taken.getsockname()[1]))).outcome
    assert outcome.fault == "not reached"


async def test_models_are_told_with_their_owner():
    with serving(owner="kvray") as server:
        async with Sender(f"{server.url}/v1", None, QUICK) as sender:
            [model] = await sender.models()
    assert (model.name, model.owner) == ("tiny", "kvray")


async def test_who_has_no_models_is_refused_in_one_line():
    with serving(mode="no models") as server:
        async with Sender(server.url, None, QUICK) as sender:
            with pytest.raises(ConfigError, match=r"wanted a list of models, saw '<html>hello</html>'"):
                await sender.models()


@pytest.mark.slow
async def test_a_server_that_never_answers_is_waited_for_no_longer_than_said():
    async with Sender("http://127.0.0.1:9", None, QUICK) as sender:
        with pytest.raises(ConfigError, match=r"nobody answers at http://127.0.0.1:9 within 0.3 s"):
            await sender.models()
