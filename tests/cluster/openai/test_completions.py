"""/v1/completions."""

from __future__ import annotations

import msgspec


def complete(server, prompt="ab", **fields):
    response = server.post("/v1/completions", {"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_string_is_completed(server):
    reply = server.client().completions.create(model="tiny", prompt="ab", max_tokens=20)
    assert reply.choices[0].text == "Hello, world"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.object == "text_completion"
    assert reply.usage.prompt_tokens == 2
    assert server.prompt() == "ab"


def test_the_default_is_sixteen_tokens(server):
    server.backend.says("x" * 100)
    assert complete(server)["choices"][0]["text"] == "x" * 16


def test_all_four_kinds_of_prompt(server):
    ids = server.tokenizer.encode("cd", add_special_tokens=False)
    for prompt, prompts in [("ab", ["ab"]), (["ab", "e"], ["ab", "e"]), (ids, ["cd"]), ([ids, ids[:1]], ["cd", "c"])]:
        server.backend.requests.clear()
        reply = complete(server, prompt)
        assert [server.prompt(i) for i in range(len(prompts))] == prompts
        assert [c["index"] for c in reply["choices"]] == list(range(len(prompts)))
        assert reply["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_n_times_prompts_come_grouped_by_prompt(server):
    server.backend.script = lambda r: server.backend.spoken(
        r, f"{server.tokenizer.decode([r.token_ids[0]])}{r.params.choice}"
    )
    reply = complete(server, ["a", "b"], n=2)
    assert [c["text"][-1] for c in reply["choices"]] == ["0", "1", "0", "1"]
    assert len({c["text"] for c in reply["choices"]}) == 4
    assert [server.prompt(i) for i in range(4)] == ["a", "a", "b", "b"]
    assert reply["usage"]["prompt_tokens"] == 2
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_a_stream_has_text_and_an_end(server):
    chunks = list(server.client().completions.create(model="tiny", prompt="ab", max_tokens=20, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "Hello, world"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 12 + ["stop"]


def test_streamed_usage_is_the_last_chunk(server):
    chunks = list(
        server.client().completions.create(
            model="tiny", prompt="ab", stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2
    assert {c.usage for c in chunks[:-1]} == {None}


def test_echo_gives_the_prompt_before_the_text(server):
    assert complete(server, "ab", echo=True)["choices"][0]["text"] == "abHello, world"
    ids = server.tokenizer.encode("cd", add_special_tokens=False)
    assert complete(server, ids, echo=True)["choices"][0]["text"] == "cdHello, world"


def test_echo_with_logprobs_covers_prompt_and_text_with_offsets(server):
    server.backend.says("xy", ends=False)
    logprobs = complete(server, "ab", echo=True, logprobs=1, max_tokens=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "x", "y"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"] == [None, {"b": -0.5}, {"x": -0.5}, {"y": -0.5}]
    assert server.backend.requests[0].params.prompt_logprobs == 1


def test_echo_without_new_tokens_scores_the_prompt(server):
    reply = complete(server, "abc", echo=True, logprobs=1, max_tokens=0)
    choice = reply["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0
    assert server.backend.requests[0].params.max_tokens == 1


def test_streamed_logprobs_run_on_in_offset(server):
    server.backend.says("xyz", ends=False)
    body = {"prompt": "ab", "max_tokens": 3, "logprobs": 0, "stream": True}
    events = server.post("/v1/completions", body).text.split("\n\n")[:-2]
    logprobs = [msgspec.json.decode(e[6:])["choices"][0]["logprobs"] for e in events]
    assert [entry["text_offset"] for entry in logprobs] == [[0], [1], [2]]
    assert [entry["top_logprobs"] for entry in logprobs] == [[{"x": -0.5}], [{"y": -0.5}], [{"z": -0.5}]]


def test_token_ids_are_per_choice(server):
    reply = complete(server, ["a", "b"], return_token_ids=True)
    assert [server.tokenizer.decode(c["prompt_token_ids"]) for c in reply["choices"]] == ["a", "b"]
    assert [server.tokenizer.decode(c["token_ids"]) for c in reply["choices"]] == ["Hello, world"] * 2


def test_prompt_logprobs_are_per_choice(server):
    choice = complete(server, "ab", prompt_logprobs=0)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert [entry["decoded_token"] for entry in choice["prompt_logprobs"][1].values()] == ["b"]


def test_stop_strings_and_prompt_sources(server):
    reply = complete(server, "abc", stop=" wor", return_prompt_sources=True)
    assert reply["choices"][0]["text"] == "Hello,"
    assert reply["choices"][0]["stop_reason"] == " wor"
    assert sum(reply["kvray"]["prompt_sources"].values()) == reply["usage"]["prompt_tokens"]


def test_best_of_is_fine_when_it_is_n(server):
    assert len(complete(server, n=2, best_of=2)["choices"]) == 2


def test_a_nearly_full_context_cuts_the_default(server):
    complete(server, "x" * 500)
    assert server.backend.requests[0].params.max_tokens == 12
