"""What requests say of keeping their blocks: in the body, through the client's extra_body, in a header."""

from __future__ import annotations

import json

import pytest

from cluster.openai.callers import Caller, Callers
from messages.request import CacheHint

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS = {CHAT: {"messages": [{"role": "user", "content": "Hi"}]}, COMPLETIONS: {"prompt": "Hi"}}
HEADER = "X-Kvray-Cache"


@pytest.fixture
def server(serve):
    """Serves one key that may say such things, and one that may not."""
    may, may_not = (Caller(name=name, is_operator=False, may_hint=name == "may") for name in ("may", "may-not"))
    return serve(callers=Callers([("may", may), ("may-not", may_not)]))


def ask(server, path=COMPLETIONS, key="may", headers=None, **fields):
    return server.post(path, PROMPTS[path] | fields, Authorization=f"Bearer {key}", **(headers or {}))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_all_words_reach_every_sequence_the_strongest_last(server, path):
    hints = {"pin": {"tokens": [0, 40]}, "demote": {"tokens": [40, None], "priority": -1}, "retain": {}}
    assert ask(server, path, kvray={"cache": hints}, n=2).status_code == 200
    wanted = (CacheHint(40, None, -1, 0.0), CacheHint(0, None, 1, 0.0), CacheHint(0, 40, None, 300.0))
    assert [request.hints for request in server.backend.requests] == [wanted, wanted]


def test_openais_client_sends_them_as_extra_body(server):
    hints = {"pin": {"ttl_s": 60}}
    server.client("may").completions.create(model="tiny", prompt="Hi", extra_body={"kvray": {"cache": hints}})
    [request] = server.backend.requests
    assert request.hints == (CacheHint(0, None, None, 60.0),)


def test_a_header_says_the_same(server):
    header = {HEADER: json.dumps({"retain": {"priority": 2}})}
    assert ask(server, headers=header).status_code == 200
    [request] = server.backend.requests
    assert request.hints == (CacheHint(0, None, 2, 0.0),)


def test_who_says_nothing_is_served_wherever(server):
    for fields in ({}, {"kvray": {}}, {"kvray": {"cache": {}}}, {"kvray": None}):
        assert ask(server, key="may-not", **fields).status_code == 200
    assert [request.hints for request in server.backend.requests] == [(), (), (), ()]


def test_where_it_is_not_allowed_it_is_refused_and_nothing_runs(server, serve):
    for refusing, key in ((server, "may-not"), (serve(), "any")):
        for sent in ({"kvray": {"cache": {"pin": {}}}}, {"headers": {HEADER: '{"pin": {}}'}}):
            reply = ask(refusing, key=key, **sent)
            assert reply.status_code == 403
            assert reply.json()["error"]["code"] == "cache_hints_not_allowed"
        assert refusing.backend.requests == []


@pytest.mark.parametrize(
    ("cache", "param", "words"),
    [
        ({"pin": {"ttl_s": 0}}, "kvray.cache.pin.ttl_s", "want float > 0.0, got 0"),
        ({"pin": {"ttl_s": 1e9}}, "kvray.cache.pin.ttl_s", "want float <= 86400.0"),
        ({"pin": {"tokens": [5, 5]}}, "kvray.cache.pin.tokens", "got [5,5], want the first token, and a later one"),
        ({"pin": {"tokens": [5]}}, "kvray.cache.pin.tokens", "array of length 2, got [5]"),
        ({"pin": {"tokens": [-1, 5]}}, "kvray.cache.pin.tokens[0]", "want int >= 0, got -1"),
        ({"retain": {"priority": 3}}, "kvray.cache.retain.priority", "want int <= 2, got 3"),
        ({"demote": {"priority": 1}}, "kvray.cache.demote.priority", "want int <= -1, got 1"),
        ({"evict": {}}, "kvray.cache", "unknown field evict"),
        ({"pin": True}, "kvray.cache.pin", "want object, got true"),
    ],
)
def test_what_makes_no_sense_is_a_400_that_says_so(server, cache, param, words):
    reply = ask(server, kvray={"cache": cache})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert words in error["message"]
    reply = ask(server, headers={HEADER: json.dumps(cache)})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert words in error["message"]
    assert server.backend.requests == []


@pytest.mark.parametrize("header", ["", "pin", "[]", '{"pin": {}', '{"pin": {"ttl": 5}}'])
def test_a_header_that_is_none_is_a_400_that_names_it(server, header):
    reply = ask(server, headers={HEADER: header})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, HEADER)
    assert error["message"].startswith(f"{HEADER}: ")


def test_both_are_one_too_many(server):
    reply = ask(server, kvray={"cache": {"pin": {}}}, headers={HEADER: '{"pin": {}}'})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, HEADER)
