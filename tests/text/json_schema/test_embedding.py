"""Schemas of several tools in one document keep their references to themselves."""

from __future__ import annotations

import json

import jsonschema
import pytest

from messages.errors import RequestError
from tests.text.masked_walk import MaskedWalk, byte_tokenizer
from text.json_schema.embedding import embedded
from text.json_schema.translation import followable

SCHEMAS = {
    "a": {"$ref": "#/$defs/X", "$defs": {"X": {"const": "a"}}},
    "b": {"$ref": "#/$defs/X", "$defs": {"X": {"enum": ["b", {"$ref": "#/$defs/X"}]}}},
    "c": {"$id": "http://c.example/c", "$ref": "c#here", "$defs": {"X": {"$anchor": "here", "const": "c"}}},
    "d": {"$id": "http://c.example/c", "$ref": "#/$defs/X", "$defs": {"X": {"const": "d"}}},
}


def test_each_schema_means_what_it_meant():
    walk = MaskedWalk(byte_tokenizer())
    for name, schema in SCHEMAS.items():
        texts = walk.json_texts({"$ref": f"#/$defs/{name}", "$defs": embedded(SCHEMAS)}, 4)
        assert len(texts) == 4
        for text in texts:
            if name != "d":  # alone it may be told by its own $id
                jsonschema.validate(json.loads(text), schema)
            else:
                assert text == '"d"'


def test_a_refusal_names_the_schema_that_it_is_of():
    schemas = embedded({"one": {}, "two": {"items": {"$ref": "#/$defs/X"}, "$defs": {"X": {"not": {"minimum": 3}}}}})
    with pytest.raises(RequestError, match=r"^not at #/\$defs/two/\$defs/X: "):
        followable({"anyOf": [{"$ref": f"#/$defs/{name}"} for name in schemas], "$defs": schemas})
