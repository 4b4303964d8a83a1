"""instructor, in the modes in which it speaks to other people's servers."""

import os

import instructor
import openai
import pydantic
import pytest

from tests.text.pydantic_models import MODELS

MESSAGES = [{"role": "user", "content": "Who is it?"}]
MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


class Person(pydantic.BaseModel):
    name: str
    kind: str


class Anything(pydantic.BaseModel):
    """Where only some JSON is asked for, this is what is got."""

    model_config = pydantic.ConfigDict(extra="allow")


def asked(kind, mode, **options):
    given = {"model": "guessing", "messages": MESSAGES, "max_tokens": 4000, "max_retries": 0} | options
    client = openai.OpenAI(base_url=os.environ["KVRAY_URL"], api_key="unused", max_retries=0)
    return instructor.from_openai(client, mode=mode).chat.completions.create(response_model=kind, **given)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_structured_output(mode):
    assert isinstance(asked(Person, mode), Person)


def test_json_object():
    assert isinstance(asked(Anything, instructor.Mode.JSON), Anything)


def test_structured_stream():
    client = openai.OpenAI(base_url=os.environ["KVRAY_URL"], api_key="unused", max_retries=0)
    *_, last = instructor.from_openai(client, mode=instructor.Mode.TOOLS).chat.completions.create_partial(
        response_model=Person, model="guessing", messages=MESSAGES, max_tokens=4000
    )
    assert isinstance(last.name, str)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_schemas(mode, model):
    assert isinstance(asked(model, mode), model)
