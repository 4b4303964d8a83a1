"""openai-agents with structured output, over its chat and its responses model."""

import asyncio
import os

import openai
import pydantic
import pytest
from agents import (
    Agent,
    AgentOutputSchema,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    UserError,
    function_tool,
    set_tracing_disabled,
)

from tests.text.pydantic_models import MODELS

ASKED = "Who is it?"
set_tracing_disabled(True)


class Person(pydantic.BaseModel):
    name: str
    kind: str


@function_tool
def note(name: str, kind: str) -> str:
    """Note a person."""
    return f"{name} {kind}"


def agent(kind=OpenAIChatCompletionsModel, **options):
    client = openai.AsyncOpenAI(base_url=os.environ["KVRAY_URL"], api_key="unused", max_retries=0)
    given = {"model_settings": ModelSettings(max_tokens=4000)} | options
    return Agent(name="Guesser", model=kind(model="guessing", openai_client=client), **given)


def answer(asked):
    return Runner.run_sync(asked, ASKED).final_output


def test_chat():
    assert answer(agent(model_settings=ModelSettings(max_tokens=20, temperature=0.0)))


def test_stream():
    async def texts():
        streamed = Runner.run_streamed(agent(model_settings=ModelSettings(max_tokens=20, temperature=0.0)), ASKED)
        return [event async for event in streamed.stream_events()], streamed.final_output

    events, output = asyncio.run(texts())
    assert len(events) > 3
    assert output


def test_tools():
    settings = ModelSettings(max_tokens=2000, tool_choice="note")
    asked = agent(tools=[note], tool_use_behavior="stop_on_first_tool", model_settings=settings)
    assert isinstance(answer(asked), str)


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def test_structured_output(kind):
    assert isinstance(answer(agent(kind, output_type=Person)), Person)


def test_responses():
    assert isinstance(answer(agent(OpenAIResponsesModel)), str)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_schemas(model):
    try:
        output = AgentOutputSchema(model)
    except UserError:  # the library itself writes no strict schema of it
        output = AgentOutputSchema(model, strict_json_schema=False)
    assert isinstance(answer(agent(output_type=output)), model)
