"""litellm, as its users and those who build on it call other people's servers."""

import json
import os

import litellm
import pydantic
import pytest

MESSAGES = [{"role": "user", "content": "Who is it?"}]


class Person(pydantic.BaseModel):
    name: str
    kind: str


NAMED = {"type": "function", "function": {"name": "note"}}
TOOL = {"type": "function", "function": {"name": "note", "parameters": Person.model_json_schema()}}


def ask(**options):
    call = {"model": "hosted_vllm/guessing", "messages": MESSAGES, "max_tokens": 2000, "num_retries": 0} | options
    return litellm.completion(api_base=os.environ["KVRAY_URL"], api_key="unused", **call)


def test_chat():
    reply = ask(max_tokens=20, temperature=0)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens == 20


def test_stream():
    chunks = list(ask(max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 20


def test_tools():
    [call] = ask(tools=[TOOL], tool_choice=NAMED).choices[0].message.tool_calls
    Person.model_validate_json(call.function.arguments)


def test_tool_stream():
    chunks = list(ask(tools=[TOOL], tool_choice=NAMED, stream=True))
    [call] = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    Person.model_validate_json(call.function.arguments)


def test_structured_output():
    Person.model_validate_json(ask(response_format=Person).choices[0].message.content)


def test_responses():
    url = os.environ["KVRAY_URL"]
    reply = litellm.responses(model="openai/guessing", input="Who is it?", api_base=url, api_key="unused")
    assert reply.status == "completed"


def test_logprobs():
    reply = ask(max_tokens=5, temperature=0, logprobs=True, top_logprobs=2)
    assert [len(token.top_logprobs) for token in reply.choices[0].logprobs.content] == [2] * 5


def test_too_long():
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": "word " * 20_000}])


def test_embeddings_refused():
    url = os.environ["KVRAY_URL"]
    with pytest.raises(litellm.NotFoundError, match="embeddings"):
        litellm.embedding(model="openai/guessing", input=["a"], api_base=url, api_key="unused")


def test_completions():
    url = os.environ["KVRAY_URL"]
    options = {"prompt": "It was", "max_tokens": 5, "temperature": 0, "api_base": url, "api_key": "unused"}
    assert json.dumps(litellm.text_completion(model="text-completion-openai/guessing", **options).choices[0].text)
