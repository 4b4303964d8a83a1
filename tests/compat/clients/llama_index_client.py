"""llama-index's OpenAILike."""

import os

import pydantic
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

ASKED = [ChatMessage(role="user", content="Who is it?")]


class Person(pydantic.BaseModel):
    """A person."""

    name: str
    kind: str


def note(name: str, kind: str) -> str:
    """Note a person."""
    return f"{name} {kind}"


TOOLS = [FunctionTool.from_defaults(note)]


def model(**options):
    given = {"max_tokens": 2000, "temperature": 1.0} | options
    return OpenAILike(
        model="guessing",
        api_base=os.environ["KVRAY_URL"],
        api_key="unused",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        **given,
    )


def test_chat():
    assert model(temperature=0.0, max_tokens=20).chat(ASKED).message.content


def test_stream():
    parts = list(model(temperature=0.0, max_tokens=20).stream_chat(ASKED))
    assert parts[-1].message.content == "".join(part.delta or "" for part in parts) != ""


def test_tools():
    reply = model().chat_with_tools(TOOLS, chat_history=ASKED, tool_required=True)
    call, *_ = model().get_tool_calls_from_response(reply)
    assert set(call.tool_kwargs) == {"name", "kind"}


def test_tool_stream():
    *_, last = model().stream_chat_with_tools(TOOLS, chat_history=ASKED, tool_required=True)
    call, *_ = model().get_tool_calls_from_response(last)
    assert set(call.tool_kwargs) == {"name", "kind"}


def test_structured_output():
    assert isinstance(model().as_structured_llm(Person).chat(ASKED).raw, Person)
