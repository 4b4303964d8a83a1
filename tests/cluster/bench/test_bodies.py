"""Requests as each endpoint takes them."""

from __future__ import annotations

import pytest

from cluster.bench.bodies import CHAT, RESPONSES, Writing, text_of
from cluster.bench.workload import Turn

TURN = Turn([101, 102], 9)


def test_ids_are_sent_as_ids_and_any_server_is_asked_for_usage():
    path, body = Writing(model="m").body(TURN, [], "salt")
    assert path == "/v1/completions"
    assert body == {
        "model": "m",
        "prompt": [101, 102],
        "temperature": 0,
        "max_tokens": 9,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_what_only_some_servers_know_is_asked_of_them_alone():
    _, body = Writing(model="m", has_token_ids=True, has_sources=True, extra={"top_p": 0.5}).body(TURN, [100], "salt")
    assert (body["return_token_ids"], body["return_prompt_sources"], body["top_p"]) == (True, True, 0.5)
    assert body["prompt"] == [100, 101, 102]
    _, plain = Writing(model="m", ignores_eos=False).body(TURN, [], "salt")
    assert not {"return_token_ids", "return_prompt_sources", "ignore_eos"} & plain.keys()


@pytest.mark.parametrize(("path", "key"), [(CHAT, "messages"), (RESPONSES, "input")])
def test_chats_and_responses_get_words(path, key):
    posted, body = Writing(model="m", path=path).body(TURN, [], "salt")
    assert posted == path
    assert text_of([101, 102]) in str(body[key])
    assert ("stream_options" in body) == (path == CHAT)


def test_equal_tokens_are_equal_words_and_others_others():
    words = text_of(list(range(5000))).split()
    assert len(set(words)) == 5000
    assert text_of([7, 7]).split()[0] == text_of([7])


def test_a_posted_body_stays_as_it_is_but_for_model_stream_and_salt():
    turn = Turn([], 5, path=CHAT, body={"messages": [], "max_tokens": 5, "model": "other", "top_k": 3})
    path, body = Writing(model="m").body(turn, [], "salt")
    assert path == CHAT
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert body == {"messages": [], "max_tokens": 5, "model": "m", "top_k": 3, **streamed}
    _, salted = Writing(model="m", has_sources=True).body(turn, [], "salt")
    assert salted["cache_salt"] == "salt"
    _, kept = Writing(model="m", has_sources=True).body(Turn([], 5, body={"cache_salt": "its own"}), [], "salt")
    assert kept["cache_salt"] == "its own"
