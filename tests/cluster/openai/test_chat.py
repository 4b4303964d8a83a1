"""/v1/chat/completions through the openai client."""

from __future__ import annotations

import struct

import msgspec
import pytest

from cluster.openai.backend import HttpLimits
from messages.request import Grammar
from text.grammar_writing import written

USER = [{"role": "user", "content": "Hi"}]


def prompt_ids(request):
    return list(struct.unpack(f"<{len(request.token_ids) // 4}I", request.token_ids))


def test_a_whole_reply_has_text_usage_and_finish_reason(server):
    reply = server.client().chat.completions.create(model="tiny", messages=USER)
    assert reply.choices[0].message.content == "Hello, world"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert server.prompt() == "<user>Hi\n<assistant>"
    assert reply.usage.prompt_tokens == len(server.prompt())
    assert reply.usage.completion_tokens == len("Hello, world") + 1
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert reply.model == "tiny"
    assert reply.object == "chat.completion"


def test_a_stream_ends_with_finish_reason_usage_and_done(server):
    chunks = list(
        server.client().chat.completions.create(
            model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello, world"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 12 + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].choices[0].delta.role is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 13
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_the_raw_stream_is_server_sent_events_that_end_with_done(server):
    response = server.post("/v1/chat/completions", {"messages": USER, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    assert "usage" not in msgspec.json.decode(lines[0][6:])


def test_continuous_usage_counts_up(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        server.client().chat.completions.create(model="tiny", messages=USER, stream=True, stream_options=options)
    )
    assert [c.usage.completion_tokens for c in chunks] == [*range(1, 14), 13]


def test_several_tokens_of_one_step_are_one_event(server):
    server.backend.says("Hello, world", per_chunk=4)
    chunks = list(server.client().chat.completions.create(model="tiny", messages=USER, stream=True))
    assert [c.choices[0].delta.content for c in chunks] == ["Hell", "o, w", "orld", ""]


def test_a_character_is_never_split(server):
    server.backend.says("né 猫 🙂")
    chunks = list(server.client().chat.completions.create(model="tiny", messages=USER, stream=True))
    assert [c.choices[0].delta.content for c in chunks] == ["n", "é", " ", "猫", " ", "🙂", ""]


def test_n_choices_are_sequences_of_one_seed_that_differ_in_choice(server):
    server.backend.script = lambda r: server.backend.spoken(r, f"choice {r.params.choice}")
    reply = server.client().chat.completions.create(model="tiny", messages=USER, n=3)
    assert [c.message.content for c in reply.choices] == ["choice 0", "choice 1", "choice 2"]
    assert [c.index for c in reply.choices] == [0, 1, 2]
    requests = server.backend.requests
    assert len({r.params.seed for r in requests}) == 1
    assert len({r.request_id for r in requests}) == 3
    assert reply.usage.prompt_tokens == len("<user>Hi\n<assistant>")
    assert reply.usage.completion_tokens == 3 * 9
    assert reply.usage.prompt_tokens_details.cached_tokens == 3


def test_n_choices_stream_interleaved_each_with_its_own_end(server):
    server.backend.script = lambda r: server.backend.spoken(r, "ab" * (r.params.choice + 1))
    texts, ends = ["", ""], []
    for chunk in server.client().chat.completions.create(model="tiny", messages=USER, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert texts == ["ab", "abab"]
    assert ends == [0, 1]


def test_max_completion_tokens_wins_and_length_is_said(server):
    server.backend.says("Hello, world", ends=False)
    reply = server.client().chat.completions.create(
        model="tiny", messages=USER, max_completion_tokens=4, extra_body={"max_tokens": 7}
    )
    assert reply.choices[0].message.content == "Hell"
    assert reply.choices[0].finish_reason == "length"


def test_without_max_tokens_the_rest_of_the_context_is_allowed(server):
    server.client().chat.completions.create(model="tiny", messages=USER)
    request = server.backend.requests[0]
    assert request.params.max_tokens == 512 - request.num_prompt_tokens


def test_a_stop_string_is_cut_off_and_stops_the_work(server):
    server.backend.says("one two three")
    reply = server.client().chat.completions.create(model="tiny", messages=USER, stop=[" tw", "zzz"])
    assert reply.choices[0].message.content == "one"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].model_extra["stop_reason"] == " tw"
    assert reply.usage.completion_tokens == len("one tw")
    assert server.backend.num_closed_early == 1


def test_a_stop_string_in_one_choice_cancels_only_that_one(server):
    server.backend.script = lambda r: server.backend.spoken(r, "a STOP b" if r.params.choice == 0 else "c d e f g h i")
    reply = server.client().chat.completions.create(model="tiny", messages=USER, n=2, stop="STOP")
    assert [c.message.content for c in reply.choices] == ["a ", "c d e f g h i"]
    assert server.backend.cancelled == [server.backend.requests[0].request_id]


def test_the_stop_string_is_kept_when_asked_for(server):
    server.backend.says("one two three", per_chunk=5)
    reply = server.client().chat.completions.create(
        model="tiny", messages=USER, stop="two", extra_body={"include_stop_str_in_output": True}
    )
    assert reply.choices[0].message.content == "one two"


def test_a_half_stop_string_at_the_end_comes_out(server):
    server.backend.says("one tw")
    reply = server.client().chat.completions.create(model="tiny", messages=USER, stop="two")
    assert reply.choices[0].message.content == "one tw"
    assert reply.choices[0].model_extra["stop_reason"] is None


def test_the_models_end_tokens_stop_unless_ignored(server):
    client = server.client()
    client.chat.completions.create(model="tiny", messages=USER, extra_body={"stop_token_ids": [7]})
    client.chat.completions.create(model="tiny", messages=USER, extra_body={"stop_token_ids": [7], "ignore_eos": True})
    assert [r.params.stop_token_ids for r in server.backend.requests] == [(server.backend.eos, 7), (7,)]


def test_a_clients_stop_token_is_the_stop_reason_and_has_no_text(server):
    bang = server.tokenizer.encode("!", add_special_tokens=False)[0]
    server.backend.script = lambda r: server.backend.spoken(r, "hey!", ends=False)
    body = {"messages": USER, "stop_token_ids": [bang], "max_tokens": 9}
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("hey", bang)
    choice = server.post("/v1/chat/completions", {**body, "include_stop_str_in_output": True}).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("hey!", bang)


def test_logprobs_have_tokens_bytes_and_alternatives(server):
    server.backend.says("é")
    reply = server.client().chat.completions.create(
        model="tiny", messages=USER, logprobs=True, top_logprobs=2, max_tokens=2
    )
    content = reply.choices[0].logprobs.content
    assert [entry.bytes for entry in content] == [[0xC3], [0xA9]]
    assert [entry.logprob for entry in content] == [-0.5, -0.5]
    assert [len(entry.top_logprobs) for entry in content] == [2, 2]
    assert content[0].top_logprobs[0].token == content[0].token


def test_streamed_logprobs_cover_every_token(server):
    server.backend.says("é!")
    chunks = server.client().chat.completions.create(model="tiny", messages=USER, logprobs=True, stream=True)
    entries = [e for c in chunks for e in c.choices[0].logprobs.content]
    assert [e.bytes for e in entries] == [[0xC3], [0xA9], [0x21], list(b"<|end|>")]


def test_token_ids_come_back_when_asked_for(server):
    body = {"messages": USER, "return_token_ids": True}
    reply = server.post("/v1/chat/completions", body).json()
    assert reply["prompt_token_ids"] == prompt_ids(server.backend.requests[0])
    assert server.tokenizer.decode(reply["choices"][0]["token_ids"]) == "Hello, world"
    events = server.post("/v1/chat/completions", {**body, "stream": True}).text.split("\n\n")[:-2]
    chunks = [msgspec.json.decode(line[6:]) for line in events]
    assert chunks[0]["prompt_token_ids"] == reply["prompt_token_ids"]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == reply["choices"][0]["token_ids"]


def test_prompt_sources_come_back_when_asked_for(server):
    body = {"messages": USER, "return_prompt_sources": True}
    want = {"device": 1, "host": 0, "peer": 2, "disk": 0, "remote": 0, "computed": len("<user>Hi\n<assistant>") - 3}
    assert server.post("/v1/chat/completions", body).json()["kvray"] == {"prompt_sources": want}
    last = server.post("/v1/chat/completions", {**body, "stream": True}).text.split("\n\n")[-3]
    assert msgspec.json.decode(last[6:])["kvray"] == {"prompt_sources": want}


def test_prompt_logprobs_come_back_by_token_id(server):
    reply = server.post("/v1/chat/completions", {"messages": USER, "prompt_logprobs": 1}).json()
    ids = prompt_ids(server.backend.requests[0])
    assert reply["prompt_logprobs"][0] is None
    assert [list(entry) for entry in reply["prompt_logprobs"][1:]] == [[str(i)] for i in ids[1:]]
    assert reply["prompt_logprobs"][1][str(ids[1])] == {"logprob": -0.5, "rank": 1, "decoded_token": "u"}


def test_sampling_fields_reach_the_worker(server):
    body = {
        "messages": USER,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "logit_bias": {"5": 1.5},
        "seed": -3,
        "min_tokens": 2,
        "max_tokens": 20,
        "priority": -4,
        "cache_salt": "tenant",
        "session_id": "s",
        "user": "u",
    }
    assert server.post("/v1/chat/completions", body).status_code == 200
    request = server.backend.requests[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, -0.3)
    assert (params.logit_bias, params.seed, params.min_tokens, params.max_tokens) == ({5: 1.5}, 2**64 - 3, 2, 20)
    assert (request.priority, request.salt) == (0, b"tenant")


def test_a_priority_counts_only_where_the_operator_lets_it(serve):
    server = serve(limits=HttpLimits(uses_priority=True))
    for priority in (-4, None):
        assert server.post("/v1/chat/completions", {"messages": USER, "priority": priority}).status_code == 200
    assert [request.priority for request in server.backend.requests] == [-4, 0]


def test_requests_without_a_seed_get_different_ones(server):
    for _ in range(3):
        server.post("/v1/chat/completions", {"messages": USER})
    assert len({r.params.seed for r in server.backend.requests}) == 3


def test_a_temperature_that_would_overflow_is_greedy(server):
    server.post("/v1/chat/completions", {"messages": USER, "temperature": 1e-9})
    assert server.backend.requests[0].params.temperature == 0.0


def test_text_parts_and_the_developer_role_are_rendered(server):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    server.client().chat.completions.create(model="tiny", messages=messages)
    assert server.prompt() == "<system>Be kind.\n<user>a\nb\n<assistant>"


def test_the_final_message_can_be_continued(server):
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    body = {"messages": messages, "continue_final_message": True}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.prompt() == "<user>Hi\n<assistant>Well"
    body = {"messages": USER, "add_generation_prompt": False}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.prompt() == "<user>Hi\n"


def test_a_long_prompt_is_cut_from_the_left_when_asked(server):
    body = {"messages": [{"role": "user", "content": "x" * 1000}], "truncate_prompt_tokens": 20, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.prompt() == "x" * 8 + "\n<assistant>"
    assert server.post("/v1/chat/completions", {**body, "truncate_prompt_tokens": -1}).status_code == 200
    assert server.backend.requests[-1].num_prompt_tokens == 500


def test_special_tokens_show_only_when_asked_for(server):
    server.backend.says("a<|other|>b")
    body = {"messages": USER}
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == "ab"
    body["skip_special_tokens"] = False
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == "a<|other|>b"


@pytest.mark.parametrize(
    ("fields", "kind", "spec"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}},
            "json_schema",
            '{"type":"integer"}',
        ),
        ({"guided_json": '{"type": "null"}'}, "json_schema", '{"type":"null"}'),
        ({"guided_regex": "[0-9]+"}, "regex", "[0-9]+"),
        ({"guided_choice": ["yes", "no"]}, "choice", '["yes","no"]'),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "json_schema", '{"type":"boolean"}'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"guided_grammar": 'start: "a" | "b"'}, "lark", 'start: "a" | "b"'),
    ],
)
def test_structures_become_grammars(server, fields, kind, spec):
    response = server.post("/v1/chat/completions", {"messages": USER, **fields})
    assert response.status_code == 200, response.text
    assert server.backend.requests[0].params.grammar == written(Grammar(kind=kind, spec=spec))


