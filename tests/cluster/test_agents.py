"""An agent's conversation with a real `kvray serve`, whose model follows a script."""

from __future__ import annotations

import json

import openai
import pytest

from tests.cluster.openai.call_templates import TEMPLATES, as_pairs, spoken
from tests.scripted_model import make_scripted_model
from tests.served import serving

CALLS = [("get_weather", {"city": "Oslo", "days": 2}), ("get_weather", {"city": "Rome", "days": 1})]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}

pytestmark = [pytest.mark.timeout(300), pytest.mark.alone]


def test_an_agent_calls_its_tool_and_answers(tmp_path):
    template = TEMPLATES["qwen3_xml"]
    replies = {0: "I look.\n" + spoken(template, CALLS), 2: "It is 3 and 20 degrees."}
    model = make_scripted_model(tmp_path / "scripted", template, replies)
    with serving(str(model), "--dtype", "float32", log_dir=tmp_path) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)
        messages = [{"role": "user", "content": "How warm is it?"}]
        first = client.chat.completions.create(model="scripted", messages=messages, tools=[TOOL]).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.content == "I look."
        assert as_pairs(first.message.tool_calls) == CALLS
        with client.chat.completions.stream(model="scripted", messages=messages, tools=[TOOL]) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", "I look.")
        assert as_pairs(streamed.message.tool_calls) == CALLS
        forced = client.chat.completions.create(
            model="scripted", messages=messages, tools=[TOOL], tool_choice="required", max_tokens=12
        ).choices[0]
        assert (forced.finish_reason, forced.message.content) == ("length", None)
        messages.append(first.message.to_dict())
        for call in first.message.tool_calls:
            degrees = {"Oslo": "3", "Rome": "20"}[json.loads(call.function.arguments)["city"]]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": degrees})
        last = client.chat.completions.create(model="scripted", messages=messages, tools=[TOOL]).choices[0]
        assert (last.finish_reason, last.message.content) == ("stop", "It is 3 and 20 degrees.")


def test_an_agent_goes_on_from_its_last_response_whichever_ingress_is_asked(tmp_path):
    template = TEMPLATES["hermes"]
    replies = {0: spoken(template, CALLS), 2: "It is 3 and 20 degrees."}
    model = make_scripted_model(tmp_path / "scripted", template, replies)
    config = tmp_path / "kvray.yaml"
    config.write_text("pools: {ingress: 2}")
    tool = {"type": "function", **TOOL["function"]}
    with serving(str(model), "--dtype", "float32", "--config", str(config), log_dir=tmp_path) as served:
        for _ in range(8):  # on a connection of its own each, which either ingress may accept
            said = []
            items, previous = "How warm is it?", None
            while not said:
                asked = {"model": "scripted", "input": items, "tools": [tool], "previous_response_id": previous}
                with (
                    openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client,
                    client.responses.stream(**asked) as stream,
                ):
                    response = stream.get_final_response()
                calls = [item for item in response.output if item.type == "function_call"]
                assert [(call.name, json.loads(call.arguments)) for call in calls] == (CALLS if calls else [])
                said = [item for item in response.output if item.type == "message"]
                items = [{"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls]
                previous = response.id
            assert response.output_text == "It is 3 and 20 degrees."


def test_a_model_thinks_and_then_answers_in_the_structure_that_is_asked_for(tmp_path):
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    # the mark ends with a token: a structure allows none that goes on with something else
    replies = {0: "<think>Is it {so warm}? Yes</think>It is warm."}
    model = make_scripted_model(tmp_path / "scripted", template, replies)
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Is it warm?"}], "temperature": 0}
    with serving(str(model), "--dtype", "float32", "--reasoning-parser", "qwen3", log_dir=tmp_path) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)
        free = client.chat.completions.create(**body)
        assert free.choices[0].message.reasoning_content == "Is it {so warm}? Yes"
        assert free.choices[0].message.content == "It is warm."
        assert 0 < free.usage.completion_tokens_details.reasoning_tokens < free.usage.completion_tokens
        for grammar in ({"choice": ["No.", "warm"]}, {"regex": "It is (cold|warmer)!"}, {"json": {"const": 1}}):
            held = client.chat.completions.create(**body, extra_body={"structured_outputs": grammar}).choices[0]
            assert held.message.reasoning_content == "Is it {so warm}? Yes"
            assert held.message.content in ("No.", "warm", "It is cold!", "It is warmer!", "1")
            assert held.finish_reason == "stop"
