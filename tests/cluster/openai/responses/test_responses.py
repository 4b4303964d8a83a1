"""/v1/responses by the openai client over HTTP."""

from __future__ import annotations

import json
from typing import Literal

import msgspec
import openai
import pydantic
import pytest

from messages.errors import CapacityError, WorkerError
from messages.stream import TokenChunk
from tests.cluster.openai.responses.sse import post, streamed, whole, without_ids

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}


def call(city, name="get_weather"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


# ------------------------------------------------------------------------------------------------------ the response


def test_a_response_says_what_was_asked_and_answered(server):
    reply = whole(server, input="Hi", instructions="Be nice.", temperature=0.5, metadata={"a": "b"}, user="me")
    assert reply["status"] == "completed"
    assert reply["error"] is None
    assert reply["incomplete_details"] is None
    assert [item["type"] for item in reply["output"]] == ["message"]
    assert reply["output"][0]["content"] == [
        {"type": "output_text", "text": "Hello, world", "annotations": [], "logprobs": []}
    ]
    assert (reply["temperature"], reply["metadata"], reply["user"]) == (0.5, {"a": "b"}, "me")
    assert (reply["store"], reply["instructions"]) == (True, "Be nice.")
    num_prompt = len(server.prompt())
    assert reply["usage"] == {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 13,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + 13,
    }
    assert server.prompt() == "<system>Be nice.\n<user>Hi\n<assistant>"


def test_it_asks_the_model_for_the_same_as_chat_does(server):
    settings = {"temperature": 0.3, "top_p": 0.9, "seed": 7, "stop": ["zzz"], "top_k": 5, "presence_penalty": 0.1}
    whole(server, input="Hi", max_output_tokens=20, **settings)
    server.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 20, **settings},
    )
    first, second = server.backend.requests
    assert (first.params, first.token_ids, first.salt) == (second.params, second.token_ids, second.salt)


@pytest.mark.slow
def test_the_client_reads_it_whole_and_streamed(server):
    client = server.client()
    assert client.responses.create(model="tiny", input="Hi").output_text == "Hello, world"
    with client.responses.stream(model="tiny", input="Hi") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == "Hello, world"


def test_a_stream_has_every_event_in_order(server):
    server.backend.says("I look." + call("Oslo") + call("Rome"), per_chunk=20)
    events = streamed(server, input="Hi", tools=[TOOL])
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = ("output_text.delta", "function_call_arguments.delta")
    once = [kind for index, kind in enumerate(kinds) if kind not in deltas or kinds[index - 1] != kind]
    a_call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert once == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *a_call,
        *a_call,
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done


def test_what_is_cut_off_is_incomplete(server):
    server.backend.says("Hello there", ends=False)
    reply = whole(server, input="Hi", max_output_tokens=5)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (reply["output"][0]["status"], reply["output"][0]["content"][0]["text"]) == ("incomplete", "Hello")
    assert reply["completed_at"] is None
    last = streamed(server, input="Hi", max_output_tokens=5)[-1]
    assert last["type"] == "response.incomplete"
    assert without_ids(last["response"]) == without_ids(reply)


def test_a_model_that_says_nothing_has_an_empty_message(server):
    server.backend.says("")
    reply = whole(server, input="Hi")
    assert [item["content"][0]["text"] for item in reply["output"]] == [""]


def test_logprobs_come_where_they_are_included(server):
    asked = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    reply = whole(server, **asked)
    entries = reply["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries[:-1]) == "Hello, world"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    events = streamed(server, **asked)
    assert without_ids(events[-1]["response"]) == without_ids(reply)
    told = [entry for event in events if "delta" in event for entry in event["logprobs"]]
    assert told == entries[: len(told)]
    assert whole(server, input="Hi", top_logprobs=2)["output"][0]["content"][0]["logprobs"] == []


# -------------------------------------------------------------------------------------------------- items, and tools


def test_items_are_messages_calls_and_outputs(server):
    whole(
        server,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How warm?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "20"}]},
        ],
    )
    assert server.prompt() == (
        "<system>Be brief.\n<user>How warm?\n<assistant>I look." + call("Oslo") + call("Rome") + "\n"
        "<tool>3\n<tool>20\n<assistant>"
    )


