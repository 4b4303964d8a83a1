"""The model that ships with the project calls tools, answers from them and fills schemas, over HTTP as a newcomer asks.

Towns and people are none of those that its training draws; other words are made up anew.
"""

from __future__ import annotations

import json
import random

import openai
import pytest

from tests.served import serving
from tools.demo_model import corpus, words
from tools.demo_model.evaluate_tools import ask_unseen
from tools.demo_model.tool_families import FAMILIES

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

NUM_QUESTIONS = 30
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city, such as Paris."},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(log_dir=tmp_path_factory.mktemp("served")) as process:
        yield process


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def reply(client, messages, **more):
    model = client.models.list().data[0].id
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **more).choices[0]


def user(text):
    return {"role": "user", "content": text}


def calls(choice):
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]


def test_its_calls_are_recognised_without_a_flag(served):
    assert "tool-call-parser" not in served.log.read_text()


def test_an_agent_calls_its_tool_answers_from_it_and_goes_on(client):
    messages = [SYSTEM, user("Hello!")]
    greeting = reply(client, messages, tools=[WEATHER])
    assert greeting.message.tool_calls is None
    assert greeting.message.content == corpus.SMALL_TALK["Hello!"]
    messages += [greeting.message.to_dict(), user("What is the weather in Paris?")]
    asked = reply(client, messages, tools=[WEATHER])
    assert (asked.finish_reason, asked.message.content) == ("tool_calls", None)
    assert calls(asked) == [("get_weather", {"city": "Paris"})]
    [call] = asked.message.tool_calls
    result = json.dumps({"temperature": 21, "condition": "sunny"})
    messages += [asked.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": result}]
    answered = reply(client, messages, tools=[WEATHER])
    assert answered.message.content == "The temperature is 21 and the condition is sunny."
    assert answered.finish_reason == "stop"
    messages += [answered.message.to_dict(), user("And what is the weather in Tallinn?")]
    assert calls(reply(client, messages, tools=[WEATHER])) == [("get_weather", {"city": "Tallinn"})]


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_tools_are_called_with_what_the_question_says(client, choice):
    rng = random.Random(choice)
    right = 0
    for _ in range(NUM_QUESTIONS):
        ask = ask_unseen(rng, rng.choice(FAMILIES))
        named = {"type": "function", "function": {"name": ask.name}}
        got = reply(client, [user(ask.question)], tools=[ask.tool], tool_choice=named if choice == "named" else choice)
        right += calls(got) == [(ask.name, ask.arguments)]
    assert right >= 0.8 * NUM_QUESTIONS, f"{right} of {NUM_QUESTIONS}"  # 26 to 28 of 30; CPUs round differently


def test_a_schema_of_strings_and_an_enumeration_is_filled_from_the_text(client):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "city": {"type": "string"},
            "color": {"type": "string", "enum": ["red", "green", "blue"]},
        },
        "required": ["name", "city", "color"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    rng = random.Random(4)
    right = 0
    for _ in range(NUM_QUESTIONS):
        name, city = rng.choice(words.UNSEEN_PEOPLE), rng.choice(words.UNSEEN_CITIES)
        color = rng.choice(schema["properties"]["color"]["enum"])
        got = reply(client, [user(f"{name} lives in {city} and drives a {color} car.")], response_format=form)
        right += json.loads(got.message.content) == {"name": name, "city": city, "color": color}
    assert right >= 0.6 * NUM_QUESTIONS, f"{right} of {NUM_QUESTIONS}"  # 20 of 30 here


def test_notes_are_answered_without_a_space_in_front_whether_tools_are_there_or_not(client):
    rng = random.Random(5)
    right = 0
    for number in range(NUM_QUESTIONS):
        lookup = corpus.make_lookup(rng, 300, 8)
        tools = {"tools": [WEATHER]} if number % 2 else {}
        got = reply(client, [SYSTEM, user(f"{lookup.notes}\n{lookup.question}")], **tools)
        assert got.message.content == got.message.content.strip()
        right += got.message.content == lookup.answer
    assert right >= 0.85 * NUM_QUESTIONS, f"{right} of {NUM_QUESTIONS}"
