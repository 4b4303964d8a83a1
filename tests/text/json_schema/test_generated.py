"""Schemas that nobody wrote by hand: drawn at random, and of models as applications have them."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import random
import re

import jsonschema
import openai
import pytest
from pydantic import RootModel

from messages.errors import RequestError
from messages.request import Grammar
from tests.text.masked_walk import MaskedWalk, byte_tokenizer
from tests.text.pydantic_models import MODELS, NOT_PARSED
from tests.text.random_schemas import SchemaDraw
from text.grammar_writing import written

#: models whose schemas are not followed, and the keyword
UNFOLLOWED = {"Sets": "uniqueItems"}
KEYWORD = re.compile(r"grammar refused: [$a-zA-Z]+( at #|: )")

KEYWORDS = [
    *(
        "$anchor",
        "$defs",
        "$id",
        "$ref",
        "$schema",
        "additionalItems",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
    ),
    *("contains", "dependencies", "dependentRequired", "dependentSchemas", "enum", "exclusiveMaximum", "format", "if"),
    *("exclusiveMinimum", "items", "maxContains", "maxItems", "maxLength", "maximum", "maxProperties", "minContains"),
    *(
        "minimum",
        "minItems",
        "minLength",
        "minProperties",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
    ),
    *("prefixItems", "properties", "propertyNames", "required", "then", "type", "unevaluatedItems", "uniqueItems"),
]
#: what nobody would write there
ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e300,
        10**400,
        "",
        "x",
        "[",
        "(?=",
        "(?!",
        "http://[x",
        [],
        {},
        [[]],
        [None],
        [5],
    ),
    *({"a": 1}, {"$ref": 5}, {"$ref": "#"}, {"$ref": "#/x/y"}, {"$ref": "http://[x"}, {"$id": 5}, {"$id": "http://[x"}),
    *({"type": 5}, {"type": [["a"]]}, {"enum": 5}, {"enum": []}, {"properties": 5}, {"required": 5}, {"format": []}),
    *([{"type": 5}, {}], [{"enum": 5}, {"const": 1}], {"not": {"type": [[]]}}, {"propertyNames": {"$ref": "#"}}),
]


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


def spoiled(schema: dict, rng: random.Random) -> None:
    """Put something odd under a keyword anywhere, or in a value's place."""
    objects, places = [], []

    def look(value):
        if isinstance(value, dict):
            objects.append(value)
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            look(value[key])

    look(schema)
    inside, key = rng.choice(places) if places and rng.random() < 0.5 else (rng.choice(objects), rng.choice(KEYWORDS))
    inside[key] = copy.deepcopy(rng.choice(ODD))


@pytest.mark.parametrize("begin", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(200, 2000, 200))])
def test_what_is_no_schema_is_refused(begin):
    num_refused = 0
    for seed in range(begin, begin + 200):
        rng = random.Random(seed)
        schema = SchemaDraw(seed).document()
        for _ in range(rng.randrange(1, 4)):
            spoiled(schema, rng)
        with contextlib.suppress(RequestError):
            written(Grammar(kind="json_schema", spec=json.dumps(schema)))
            num_refused -= 1
        num_refused += 1
    assert num_refused > 40


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