def test_calls_come_back_as_items_and_are_answered(server):
    client = server.client()
    server.backend.says("I look." + call("Oslo"))
    first = client.responses.create(model="tiny", input="How warm?", tools=[TOOL])
    message, called = first.output
    assert (message.content[0].text, called.name, json.loads(called.arguments)) == (
        "I look.",
        "get_weather",
        {"city": "Oslo"},
    )
    server.backend.says("3 degrees")
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "3"}
    items = [{"role": "user", "content": "How warm?"}, *first.output, result]
    second = client.responses.create(model="tiny", input=items, tools=[TOOL])
    assert second.output_text == "3 degrees"
    assert server.prompt().endswith("<user>How warm?\n<assistant>I look." + call("Oslo") + "\n<tool>3\n<assistant>")


@pytest.mark.parametrize(
    ("choice", "text", "calls"),
    [
        ("auto", call("Oslo"), ["get_weather"]),
        ("none", call("Oslo"), []),
        ("required", '[{"name": "add", "parameters": {}}]', ["add"]),
        ({"type": "function", "name": "get_weather"}, '{"city": "Oslo"}', ["get_weather"]),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]},
            call("Oslo"),
            ["get_weather"],
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]},
            '[{"name": "add", "parameters": {}}]',
            ["add"],
        ),
    ],
)
def test_each_tool_choice(server, choice, text, calls):
    server.backend.says(text)
    for reply in (
        whole(server, input="Hi", tools=[TOOL, ADD], tool_choice=choice),
        streamed(server, input="Hi", tools=[TOOL, ADD], tool_choice=choice)[-1]["response"],
    ):
        assert [item["name"] for item in reply["output"] if item["type"] == "function_call"] == calls
        assert reply["tool_choice"] == choice
        assert [tool["name"] for tool in reply["tools"]] == ["get_weather", "add"]


def test_one_call_where_parallel_ones_are_not_wanted(server):
    server.backend.says(call("Oslo") + call("Rome"))
    reply = whole(server, input="Hi", tools=[TOOL], parallel_tool_calls=False)
    assert [item["type"] for item in reply["output"]] == ["function_call"]
    assert len(whole(server, input="Hi", tools=[TOOL])["output"]) == 2


def test_a_forced_call_that_is_cut_off_is_none(server):
    server.backend.says('[{"name": "add", "parameters": {}}, {"name": "add", "para', ends=False)
    reply = whole(server, input="Hi", tools=[ADD], tool_choice="required", max_output_tokens=50)
    assert [(item["name"], item["status"]) for item in reply["output"]] == [("add", "completed")]
    assert reply["status"] == "incomplete"


def test_a_call_that_is_cut_off_is_incomplete(server):
    server.backend.says(call("Oslo"), ends=False)
    reply = whole(server, input="Hi", tools=[TOOL], max_output_tokens=60)
    assert [item["status"] for item in reply["output"]] == ["incomplete"]


# ------------------------------------------------------------------------------------------------ structured output


class Weather(pydantic.BaseModel):
    city: str
    sky: Literal["grey", "blue"]


def test_structured_output_is_parsed_by_the_client(server):
    client = server.client()
    server.backend.says('{"city":"Oslo","sky":"grey"}')
    parsed = client.responses.parse(model="tiny", input="Hi", text_format=Weather)
    assert parsed.output_parsed == Weather(city="Oslo", sky="grey")
    assert "sky" in server.backend.requests[-1].params.grammar.spec
    with client.responses.stream(model="tiny", input="Hi", text_format=Weather) as stream:
        assert stream.get_final_response().output_parsed == Weather(city="Oslo", sky="grey")
    reply = whole(server, input="Hi", text={"format": {"type": "json_object"}, "verbosity": "low"})
    assert server.backend.requests[-1].params.grammar is not None
    assert reply["text"] == {"format": {"type": "json_object"}, "verbosity": "low"}


# --------------------------------------------------------------------------------------------------- what is kept


