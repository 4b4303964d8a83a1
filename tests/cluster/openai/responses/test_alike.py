"""Random valid requests: whole, streamed, and asked as a chat, a response says the same."""

from __future__ import annotations

import random

import pytest

from tests.cluster.openai.responses.sse import post, streamed, whole, without_ids
from tests.cluster.openai.responses.test_responses import ADD, TOOL, call

NUM_REQUESTS = 150


def drawn(rng: random.Random) -> tuple[dict, dict, str, dict]:
    """A request, the same as a chat, what the model says, and how."""
    shared = {}
    if rng.random() < 0.4:
        shared["temperature"] = rng.choice([0, 0.5, 1.0])
    if rng.random() < 0.3:
        shared["stop"] = [rng.choice(["cat", "x", "Oslo"])]
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


@pytest.mark.parametrize("seed", range(NUM_REQUESTS))
def test_whole_streamed_and_as_a_chat(server, seed):
    ours, chats, said, how = drawn(random.Random(seed))
    server.backend.says(said, **how)
    reply = whole(server, **ours)
    events = streamed(server, **ours)
    chat = server.post("/v1/chat/completions", {"model": "tiny", **chats}).json()
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
    choice = chat["choices"][0]
    messages = [item["content"][0] for item in reply["output"] if item["type"] == "message"]
    calls = [(item["name"], item["arguments"]) for item in reply["output"] if item["type"] == "function_call"]
    assert "".join(part["text"] for part in messages) == (choice["message"]["content"] or "")
    chat_calls = choice["message"].get("tool_calls", ())
    assert calls == [(each["function"]["name"], each["function"]["arguments"]) for each in chat_calls]
    assert (reply["status"] == "incomplete") == (choice["finish_reason"] == "length")
    assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert reply["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    if "include" in ours and "tools" not in ours:
        assert messages[0]["logprobs"] == choice["logprobs"]["content"]
    first, _, third = server.backend.requests[-3:]
    assert first.token_ids == third.token_ids
    followed = post(server, {"input": "Go on.", "previous_response_id": reply["id"]})
    assert followed.status_code == 200
