"""An agent with two tools, driven by the openai client to its end, on a model that speaks each format."""

from __future__ import annotations

import json

import pytest

from tests.cluster.openai.call_templates import MORE_TEMPLATES, TEMPLATES, spoken
from tests.cluster.openai.test_call_formats import IDS

pytestmark = pytest.mark.slow

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds numbers.",
            "parameters": {"type": "object", "properties": {"numbers": {"type": "array", "items": {"type": "number"}}}},
        },
    },
]
#: what the model says, turn by turn: two calls at once, one call, the answer
TURNS = [
    [("get_weather", {"city": "Oslo", "days": 2}), ("get_weather", {"city": "Rome", "days": 1})],
    [("add", {"numbers": [3, 20.5]})],
    [],
]
#: their templates show the ids of calls
WITH_IDS = ("mistral", "solar_open")
RESULTS = {"Oslo": "3", "Rome": "20.5"}


def run(name, arguments):
    return RESULTS[arguments["city"]] if name == "get_weather" else str(sum(arguments["numbers"]))


def said(server, messages, *, is_streamed):
    """The model's next message, as the client puts it together."""
    client = server.client()
    if not is_streamed:
        choice = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS).choices[0]
        return choice.message, choice.finish_reason
    with client.chat.completions.stream(model="tiny", messages=messages, tools=TOOLS) as stream:
        choice = stream.get_final_completion().choices[0]
    return choice.message, choice.finish_reason


@pytest.mark.parametrize(("kind", "template"), [*TEMPLATES.items(), *MORE_TEMPLATES], ids=IDS)
def test_an_agent_comes_to_its_end(serve, served_model, kind, template):
    server = serve(template, model=served_model(max_model_len=8192, max_prompt_tokens=8000))
    for is_streamed in (False, True):
        messages = [{"role": "user", "content": "How warm is it in all?"}]
        calls_made = []
        for calls in TURNS:
            text = spoken(template, calls) if calls else "Done: 23.5"
            server.backend.says(text, per_chunk=11)
            message, finish = said(server, messages, is_streamed=is_streamed)
            messages.append(message.to_dict())
            if not message.tool_calls:
                break
            assert finish == "tool_calls"
            assert message.content is None
            for call in message.tool_calls:
                arguments = json.loads(call.function.arguments)
                calls_made.append((call.function.name, arguments))
                result = run(call.function.name, arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        assert message.content == "Done: 23.5"
        assert finish == "stop"
        assert calls_made == TURNS[0] + TURNS[1]
        assert "20.5" in server.prompt(), "what came of earlier calls is shown"
        if kind not in WITH_IDS:
            assert spoken(template, TURNS[0]) in server.prompt(), "past calls look as the model wrote them"
