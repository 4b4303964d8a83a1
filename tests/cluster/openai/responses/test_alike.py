"""Random valid requests say the same as chats, as responses and as completions, each of them whole and streamed."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.cluster.openai.conftest import prompt_ids
from tests.cluster.openai.responses.sse import post, streamed, whole, without_ids
from tests.cluster.openai.responses.test_responses import ADD, TOOL, call

NUM_REQUESTS = 500
NUM_QUICK = 100
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def drawn(rng: random.Random) -> tuple[dict, dict, str, dict]:
    """A request, the same as a chat, what the model says, and how."""
    shared: dict[str, Any] = {"seed": rng.randrange(10)}  # else each request draws its own
    if rng.random() < 0.4:
        shared["temperature"] = rng.choice([0, 0.5, 1.0])
    if rng.random() < 0.3:
        shared["stop"] = [rng.choice(["cat", "x", "Oslo"])]
    for name, values in {
        "top_p": [0.1, 1.0],
        "presence_penalty": [-1.5, 0.0],
        "logit_bias": [{}, {"65": -100}],
        "min_tokens": [0, 1],
        "stop_token_ids": [[], [33]],
        "ignore_eos": [False],
    }.items():
        if rng.random() < 0.2:
            shared[name] = rng.choice(values)
    said = rng.choice(["", "A cat said hé 🐈.", "x" * 30, '{"a": 1}', "One.\n\nTwo.  "])
    ours, chats = dict(shared), dict(shared)
    if rng.random() < 0.5:
        tools = rng.choice([[TOOL], [TOOL, ADD]])
        ours["tools"] = tools
        chats["tools"] = [
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in tools
        ]
        said += "".join(call(rng.choice(["Oslo", "Rome"])) for _ in range(rng.randrange(3)))
        said += rng.choice(["", "", " And so on."])
        if rng.random() < 0.3:
            ours["parallel_tool_calls"] = chats["parallel_tool_calls"] = rng.random() < 0.5
    elif rng.random() < 0.2:
        ours["text"] = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
        chats["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    if rng.random() < 0.3:
        limit = rng.randrange(1, 90)
        ours["max_output_tokens"], chats["max_completion_tokens"] = limit, limit
    if rng.random() < 0.3:
        num_top = rng.randrange(3)
        ours |= {"include": ["message.output_text.logprobs"], "top_logprobs": num_top}
        chats |= {"logprobs": True, "top_logprobs": num_top}
    messages = [{"role": "user", "content": rng.choice(["Hi", "How warm?"])}]
    if rng.random() < 0.5:
        messages += [{"role": "assistant", "content": "Well."}, {"role": "user", "content": "And?"}]
    ours["input"], chats["messages"] = list(messages), list(messages)
    if rng.random() < 0.5:
        ours["instructions"] = "Be nice."
        chats["messages"].insert(0, {"role": "system", "content": "Be nice."})
    return ours, chats, said, {"per_chunk": rng.choice([1, 2, 3, 7, 100]), "ends": not said or rng.random() < 0.9}


def completion_of(chats: dict, request: Any) -> dict:
    """The completion that asks for what a chat without tools asked of the model."""
    apart = ("messages", "max_completion_tokens", "logprobs", "top_logprobs")
    body = {name: value for name, value in chats.items() if name not in apart}
    body |= {"prompt": prompt_ids(request), "max_tokens": request.params.max_tokens}
    return body | ({"logprobs": chats["top_logprobs"]} if "logprobs" in chats else {})


def chunks_of(server, path: str, body: dict) -> list[dict]:
    """All chunks of a stream."""
    asked = {"model": "tiny", **body, "stream": True, "stream_options": {"include_usage": True}}
    reply = server.post(path, asked)
    assert reply.status_code == 200, reply.text
    *chunks, last = [block.removeprefix("data: ") for block in reply.text.split("\n\n")[:-1]]
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def joined(chunks: list[dict]) -> dict:
    """What a stream of a chat or a completion says, in one form for both."""
    said: dict[str, Any] = {"text": "", "calls": {}, "finish": None, "logprobs": [], "usage": chunks[-1]["usage"]}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice.get("delta", {"content": choice.get("text")})
        said["text"] += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            name, arguments = said["calls"].get(piece["index"], ("", ""))
            function = piece["function"]
            said["calls"][piece["index"]] = (
                name + (function.get("name") or ""),
                arguments + (function.get("arguments") or ""),
            )
        said["finish"] = choice["finish_reason"] or said["finish"]
        said["logprobs"] += logprobs_of(choice)
    return {**said, "calls": list(said["calls"].values())}


def stated(reply: dict) -> dict:
    """What a whole chat or completion says, in the same form."""
    [choice] = reply["choices"]
    message = choice.get("message", {"content": choice.get("text")})
    calls = [(each["function"]["name"], each["function"]["arguments"]) for each in message.get("tool_calls", ())]
    return {
        "text": message["content"] or "",
        "calls": calls,
        "finish": choice["finish_reason"],
        "logprobs": logprobs_of(choice),
        "usage": reply["usage"],
    }


def logprobs_of(choice: dict) -> list[tuple]:
    """Tokens with their log-probabilities."""
    found = choice["logprobs"] or {}
    if "tokens" in found:
        return list(zip(found["tokens"], found["token_logprobs"], strict=True))
    return [(entry["token"], entry["logprob"]) for entry in found.get("content") or ()]


@pytest.mark.parametrize(
    "seed",
    [*range(NUM_QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(NUM_QUICK, NUM_REQUESTS))],
)
def test_whole_streamed_and_by_every_endpoint(server, seed):
    ours, chats, said, how = drawn(random.Random(seed))
    server.backend.says(said, **how)
    reply = whole(server, **ours)
    events = streamed(server, **ours)
    chat = server.post("/v1/chat/completions", {"model": "tiny", **chats}).json()
    asked = server.backend.requests[-1]
    says = stated(chat)
    assert joined(chunks_of(server, "/v1/chat/completions", chats)) == says
    bodies = []
    if "tools" not in ours:
        completion = completion_of(chats, asked)
        bodies = [stated(server.post("/v1/completions", {"model": "tiny", **completion}).json())]
        bodies.append(joined(chunks_of(server, "/v1/completions", completion)))
    assert bodies == [says] * len(bodies)
    for request in server.backend.requests:
        assert (request.token_ids, request.params) == (asked.token_ids, asked.params)

    assert without_ids(events[-1]["response"]) == without_ids(reply)
    texts, arguments = {}, {}
    for event in events:
        if event["type"] == "response.output_text.delta":
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
        elif event["type"] == "response.function_call_arguments.delta":
            arguments[event["output_index"]] = arguments.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(reply["output"]):
        if item["type"] == "message":
            assert texts.get(index, "") == item["content"][0]["text"]
        else:
            assert arguments.get(index, "") == item["arguments"]
    messages = [item["content"][0] for item in reply["output"] if item["type"] == "message"]
    calls = [(item["name"], item["arguments"]) for item in reply["output"] if item["type"] == "function_call"]
    assert "".join(part["text"] for part in messages) == says["text"]
    assert calls == says["calls"]
    assert (reply["status"] == "incomplete") == (says["finish"] == "length")
    assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert reply["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    if "include" in ours and "tools" not in ours:
        assert messages[0]["logprobs"] == chat["choices"][0]["logprobs"]["content"]
    followed = post(server, {"input": "Go on.", "previous_response_id": reply["id"]})
    assert followed.status_code == 200
