"""Whatever a client sends to /v1/responses: a 4xx that names the field as this endpoint calls it, never a 5xx."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.openai.responses.protocol import InputItem, ResponsesRequest
from tests.cluster.openai.responses.sse import post

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
NESTED = '{"a":' * 3000 + "1" + "}" * 3000

# changed fields, status, param, what the message must show
FIELDS = [
    ({"model": "other"}, 404, "model", '"other"'),
    ({"model": 3}, 400, "model", "3"),
    ({"input": None}, 400, "input", "want"),
    ({"input": []}, 400, "input", "length >= 1"),
    ({"input": 3}, 400, "input", "3"),
    ({"input": [3]}, 400, "input[0]", "3"),
    ({"input": [{}]}, 400, "input[0].role", "missing"),
    ({"input": [{"role": "wizard", "content": "x"}]}, 400, "input[0].role", "wizard"),
    ({"input": [{"role": "user"}]}, 400, "input[0].content", "missing"),
    ({"input": [{"role": "user", "content": 3}]}, 400, "input[0].content", "3"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        400,
        "input[0].content[0].type",
        "input_image",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        400,
        "input[0].content[0].type",
        "input_file",
    ),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, 400, "input[0].type", "web_search_call"),
    ({"input": [CALL, {"type": "function_call_output", "call_id": "b", "output": "x"}]}, 400, "input[1].call_id", "b"),
    ({"input": [{"type": "item_reference"}]}, 400, "input[0].id", "missing"),
    ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, "input[0].id", "msg_x"),
    ({"input": "x" * 5000}, 400, "input", "want at most"),
    ({"input": [{"role": "user", "content": "x" * 497}]}, 400, "input", "want at most 500"),
    ({"instructions": 3}, 400, "instructions", "3"),
    ({"instructions": ["x"]}, 400, "instructions", "x"),
    ({"previous_response_id": 3}, 400, "previous_response_id", "3"),
    ({"previous_response_id": "resp_none"}, 404, "previous_response_id", "resp_none"),
    ({"previous_response_id": ""}, 404, "previous_response_id", '""'),
    ({"store": "yes"}, 400, "store", "yes"),
    ({"stream": "yes"}, 400, "stream", "yes"),
    ({"stream_options": 3}, 400, "stream_options", "3"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens", "0"),
    ({"max_tokens": 5}, 400, "max_tokens", "want max_output_tokens"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "want text.format"),
    ({"guided_choice": ["a"]}, 400, "guided_choice", "want text.format"),
    ({"n": 2}, 400, "n", "want 1"),
    ({"logprobs": True}, 400, "logprobs", "message.output_text.logprobs"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort", "want reasoning.effort"),
    ({"max_output_tokens": 5000}, 400, "max_output_tokens", "5000"),
    ({"max_output_tokens": "x"}, 400, "max_output_tokens", "x"),
    ({"temperature": -1}, 400, "temperature", "-1"),
    ({"temperature": "hot"}, 400, "temperature", "hot"),
    ({"top_p": 2}, 400, "top_p", "2"),
    ({"top_p": 0}, 400, "top_p", "0"),
    ({"top_logprobs": 21}, 400, "top_logprobs", "21"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, 400, "top_logprobs", "21"),
    ({"include": ["everything"]}, 400, "include[0]", "everything"),
    ({"include": "x"}, 400, "include", "x"),
    ({"metadata": {"a": 3}}, 400, "metadata", "3"),
    ({"metadata": {"a" * 65: "b"}}, 400, "metadata", "64"),
    ({"metadata": {"a": "b" * 513}}, 400, "metadata", "512"),
    ({"metadata": {str(i): "b" for i in range(17)}}, 400, "metadata", "16"),
    ({"truncation": "auto"}, 400, "truncation", "disabled"),
    ({"truncation": "most"}, 400, "truncation", "most"),
    ({"background": True}, 400, "background", "true"),
    ({"prompt": {"id": "pmpt_1"}}, 400, "prompt", "pmpt_1"),
    ({"conversation": "conv_1"}, 400, "conversation", "previous_response_id"),
    ({"context_management": [{"type": "compaction"}]}, 400, "context_management", "compact"),
    ({"moderation": {"model": "x"}}, 400, "moderation", "x"),
    ({"reasoning": "high"}, 400, "reasoning", "high"),
    ({"reasoning": {"effort": 3}}, 400, "reasoning.effort", "3"),
    ({"parallel_tool_calls": 3}, 400, "parallel_tool_calls", "3"),
    # tools
    ({"tools": 3}, 400, "tools", "3"),
    ({"tools": [{"name": "f"}]}, 400, "tools[0].type", "missing"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].name", "missing"),
    ({"tools": [{"type": "function", "name": ""}]}, 400, "tools[0].name", ">= 1"),
    ({"tools": [TOOL, TOOL]}, 400, "tools[1].name", '"f"'),
    ({"tools": [{**TOOL, "parameters": 3}]}, 400, "tools[0].parameters", "3"),
    *[
        ({"tools": [TOOL, {"type": kind}]}, 400, "tools[1].type", kind)
        for kind in (
            "web_search",
            "web_search_preview",
            "file_search",
            "code_interpreter",
            "computer_use_preview",
            "image_generation",
            "mcp",
            "local_shell",
            "custom",
        )
    ],
    ({"tool_choice": "some", "tools": [TOOL]}, 400, "tool_choice", "some"),
    ({"tool_choice": "required"}, 400, "tool_choice", "tools"),
    ({"tool_choice": 3, "tools": [TOOL]}, 400, "tool_choice", "3"),
    ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, 400, "tool_choice", "missing"),
    ({"tool_choice": {"type": "function", "name": "g"}, "tools": [TOOL]}, 400, "tool_choice.name", "g"),
    ({"tool_choice": {"type": "web_search"}, "tools": [TOOL]}, 400, "tool_choice.type", "web_search"),
    ({"tool_choice": {"type": "allowed_tools", "tools": []}, "tools": [TOOL]}, 400, "tool_choice.mode", "missing"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}, "tools": [TOOL]},
        400,
        "tool_choice.tools",
        "at least one",
    ),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "any", "tools": [TOOL]}, "tools": [TOOL]},
        400,
        "tool_choice.mode",
        "any",
    ),
    (
        {
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            "tools": [TOOL],
        },
        400,
        "tool_choice.tools[0].name",
        "g",
    ),
    (
        {"tool_choice": {"type": "function", "name": "f"}, "tools": [{**TOOL, "parameters": {"type": "nothing"}}]},
        400,
        "tools[0].parameters",
        "nothing",
    ),
    # structured output
    ({"text": 3}, 400, "text", "3"),
    ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type", "xml"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema", "missing"),
    ({"text": {"format": {"type": "json_schema", "schema": 3}}}, 400, "text.format.schema", "3"),
    (
        {"text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
        400,
        "text.format.schema",
        "nothing",
    ),
    ({"text": {"verbosity": "loud"}}, 400, "text.verbosity", "loud"),
    # the others
    ({"top_k": -2}, 400, "top_k", "-2"),
    ({"stop": ["x"] * 33}, 400, "stop", "33"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "x"),
    ({"min_tokens": 9, "max_output_tokens": 3}, 400, "min_tokens", "9"),
    ({"request_id": "no spaces"}, 400, "request_id", "no spaces"),
    ({"cache_salt": ""}, 400, "cache_salt", '""'),
    ({"chat_template_kwargs": 3}, 400, "chat_template_kwargs", "3"),
    ({"kvray": {"x": 1}}, 400, "kvray", "x"),
]


@pytest.mark.parametrize(("changes", "status", "param", "shown"), FIELDS)
def test_a_bad_field_is_named(server, changes, status, param, shown):
    reply = post(server, {"input": "Hi", **changes})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert shown in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not server.backend.requests


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "3", NESTED, '{"input": "Hi", "tools": ' + NESTED + "}", '{"input": ' + NESTED + "}"]
)
def test_a_broken_body_is_a_400(server, body):
    url, headers = f"{server.url}/v1/responses", {"content-type": "application/json"}
    reply = server.http.post(url, content=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?stream=true", "stream"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=nothing", "after"),
    ],
)
def test_a_bad_query_is_named(server, path, param):
    made = post(server, {"input": "Hi"}).json()["id"]
    reply = server.http.get(f"{server.url}/v1/responses/{made}{path}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["", "/input_items"])
def test_an_unknown_response_is_a_404(server, path):
    reply = server.http.get(f"{server.url}/v1/responses/resp_x{path}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "response_id")


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(ResponsesRequest.__struct_fields__)
ITEMS = st.lists(
    st.dictionaries(
        st.sampled_from(InputItem.__struct_fields__),
        st.sampled_from(
            [
                "message",
                "function_call",
                "function_call_output",
                "reasoning",
                "item_reference",
                "user",
                "assistant",
                "x",
            ]
        )
        | st.lists(
            st.fixed_dictionaries({"type": st.sampled_from(["input_text", "reasoning_text"]), "text": st.text()})
        )
        | JUNK,
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(NAMES, JUNK, max_size=4), items=st.just("Hi") | ITEMS)
def test_junk_is_never_a_5xx(server, fields, items):
    reply = post(server, {"input": items, "max_output_tokens": 5, **fields})
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        assert reply.json()["error"]["type"] == "invalid_request_error"
