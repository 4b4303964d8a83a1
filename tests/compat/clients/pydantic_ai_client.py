"""pydantic-ai's agents over its chat and its responses model."""

import os

import pydantic
import pydantic_ai
import pytest
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.text.pydantic_models import MODELS

ASKED = "Who is it?"


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    kind: str


def agent(kind=OpenAIChatModel, output=str, **settings):
    model = kind("guessing", provider=OpenAIProvider(base_url=os.environ["KVRAY_URL"], api_key="unused"))
    return pydantic_ai.Agent(model, output_type=output, retries=0, model_settings={"max_tokens": 4000} | settings)


def test_chat():
    reply = agent(temperature=0.0, max_tokens=20).run_sync(ASKED)
    assert reply.output
    assert reply.usage.output_tokens == 20


def test_stream():
    streamed = agent(temperature=0.0, max_tokens=20).run_stream_sync(ASKED)
    assert "".join(streamed.stream_text(delta=True))


def test_tools():
    assert isinstance(agent(output=pydantic_ai.ToolOutput(Person)).run_sync(ASKED).output, Person)


def test_tool_stream():
    streamed = agent(output=pydantic_ai.ToolOutput(Person)).run_stream_sync(ASKED)
    assert isinstance(streamed.get_output(), Person)


def test_structured_output():
    assert isinstance(agent(output=pydantic_ai.NativeOutput(Person)).run_sync(ASKED).output, Person)


def test_responses():
    reply = agent(OpenAIResponsesModel, pydantic_ai.NativeOutput(Person)).run_sync(ASKED)
    assert isinstance(reply.output, Person)


def test_too_long():
    with pytest.raises(pydantic_ai.exceptions.ModelHTTPError, match="maximum context length") as caught:
        agent().run_sync("word " * 20_000)
    assert caught.value.status_code == 400


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("output", [pydantic_ai.ToolOutput, pydantic_ai.NativeOutput], ids=["tool", "native"])
def test_schemas(output, model):
    if issubclass(model, pydantic.RootModel) and model.model_json_schema().get("type") != "object":
        pytest.skip("arguments are an object")
    assert isinstance(agent(output=output(model)).run_sync(ASKED).output, model)
