"""LangChain's ChatOpenAI."""

import os

import openai
import pydantic
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.text.pydantic_models import MODELS

ASKED = "Who is it?"
#: models that refer to themselves, which this library's schemas of tools leave out: anything is allowed there
RECURSIVE = {"Tree", "LinkedList", "Even", "Expression", "Graph"}


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    kind: str


@tool
def note(name: str, kind: str) -> str:
    """Note a person."""
    return f"{name} {kind}"


def chat(**options):
    return ChatOpenAI(
        base_url=os.environ["KVRAY_URL"], model="guessing", api_key="unused", max_retries=0, max_tokens=2000, **options
    )


def test_chat():
    reply = chat(temperature=0).invoke(ASKED, max_tokens=20)
    assert reply.text
    assert reply.usage_metadata["output_tokens"] == 20


def test_stream():
    chunks = list(chat(temperature=0, stream_usage=True).stream(ASKED, max_tokens=20))
    assert "".join(chunk.text for chunk in chunks)
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 20


def test_tools():
    [call] = chat().bind_tools([note], tool_choice="note").invoke(ASKED).tool_calls
    assert set(call["args"]) == {"name", "kind"}


def test_tool_stream():
    [*parts] = chat().bind_tools([note], tool_choice="note", strict=True).stream(ASKED)
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    [call] = whole.tool_calls
    assert set(call["args"]) == {"name", "kind"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method):
    assert isinstance(chat().with_structured_output(Person, method=method).invoke(ASKED), Person)


def test_responses():
    reply = chat(use_responses_api=True).with_structured_output(Person).invoke(ASKED)
    assert isinstance(reply, Person)


def test_logprobs():
    reply = chat(temperature=0, logprobs=True, top_logprobs=2).invoke(ASKED, max_tokens=5)
    assert [len(token["top_logprobs"]) for token in reply.response_metadata["logprobs"]["content"]] == [2] * 5


def test_too_long():
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        chat().invoke("word " * 20_000)


def test_embeddings_refused():
    embeddings = OpenAIEmbeddings(
        base_url=os.environ["KVRAY_URL"], model="guessing", api_key="unused", check_embedding_ctx_length=False
    )
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        embeddings.embed_query("a")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_schemas(method, model):
    if issubclass(model, pydantic.RootModel) and method == "function_calling":
        pytest.skip("arguments are an object")
    if model.__name__ in RECURSIVE and method == "function_calling":
        assert chat().with_structured_output(model, method=method, include_raw=True).invoke(ASKED)["raw"].tool_calls
        return
    assert isinstance(chat().with_structured_output(model, method=method).invoke(ASKED), model)
