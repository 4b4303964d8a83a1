"""Whatever a client sends: a 4xx with OpenAI's error object that names the field, and nothing held afterwards."""

from __future__ import annotations

import json
import logging
import re
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
LONG = "x" * 600
NESTED = '{"a":' * 3000 + "1" + "}" * 3000


# path, changed fields, status, param, what the message must show
FIELDS = [
    # models, messages, prompts
    (CHAT, {"model": "other"}, 404, "model", '"other"'),
    (TEXT, {"model": "other"}, 404, "model", "tiny, alias"),
    (CHAT, {"model": 3}, 400, "model", "3"),
    (CHAT, {"messages": None}, 400, "messages", "want array"),
    (CHAT, {"messages": []}, 400, "messages", "length >= 1"),
    (CHAT, {"messages": "Hi"}, 400, "messages", '"Hi"'),
    (CHAT, {"messages": [3]}, 400, "messages[0]", "3"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "wizard"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "3"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        400,
        "messages[0].content[0].type",
        "image_url",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        400,
        "messages[0].content[0].type",
        "input_audio",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "messages[0].content[0].text",
        "missing",
    ),
    (CHAT, {"messages": [{"role": "user", "content": LONG}]}, 400, "messages", "at most 500"),
    (CHAT, {"messages": [{"role": "user", "content": LONG * 60}]}, 400, "messages", "at most 500"),
    (TEXT, {"prompt": None}, 400, "prompt", "want str"),
    (TEXT, {"prompt": ""}, 400, "prompt", '""'),
    (TEXT, {"prompt": []}, 400, "prompt", "[]"),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt", '{"a":1}'),
    (TEXT, {"prompt": ["a", ""]}, 400, "prompt[1]", '""'),
    (TEXT, {"prompt": ["a", 1]}, 400, "prompt[1]", "1"),
    (TEXT, {"prompt": [1, "a"]}, 400, "prompt[1]", '"a"'),
    (TEXT, {"prompt": [[1], []]}, 400, "prompt[1]", "[]"),
    (TEXT, {"prompt": [[1], 2]}, 400, "prompt[1]", "2"),
    (TEXT, {"prompt": [1, 264]}, 400, "prompt[1]", "264"),
    (TEXT, {"prompt": [-1]}, 400, "prompt[0]", "-1"),
    (TEXT, {"prompt": [1.5]}, 400, "prompt[0]", "1.5"),
    (TEXT, {"prompt": [True]}, 400, "prompt[0]", "true"),
    (TEXT, {"prompt": [None]}, 400, "prompt[0]", "null"),
    (TEXT, {"prompt": [10**30]}, 400, "prompt[0]", "1000"),
    (TEXT, {"prompt": LONG}, 400, "prompt", "600"),
    (TEXT, {"prompt": [5] * 501}, 400, "prompt", "501"),
    (TEXT, {"prompt": "x" * 50_000}, 400, "prompt", "at most 500"),
    (TEXT, {"suffix": "end"}, 400, "suffix", '"end"'),
    (TEXT, {"best_of": 3}, 400, "best_of", "3"),
    # numbers
    (CHAT, {"max_tokens": 0}, 400, "max_tokens", "0"),
    (TEXT, {"max_tokens": 0}, 400, "max_tokens", "0"),
    (CHAT, {"max_tokens": -5}, 400, "max_tokens", "-5"),
    (CHAT, {"max_tokens": 1.5}, 400, "max_tokens", "1.5"),
    (CHAT, {"max_tokens": True}, 400, "max_tokens", "true"),
    (CHAT, {"max_tokens": "7"}, 400, "max_tokens", '"7"'),
    (CHAT, {"max_tokens": 511}, 400, "max_tokens", "512"),
    (CHAT, {"max_tokens": 10**40}, 400, "max_tokens", "1000"),
    (CHAT, {"max_completion_tokens": 0}, 400, "max_completion_tokens", "0"),
    (CHAT, {"max_completion_tokens": 9999}, 400, "max_completion_tokens", "9999"),
    (CHAT, {"temperature": -0.1}, 400, "temperature", "-0.1"),
    (CHAT, {"temperature": 1e6}, 400, "temperature", "100"),
    (CHAT, {"temperature": True}, 400, "temperature", "true"),
    (CHAT, {"temperature": "hot"}, 400, "temperature", '"hot"'),
    (CHAT, {"top_p": 0}, 400, "top_p", "0"),
    (CHAT, {"top_p": 1.01}, 400, "top_p", "1.01"),
    (CHAT, {"top_k": -2}, 400, "top_k", "-2"),
    (CHAT, {"top_k": 2.5}, 400, "top_k", "2.5"),
    (CHAT, {"min_p": 2}, 400, "min_p", "2"),
    (CHAT, {"presence_penalty": 2.5}, 400, "presence_penalty", "2.5"),
    (CHAT, {"frequency_penalty": -9}, 400, "frequency_penalty", "-9"),
    (CHAT, {"repetition_penalty": 0}, 400, "repetition_penalty", "0"),
    (CHAT, {"repetition_penalty": 1e9}, 400, "repetition_penalty", "1000000000"),
    (CHAT, {"repetition_penalty": 1e-38}, 400, "repetition_penalty", "1e-38"),
    ("/v1/completions", {"prompt": "a", "repetition_penalty": 5e-324}, 400, "repetition_penalty", "5e-324"),
    (RESPONSES, {"repetition_penalty": 1e-300}, 400, "repetition_penalty", "1e-300"),
    (CHAT, {"min_tokens": 30, "max_tokens": 20}, 400, "min_tokens", "30"),
    (CHAT, {"min_tokens": -1}, 400, "min_tokens", "-1"),
    (CHAT, {"seed": 2**70}, 400, "seed", str(2**70)),
    (CHAT, {"seed": 0.5}, 400, "seed", "0.5"),
    (CHAT, {"n": 0}, 400, "n", "0"),
    (CHAT, {"n": 9}, 400, "n", "9"),
    (CHAT, {"n": 10**9}, 400, "n", "1 to 8"),
    (TEXT, {"n": 8, "prompt": ["a", "b", "c"]}, 400, "n", "16"),
    (CHAT, {"priority": 2**40}, 400, "priority", str(2**40)),
    (CHAT, {"truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens", "-2"),
    (CHAT, {"truncate_prompt_tokens": 9999}, 400, "truncate_prompt_tokens", "9999"),
    (TEXT, {"truncate_prompt_tokens": 0}, 400, "prompt", "no tokens"),
    # stops, biases, logprobs
    (CHAT, {"stop": ""}, 400, "stop", '""'),
    (CHAT, {"stop": ["a", ""]}, 400, "stop[1]", '""'),
    (CHAT, {"stop": ["x"] * 33}, 400, "stop", "33"),
    (CHAT, {"stop": "x" * 1025}, 400, "stop", "1024"),
    (CHAT, {"stop": ["a", 3]}, 400, "stop[1]", "3"),
    (CHAT, {"stop": {"a": 1}}, 400, "stop", '{"a":1}'),
    (CHAT, {"stop_token_ids": [264]}, 400, "stop_token_ids[0]", "264"),
    (CHAT, {"stop_token_ids": [-1]}, 400, "stop_token_ids[0]", "-1"),
    (CHAT, {"stop_token_ids": [1] * 1025}, 400, "stop_token_ids", "1025"),
    (CHAT, {"logit_bias": {"x": 1}}, 400, "logit_bias", '"x"'),
    (CHAT, {"logit_bias": {"264": 1}}, 400, "logit_bias", "264"),
    (CHAT, {"logit_bias": {"-1": 1}}, 400, "logit_bias", "-1"),
    (CHAT, {"logit_bias": {"٣": 1}}, 400, "logit_bias", "263"),
    (CHAT, {"logit_bias": {"1" * 5000: 1}}, 400, "logit_bias", "1111"),
    (CHAT, {"logit_bias": {"1": 101}}, 400, "logit_bias", "101"),
    (CHAT, {"logit_bias": [1]}, 400, "logit_bias", "[1]"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "logprobs", "21"),
    (CHAT, {"logprobs": 2}, 400, "logprobs", "2"),
    (TEXT, {"logprobs": 21}, 400, "logprobs", "21"),
    (TEXT, {"logprobs": True}, 400, "logprobs", "true"),
    (CHAT, {"prompt_logprobs": 21}, 400, "prompt_logprobs", "21"),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "stream"),
    (CHAT, {"stream": "yes"}, 400, "stream", '"yes"'),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage", "1"),
    # structures
    (CHAT, {"response_format": {"type": "yaml"}}, 400, "response_format.type", '"yaml"'),
    (CHAT, {"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema.schema", "missing"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": [1]}}},
        400,
        "response_format.json_schema.schema",
        "[1]",
    ),
    (CHAT, {"guided_json": {"type": "wrong"}}, 400, "guided_json", "wrong"),
    (CHAT, {"guided_json": {"type": "integer", "minimum": 5, "maximum": 2}}, 400, "guided_json", ""),
    (CHAT, {"guided_json": {"enum": []}}, 400, "guided_json", ""),
    (CHAT, {"guided_json": {"$ref": "#/$defs/none"}}, 400, "guided_json", "none"),
    (CHAT, {"guided_json": "{"}, 400, "guided_json", '"{"'),
    (CHAT, {"guided_json": True}, 400, "guided_json", "true"),
    (CHAT, {"guided_regex": "(["}, 400, "guided_regex", "(["),
    (CHAT, {"guided_choice": []}, 400, "guided_choice", "[]"),
    (CHAT, {"guided_choice": ["a", ""]}, 400, "guided_choice", '""'),
    (CHAT, {"guided_grammar": "start: ("}, 400, "guided_grammar", ""),
    (CHAT, {"structured_outputs": {"regex": "(["}}, 400, "structured_outputs.regex", "(["),
    (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice", "guided_regex and guided_choice"),
    # tools
    (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": "maybe"}, 400, "tool_choice", '"maybe"'),
    (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400,
        "tool_choice.function.name",
        '"g"',
    ),
    (CHAT, {"tools": [TOOL, TOOL]}, 400, "tools[1].function.name", '"f"'),
    (CHAT, {"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, 400, "tools[0].type", '"retrieval"'),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools[0].function", "missing"),
    (CHAT, {"tools": {"a": 1}}, 400, "tools", '{"a":1}'),
    (CHAT, {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, 400, "guided_regex", "tool_choice"),
    # vLLM's extras
    (CHAT, {"request_id": "a b"}, 400, "request_id", '"a b"'),
    (CHAT, {"cache_salt": ""}, 400, "cache_salt", '""'),
    (CHAT, {"session_id": "x" * 300}, 400, "session_id", "256"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs.messages", "messages"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, 400, "continue_final_message", "both"),
    # tokens
    ("/tokenize", {}, 400, "prompt", "either"),
    ("/tokenize", {"prompt": "a", "messages": USER}, 400, "prompt", "either"),
    ("/tokenize", {"messages": []}, 400, "messages", "at least one"),
    ("/tokenize", {"prompt": 3}, 400, "prompt", "3"),
    ("/detokenize", {}, 400, "tokens", "missing"),
    ("/detokenize", {"tokens": [264]}, 400, "tokens[0]", "264"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]", "-1"),
    ("/detokenize", {"tokens": [1.5]}, 400, "tokens[0]", "1.5"),
]

BASE = {CHAT: {"messages": USER}, TEXT: {"prompt": "a"}, RESPONSES: {"input": "a"}, "/tokenize": {}, "/detokenize": {}}


def check_error(response, status, param, shown):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "authentication_error")
    assert error["code"]
    assert error["param"] == param
    assert shown in error["message"]
    assert len(error["message"]) < 500
    assert "\n" not in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "fields", "status", "param", "shown"), FIELDS)
def test_a_bad_field_is_named_with_what_was_seen(server, path, fields, status, param, shown):
    response = server.post(path, {**BASE[path], **fields})
    check_error(response, status, param, shown)
    assert server.backend.requests == []
    assert server.backend.num_active == 0


MESSAGES = b'{"messages":[{"role":"user","content":"Hi"}]'

BODIES = [
    (b"", None, "empty"),
    (b"   ", None, "empty"),
    (b"{", None, "broken JSON"),
    (b"[]", None, "want object"),
    (b'"text"', None, "want object"),
    (b"null", None, "want object"),
    (MESSAGES, None, "broken JSON"),
    (MESSAGES + b"} trailing", None, "trailing"),
    (MESSAGES + b',"temperature":NaN}', "temperature", "NaN"),
    (MESSAGES + b',"temperature":Infinity}', "temperature", "Infinity"),
    (MESSAGES + b',"temperature":-Infinity}', "temperature", "Infinity"),
    (MESSAGES + b',"temperature":1e400}', "temperature", "1e400"),
    (MESSAGES + b',"temperature":' + b"9" * 400 + b"}", "temperature", "999"),
    (MESSAGES + b',"max_tokens":' + b"9" * 5000 + b"}", "max_tokens", "999"),
    (MESSAGES + b',"max_tokens":1e400}', "max_tokens", "1e400"),
    (MESSAGES + b',"logit_bias":{"1":1e400}}', "logit_bias", "range"),
    (MESSAGES + b',"guided_json":{"minimum":1e400}}', "guided_json", "range"),
    (MESSAGES + b',"user":"\xff\xfe"}', None, "UTF-8"),
    (MESSAGES + b',"user":"\xed\xa0\x80"}', None, "UTF-8"),
    (MESSAGES + b',"user":"a\x00b"}', "user", "broken JSON"),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', None, "surrogate"),
    (b'{"messages":[{"role":"user","content":"\\udc00\\ud800"}]}', None, "surrogate"),
    (b'{"messages":[{"role":"user","content":"\\ud800 x"}]}', None, "surrogate"),
    (MESSAGES + b',"user":"\\x"}', "user", "broken JSON"),
    (MESSAGES + b',"metadata":' + NESTED.encode() + b"}", None, "nested"),
    (MESSAGES + b',"unknown":' + b"[" * 20_000 + b"]" * 20_000 + b"}", None, "nested"),
    (b"[" * 60_000, None, ""),
    ("﻿{}".encode(), None, "broken JSON"),
    ('{"messages":[]}'.encode("utf-16"), None, "UTF-8"),
]


@pytest.mark.parametrize(("body", "param", "shown"), BODIES)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_broken_body_is_a_400(server, path, body, param, shown):
    if path == TEXT:
        body = body.replace(b'"messages":[{"role":"user","content":"Hi"}]', b'"prompt":"a"')
        body = body.replace(b'"messages":[{"role":"user","content":', b'"prompt":').replace(b"}]}", b"}")
    response = server.http.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
    check_error(response, 400, param, shown)
    assert server.backend.requests == []


def test_other_content_types_are_a_415(server):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = server.http.post(server.url + CHAT, content=b"{}", headers={"Content-Type": content_type})
        check_error(response, 415, None, content_type.partition(";")[0])


def test_json_may_come_without_or_with_a_fancier_content_type(server):
    body = json.dumps({"messages": USER}).encode()
    for headers in (
        {},
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": "application/vnd.x+json"},
    ):
        assert server.http.post(server.url + CHAT, content=body, headers=headers).status_code == 200


def test_wrong_methods_and_paths_have_the_error_object(server):
    response = server.http.get(server.url + CHAT)
    check_error(response, 405, None, "GET")
    assert response.headers["allow"] == "POST"
    check_error(server.http.delete(f"{server.url}/v1/models"), 405, None, "DELETE")
    check_error(server.http.get(f"{server.url}/v1/nothing"), 404, None, "/v1/nothing")
    check_error(server.http.get(f"{server.url}/v1/models/nothing"), 404, "model", "nothing")


def test_a_body_over_the_limit_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {10**15}\r\n\r\n"
        sock.sendall(head.encode() + b"{")
        answer = sock.recv(65536)
    assert b" 413 " in answer
    assert b"at most 65536 bytes" in answer


def test_a_body_of_unknown_length_is_cut_at_the_limit(server):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(100_000):
            sent += 65536
            yield b" " * 65536

    headers = {"Content-Type": "application/json"}
    try:
        response = server.http.post(server.url + CHAT, content=endless(), headers=headers)
    except (httpx.WriteError, httpx.ReadError):  # the server closed the connection while we were still sending
        pass
    else:
        check_error(response, 413, None, "65536")
    assert sent < 200 * 65536


def test_unknown_fields_are_ignored_and_logged_once_per_name(serve, caplog):
    server = serve()
    with caplog.at_level(logging.INFO, logger="cluster.openai"):
        for _ in range(3):
            body = {"messages": USER, "brand_new_field": {"a": 1}, 'evil"\n': 1, "user": "known"}
            assert server.post(CHAT, body).status_code == 200
    lines = [r.getMessage() for r in caplog.records if "unknown request field" in r.getMessage()]
    assert len(lines) == 2
    assert any("brand_new_field" in line for line in lines)
    assert not any("\n" in line for line in lines)


def test_nulls_mean_left_out(server):
    body = {name: None for name in ChatRequest.__struct_fields__ if name != "messages"}
    assert server.post(CHAT, {**body, "messages": USER}).status_code == 200


def test_a_template_that_refuses_is_a_400(serve):
    server = serve("{{ raise_exception('roles must alternate') }}")
    check_error(server.post(CHAT, {"messages": USER}), 400, "messages", "roles must alternate")


def test_a_prompt_longer_than_the_pool_says_so(serve, served_model):
    server = serve(model=served_model(max_prompt_tokens=10))
    response = server.post(TEXT, {"prompt": "x" * 11, "max_tokens": 1})
    check_error(response, 400, "prompt", "this model's maximum context length is 11 tokens here, as the KV cache")
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert server.post(TEXT, {"prompt": "x" * 10, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_text_that_cannot_fit_is_not_encoded_to_its_end(serve, served_model, path):
    server = serve(model=served_model(max_prompt_tokens=10))
    words = "ab cd " * 10_000  # a token each character
    body = {"prompt": words} if path == TEXT else {"messages": [{"role": "user", "content": words}]}
    error = server.post(path, body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert 10 < int(re.search(r"at least (\d+) tokens", error["message"])[1]) < 40_000


@pytest.mark.parametrize(
    ("path", "fields", "numbers"),
    [
        (TEXT, {"prompt": "x" * 600}, ("600", "501")),
        (TEXT, {"prompt": "x" * 100, "max_tokens": 500}, ("500", "412", "512", "100")),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, ("501",)),
        (CHAT, {"max_completion_tokens": 10**6}, ("1000000", "512")),
        (RESPONSES, {"input": "x" * 600}, ("501",)),
        (RESPONSES, {"max_output_tokens": 10**6}, ("1000000", "512")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_agents_find_the_words_by_which_they_know_that_a_context_is_full(server, path, fields, numbers, stream):
    response = server.post(path, {**BASE[path], **fields, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "this model's maximum context length is" in error["message"]
    assert "context_length_exceeded" in error["message"]
    assert set(numbers) <= set(re.findall(r"\d+", error["message"]))


CHANGES = {
    "echo": True,
    "documents": [{"text": "a"}],
    "modalities": ["text", "audio"],
    "truncation_side": "right",
    "watermarking": True,
    "kv_transfer_params": {"do_remote_decode": True},
    "repetition_detection": {"max_pattern_size": 3},
    "mm_processor_kwargs": {"x": 1},
    "max_new_tokens": 5,
    "repeat_penalty": 1.1,
    "typical_p": 0.5,
    "do_sample": False,
    "best_of": 3,
    "thinking_token_budget": 10,
    "stop_sequences": ["x"],
    "random_seed": 1,
    "lora": [{"id": 0}],
}
HARMLESS = {
    "echo": False,
    "documents": [],
    "modalities": ["text"],
    "truncation_side": "left",
    "kv_transfer_params": None,
    "repeat_penalty": 1.0,
    "typical_p": 1.0,
    "verbosity": "low",
    "prompt_cache_key": "k",
    "spaces_between_special_tokens": True,
    "stream_options": {},
    "top_logprobs": 0,
    "nobody_knows": {"a": [1]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(server, name):
    check_error(server.post(CHAT, {"messages": USER, name: CHANGES[name]}), 400, name, "want")
    assert server.backend.requests == []


@pytest.mark.parametrize(
    ("name", "value", "harmless", "wanted"),
    [
        ("max_completion_tokens", 50, None, "max_tokens"),
        ("top_logprobs", 2, 0, "logprobs"),
        ("tools", [{"type": "function", "function": {"name": "f"}}], [], "/v1/chat/completions"),
    ],
)
def test_a_field_of_chats_that_would_change_a_completion_is_refused_by_its_name(server, name, value, harmless, wanted):
    check_error(server.post("/v1/completions", {"prompt": "a", name: value}), 400, name, f"want {wanted}")
    assert server.post("/v1/completions", {"prompt": "a", name: harmless}).status_code == 200


def test_fields_that_change_nothing_are_taken_and_unknown_ones_are_told_the_operator(server, caplog):
    for name, value in HARMLESS.items():
        assert server.post(CHAT, {"messages": USER, name: value}).status_code == 200, name
    told = [record for record in caplog.records if "nobody_knows" in record.message]
    assert [record.levelname for record in told] in ([], ["WARNING"]), "once a process"


def test_without_an_end_token_structures_are_refused(serve, served_model):
    server = serve(model=served_model(eos_token_ids=()))
    check_error(server.post(CHAT, {"messages": USER, "guided_regex": "a"}), 400, "guided_regex", "end token")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=10),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([CHAT, TEXT, "/tokenize", "/detokenize"]), data=st.data())
def test_no_json_whatsoever_is_a_500(server, path, data):
    kinds = {CHAT: ChatRequest, TEXT: CompletionRequest, "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}
    names = st.sampled_from(kinds[path].__struct_encode_fields__)
    body = {**BASE[path], **data.draw(st.dictionaries(names, JSON, max_size=3))}
    response = server.post(path, body)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["param"] is not None, (body, response.text)