def test_a_response_goes_on_from_another_without_its_instructions(server):
    client = server.client()
    server.backend.says("I look." + call("Oslo"))
    first = client.responses.create(model="tiny", input="How warm?", instructions="Be nice.", tools=[TOOL])
    server.backend.says("3 degrees")
    output = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "3"}
    second = client.responses.create(
        model="tiny", input=[output], previous_response_id=first.id, tools=[TOOL], instructions="Be short."
    )
    third = client.responses.create(model="tiny", input="And Rome?", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    assert server.prompt() == (
        "<user>How warm?\n<assistant>I look." + call("Oslo") + "\n<tool>3\n<assistant>3 degrees\n"
        "<user>And Rome?\n<assistant>"
    )
    assert "<system>Be short.\n<user>How warm?" in server.prompt(-2)


def test_a_conversation_branches(server):
    first = whole(server, input="One")
    for text in ("Two", "Three"):
        whole(server, input=text, previous_response_id=first["id"])
        assert server.prompt() == f"<user>One\n<assistant>Hello, world\n<user>{text}\n<assistant>"


def test_a_streamed_response_can_be_gone_on_from(server):
    first = streamed(server, input="One")[-1]["response"]
    whole(server, input="Two", previous_response_id=first["id"])
    assert server.prompt() == "<user>One\n<assistant>Hello, world\n<user>Two\n<assistant>"


def test_a_kept_response_is_retrieved_listed_and_deleted(server):
    client = server.client()
    first = client.responses.create(model="tiny", input="One")
    second = client.responses.create(model="tiny", input="Two", previous_response_id=first.id)
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    listed = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.content[0].text for item in listed] == ["One", "Hello, world", "Two"]
    assert [item.type for item in listed] == ["message"] * 3
    assert len({item.id for item in listed}) == 3
    latest = client.responses.input_items.list(second.id).data
    assert [item.id for item in latest] == [item.id for item in reversed(listed)]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(model="tiny", input="Three", previous_response_id=second.id)
    assert "<user>One" in server.prompt(), "what went on from it keeps what it needs"
    assert third.status == "completed"


def test_items_are_given_again_by_their_ids(server):
    server.backend.says("I look." + call("Oslo"))
    first = whole(server, input="How warm?", tools=[TOOL])
    message, called = first["output"]
    references = [{"type": "item_reference", "id": item["id"]} for item in (message, called)]
    output = {"type": "function_call_output", "call_id": called["call_id"], "output": "3"}
    whole(server, input=[{"role": "user", "content": "How warm?"}, *references, output], tools=[TOOL])
    assert server.prompt().endswith("<user>How warm?\n<assistant>I look." + call("Oslo") + "\n<tool>3\n<assistant>")
    gone = post(server, {"input": [{"type": "item_reference", "id": "msg_0000"}]})
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "input[0].id")


def test_what_is_not_to_be_stored_is_not(server):
    for reply in (
        whole(server, input="Hi", store=False),
        streamed(server, input="Hi", store=False)[-1]["response"],
    ):
        assert reply["store"] is False
        refused = post(server, {"input": "Hi", "previous_response_id": reply["id"]})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (404, "previous_response_id")
        assert error["code"] == "previous_response_not_found"
        assert "kept in memory" in error["message"]


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_refusal_has_its_own_status_whole_and_streamed(server):
    server.backend.refusal = CapacityError("full", retry_after_s=3)
    for is_streamed in (False, True):
        reply = post(server, {"input": "Hi", "stream": is_streamed})
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
        assert reply.headers["retry-after"] == "3"


def test_a_stream_that_breaks_ends_with_failed(server):
    def broken(request):
        chunks = server.backend.spoken(request, "Hello there")[:5]
        error = WorkerError("a worker was lost").info()
        return [*chunks, TokenChunk(request_id=request.request_id, finish_reason="error", error=error)]

    server.backend.script = broken
    events = streamed(server, input="Hi")
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "a worker was lost"}
    assert last["response"]["output"][0]["content"][0]["text"] == "Hello"
    gone = post(server, {"input": "Hi", "previous_response_id": last["response"]["id"]})
    assert gone.status_code == 404, "a failed response is not kept"
    assert post(server, {"input": "Hi"}).status_code == 503