def test_plain_text_is_no_structure(server):
    server.post("/v1/chat/completions", {"messages": USER, "response_format": {"type": "text"}})
    assert server.backend.requests[0].params.grammar is None


def test_generation_config_fills_in_what_the_request_leaves_out(serve, served_model):
    from cluster.openai.backend import GenerationDefaults

    defaults = GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05, max_new_tokens=30)
    server = serve(model=served_model(defaults=defaults))
    server.post("/v1/chat/completions", {"messages": USER})
    server.post("/v1/chat/completions", {"messages": USER, "temperature": 1.0, "top_k": -1, "max_tokens": 40})
    first, second = (r.params for r in server.backend.requests)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.6, 0.95, 20, 1.05)
    assert first.max_tokens == 30
    assert (second.temperature, second.top_p, second.top_k, second.max_tokens) == (1.0, 0.95, 0, 40)


@pytest.mark.slow
async def test_many_streams_at_once_keep_their_own_text(server):
    import asyncio

    import openai

    server.backend.script = lambda r: server.backend.spoken(r, f"seed {r.params.seed} " * 4)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:

        async def one(seed: int) -> str:
            stream = await client.chat.completions.create(model="tiny", messages=USER, seed=seed, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        texts = await asyncio.gather(*[one(seed) for seed in range(16)])
    assert texts == [f"seed {seed} " * 4 for seed in range(16)]
    assert server.http.get(f"{server.url}/health").status_code == 200
