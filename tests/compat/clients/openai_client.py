"""The openai client for Python."""

import os

import openai
import pydantic
import pytest

MODEL = "guessing"
MESSAGES = [{"role": "user", "content": "Who is it?"}]


class Person(pydantic.BaseModel):
    name: str
    kind: str


TOOL = openai.pydantic_function_tool(Person, name="note", description="Note a person.")
FORCED = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "note"}}}


@pytest.fixture
def client():
    return openai.OpenAI(base_url=os.environ["KVRAY_URL"], api_key="unused", max_retries=0)


def test_chat(client):
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, temperature=0)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens == 20


def test_stream(client):
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20, "temperature": 0}
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens == 20


def test_completions(client):
    reply = client.completions.create(model=MODEL, prompt=["It was", "a"], max_tokens=5, temperature=0, echo=True)
    assert [choice.text.startswith(prompt) for choice, prompt in zip(reply.choices, ["It was", "a"], strict=True)]


def test_tools(client):
    [call] = client.chat.completions.parse(model=MODEL, messages=MESSAGES, **FORCED).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person)


def test_tool_stream(client):
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, **FORCED) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person)


def test_structured_output(client):
    reply = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Person)
    assert isinstance(reply.choices[0].message.parsed, Person)


def test_responses(client):
    first = client.responses.parse(model=MODEL, input="Who is it?", text_format=Person)
    assert isinstance(first.output_parsed, Person)
    with client.responses.stream(model=MODEL, input="And?", previous_response_id=first.id) as stream:
        assert stream.get_final_response().status == "completed"


def test_logprobs(client):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 5, "temperature": 0}
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, **options)
    assert [len(token.top_logprobs) for token in reply.choices[0].logprobs.content] == [2] * 5


def test_too_long(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}])
    assert caught.value.code == "context_length_exceeded"


def test_embeddings_refused(client):
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model=MODEL, input="a")
