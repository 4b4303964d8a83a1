"""A model directory's JSON file is an object, or one line that says why not."""

from __future__ import annotations

import re

import pytest

from messages.errors import ConfigError
from text.json_file import read_json


def test_the_object_in_the_file_is_read_in_any_of_unicodes_encodings(tmp_path):
    path = tmp_path / "config.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text('{"a": [1, "é"], "b": {}}', encoding=encoding)
        assert read_json(path) == {"a": [1, "é"], "b": {}}


def test_a_file_that_may_be_missing_is_empty_and_one_that_may_not_is_named(tmp_path):
    path = tmp_path / "config.json"
    assert read_json(path, is_optional=True) == {}
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} cannot be read: No such file"):
        read_json(path)


def test_an_optional_file_that_is_there_must_be_right(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_json(path, is_optional=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: Is a directory"):
        read_json(path, is_optional=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON: Expecting value"),
        (b"{'a': 1}", "is not valid JSON: Expecting property name"),
        (b'{"a": 1} {}', "is not valid JSON: Extra data"),
        (b'{"a": "\xff"}', "is not valid JSON: 'utf-8' codec can't decode"),
        (b"[]", "holds a JSON list, wanted an object"),
        (b"null", "holds a JSON NoneType, wanted an object"),
        (b'"text"', "holds a JSON str, wanted an object"),
        (b"[" * 100_000, "is not valid JSON: nested too deeply"),
    ],
    ids=["empty", "quotes", "more", "bytes", "list", "null", "text", "deep"],
)
def test_what_is_no_object_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_json(path)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message
