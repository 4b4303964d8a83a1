"""Schemas that nobody wrote by hand: drawn at random, and of models as applications have them."""

from __future__ import annotations

import functools
import json
import re

import jsonschema
import openai
import pytest
from pydantic import RootModel

from messages.errors import RequestError
from tests.text.masked_walk import MaskedWalk, byte_tokenizer
from tests.text.pydantic_models import MODELS
from tests.text.random_schemas import SchemaDraw

#: models whose schemas say less than they check, or that no schema is followed of
NOT_PARSED = {"Aware", "Numbers", "Encoded", "Invoice", "MapsByEnum"}
UNFOLLOWED = {"Sets": "uniqueItems"}
KEYWORD = re.compile(r"grammar refused: [$a-zA-Z]+( at #|: )")


@functools.cache
def masked_walk() -> MaskedWalk:
    return MaskedWalk(byte_tokenizer())


def is_followed(schema: dict, num: int) -> bool:
    """Check that random outputs satisfy the schema; False where it is refused by keyword."""
    try:
        texts = masked_walk().json_texts(schema, num)
    except RequestError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.status == 400
        assert KEYWORD.search(refusal.message), (refusal.message, schema)
        return False
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    for text in texts:
        validator.validate(json.loads(text))
    return True


@pytest.mark.parametrize("begin", range(0, 40, 10))
def test_random_schemas_are_followed_or_refused_by_keyword(begin):
    followed = [is_followed(SchemaDraw(seed).document(), 3) for seed in range(begin, begin + 10)]
    assert sum(followed) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(1000, 1400, 50))
def test_more_random_schemas_are_followed_or_refused_by_keyword(begin):
    followed = [is_followed(SchemaDraw(seed).document(), 6) for seed in range(begin, begin + 50)]
    assert sum(followed) >= 25


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_what_a_models_schema_allows_the_model_reads(model):
    schema = model.model_json_schema()
    assert is_followed(schema, 2) == (model.__name__ not in UNFOLLOWED)
    if not issubclass(model, RootModel):
        strict = openai.pydantic_function_tool(model)["function"]["parameters"]
        assert is_followed(strict, 2) == (model.__name__ not in UNFOLLOWED)
    if model.__name__ not in NOT_PARSED | UNFOLLOWED.keys():
        for text in masked_walk().json_texts(schema, 3):
            model.model_validate_json(text)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_serialized_models_too(model):
    assert is_followed(model.model_json_schema(mode="serialization"), 20) == (model.__name__ not in UNFOLLOWED)
