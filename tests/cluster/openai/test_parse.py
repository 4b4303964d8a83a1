"""`parse()` of the openai client on models of all kinds, with a model that knows nothing and follows the masks."""

from __future__ import annotations

import functools

import openai
import pydantic
import pytest

from tests.cluster.openai.conftest import make_tokenizer
from tests.text.json_schema.test_generated import UNFOLLOWED
from tests.text.masked_walk import MaskedWalk
from tests.text.pydantic_models import MODELS, NOT_PARSED
from text.grammar import CompiledGrammar


@functools.cache
def walk() -> MaskedWalk:
    tokenizer = make_tokenizer()
    eos_id = tokenizer.eos_token_id
    assert eos_id is not None
    return MaskedWalk(tokenizer, eos_id)


@pytest.fixture
def server(serve, served_model):
    server = serve(model=served_model(max_model_len=8192, max_prompt_tokens=8000))

    def follow(request):
        compiled = CompiledGrammar(walk().grammars, request.params.grammar)
        text = next(text for seed in range(100) if (text := walk().text(compiled, seed)) is not None)
        return server.backend.spoken(request, text, per_chunk=20)

    server.backend.script = follow
    return server


def by_chat(client, model):
    message = {"role": "user", "content": "Go."}
    return (
        client.chat.completions.parse(model="tiny", messages=[message], response_format=model).choices[0].message.parsed
    )


def by_response(client, model):
    return client.responses.parse(model="tiny", input="Go.", text_format=model).output_parsed


def by_call(client, model):
    """A forced call, as instructor and LangChain have a model's fields filled in."""
    tool = openai.pydantic_function_tool(model)
    [call] = (
        client.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "Go."}],
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": tool["function"]["name"]}},
        )
        .choices[0]
        .message.tool_calls
    )
    return call.function.parsed_arguments


WAYS = [by_chat, by_response, by_call]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_model_is_parsed(server, way):
    num_parsed = 0
    for model in MODELS:
        if way is by_call and issubclass(model, pydantic.RootModel):
            continue  # arguments are an object
        if model.__name__ in UNFOLLOWED:
            with pytest.raises(openai.BadRequestError, match=UNFOLLOWED[model.__name__]):
                way(server.client(), model)
            continue
        try:
            parsed = way(server.client(), model)
        except pydantic.ValidationError:
            assert model.__name__ in NOT_PARSED, model
            continue
        assert isinstance(parsed, model)
        num_parsed += 1
    assert num_parsed >= 40
