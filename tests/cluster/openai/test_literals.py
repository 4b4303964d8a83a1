"""Python's literals, Gemma's braces and nested elements, read without running anything."""

from __future__ import annotations

import ast
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.openai.literals import LiteralReader, NotALiteralError, read_elements, read_literal

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**18), 10**18),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(blacklist_categories=("Cs",)), max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab c", max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.slow
@given(VALUES)
def test_what_python_writes_is_read_as_python_reads_it(value):
    assert read_literal(repr(value)) == ast.literal_eval(repr(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("null", None),
        ("0x1f", 31),
        ("1_000", 1000),
        ("007", 7),
        ("-.5", -0.5),
        ("(1, 2)", [1, 2]),
        ("[1, 2,]", [1, 2]),
        ("{1: 2}", {"1": 2}),
        ("'a' \"b\"", "ab"),
        ('"""a"b\n"""', 'a"b\n'),
        (r"'\n\x41\u00e9\'\q'", "\nAé'\\q"),
        (r"'\ud83d\ude00\ud800'", "😀\ufffd"),
    ],
)
def test_literals_that_are_written_otherwise(text, value):
    assert read_literal(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "f()", "1 + 1", "[1", "{1", "'a", "{'a' 1}", "1 2", "__import__('os')", "[" * 200, "1e999"]
)
def test_anything_else_is_none(text):
    with pytest.raises(NotALiteralError):
        read_literal(text)


@given(st.text(max_size=30))
def test_no_text_breaks_the_reader(text):
    for read in (read_literal, lambda text: LiteralReader(text, "<q>").arguments(":"), lambda t: read_elements(t, "")):
        with contextlib.suppress(NotALiteralError):
            read(text)


def test_a_number_that_python_could_not_write_is_none():
    assert json.dumps(read_literal("0x" + "f" * 3400))
    with pytest.raises(NotALiteralError):
        read_literal("0x" + "f" * 3600)


def test_arguments_have_names_or_get_them_in_order():
    assert LiteralReader("1, b='x'").arguments("=", positional=["a", "b"]) == {"a": 1, "b": "x"}
    with pytest.raises(NotALiteralError, match="without a name"):
        LiteralReader("1, 2").arguments("=", positional=["a"])
    with pytest.raises(NotALiteralError, match="comma was due"):
        LiteralReader("a=1 b=2").arguments("=")


def test_gemmas_words_need_no_quotes():
    text = "city:<q>a,b<q>,n:1.5,ok:true,word:two words,list:[<q>x<q>,2],deep:{<q>k<q>:null}"
    assert LiteralReader(text, "<q>").arguments(":") == {
        "city": "a,b",
        "n": 1.5,
        "ok": True,
        "word": "two words",
        "list": ["x", 2],
        "deep": {"k": None},
    }


def test_elements_nest():
    text = "<a>1</a> <b><item>x < y</item><item>z</item></b><c></c>"
    assert read_elements(text, "") == [("a", "1"), ("b", [("item", "x < y"), ("item", "z")]), ("c", "")]


@pytest.mark.parametrize("text", ["x", "<a>1", "<a>1</b>", "<a", "<a>1</a> x"])
def test_tags_that_do_not_match_are_none(text):
    with pytest.raises(NotALiteralError):
        read_elements(text, "")