def test_a_client_that_leaves_stops_its_response(server):
    server.backend.says("x" * 200)
    server.backend.delay_s = 0.01
    with server.client().responses.create(model="tiny", input="Hi", stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                break
    server.wait_idle()
    assert server.backend.num_closed_early == 1


def test_fields_that_change_nothing_are_taken(server):
    reply = whole(
        server,
        input="Hi",
        background=False,
        truncation="disabled",
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low", "summary": "auto"},
        service_tier="auto",
        max_tool_calls=3,
        prompt_cache_key="k",
        safety_identifier="s",
        stream_options=None,
        something_new=1,
    )
    assert reply["reasoning"] == {"effort": "low", "summary": "auto"}
    assert reply["service_tier"] == "default"


def test_the_effort_is_given_to_the_template(serve):
    server = serve("{{ reasoning_effort }}:{% for m in messages %}{{ m.content }}{% endfor %}")
    whole(server, input="Hi", reasoning={"effort": "high"})
    assert server.prompt() == "high:Hi"


def test_no_effort_asks_for_no_thought(serve):
    server = serve(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<think></think>' if enable_thinking is false else '<think>' }}{% endif %}"
    )
    server.backend.says("Hm.</think>Hello")
    assert [item["type"] for item in whole(server, input="Hi")["output"]] == ["reasoning", "message"]
    server.backend.says("Hello</think>")
    for off in ({"reasoning": {"effort": "none"}}, {"chat_template_kwargs": {"enable_thinking": False}}):
        (message,) = whole(server, input="Hi", **off)["output"]
        assert message["content"][0]["text"] == "Hello</think>"


def test_hints_of_the_cache_are_taken_as_in_chat(server):
    refused = post(server, {"input": "Hi", "kvray": {"cache": {"pin": {}}}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "kvray.cache")


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("POST", "/v1/embeddings", "embeddings"),
        ("POST", "/v1/audio/speech", "speech"),
        ("POST", "/v1/images/generations", "images"),
        ("POST", "/v1/moderations", "moderation"),
        ("POST", "/v1/messages", "Anthropic"),
        ("POST", "/v1/messages/count_tokens", "Anthropic"),
        ("POST", "/v1/rerank", "ranking"),
        ("GET", "/v1/batches", "batches"),
        ("GET", "/v1/files/file-1", "files"),
        ("POST", "/v1/assistants", "assistants"),
        ("POST", "/v1/threads/t/runs", "assistants"),
        ("POST", "/v1/conversations", "conversations"),
        ("GET", "/v1/vector_stores", "vector stores"),
        ("POST", "/v1/fine_tuning/jobs", "training"),
        ("POST", "/v1/responses/resp_1/cancel", "cancelling"),
        ("POST", "/v1/responses/compact", "compacting"),
        ("POST", "/v1/responses/input_tokens", "counting"),
    ],
)
def test_what_is_not_built_says_so_by_name(server, method, path, name):
    reply = server.http.request(method, server.url + path)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "not_served")
    assert name in error["message"]


def test_documentation_has_its_types(server):
    schema = server.http.get(server.url + "/openapi.json").json()
    assert {"post"} == set(schema["paths"]["/v1/responses"])
    assert {"get", "delete"} == set(schema["paths"]["/v1/responses/{response_id}"])
    assert {"ResponsesRequest", "ResponseReply", "ItemList"} <= set(schema["components"]["schemas"])


def test_requests_are_counted_by_their_paths(server):
    reply = whole(server, input="Hi")
    server.http.get(f"{server.url}/v1/responses/{reply['id']}")
    page = server.http.get(server.url + "/metrics").text
    for path in ("/v1/responses", "/v1/responses/{id}"):
        assert f'kvray_http_requests_total{{endpoint="{path}",status="200"}}' in page


def test_raw_bytes_of_a_stored_response_are_those_that_were_sent(server):
    sent = post(server, {"input": "Hi"})
    got = server.http.get(f"{server.url}/v1/responses/{sent.json()['id']}")
    assert got.content == sent.content
    assert msgspec.json.decode(got.content)["object"] == "response"
