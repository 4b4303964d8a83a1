"""A body becomes a value of its type, or one error that says where, what was seen and what is wanted."""

from __future__ import annotations

import logging
from typing import Annotated

import msgspec
import pytest
from starlette.requests import Request

from cluster.openai.body import BodyDecoder, read_body
from messages.errors import RequestError


class Inner(msgspec.Struct, frozen=True):
    size: int
    label: str | None = None


class Outer(msgspec.Struct, frozen=True, rename={"kind_": "kind"}):
    inner: Inner
    items: list[Inner] = []
    weights: dict[str, float] = {}
    share: float | None = None
    extra: object = None
    kind_: str | None = None


class Counts(msgspec.Struct, frozen=True):
    size: Annotated[int, msgspec.Meta(ge=1, le=10)] | None = None
    ids: list[int] | None = None
    nested: tuple[int, int | None] | None = None
    share: float | None = None
    extra: object = None


INNER = b'"inner":{"size":1}'


def refusal(body: bytes, decoder: BodyDecoder[Outer] | None = None) -> RequestError:
    with pytest.raises(RequestError) as caught:
        (decoder or BodyDecoder(Outer)).decode(body)
    assert caught.value.status == 400
    return caught.value


def request_of(*parts: bytes, **headers: str) -> Request:
    """A request whose body comes in `parts`; reading beyond them is an error."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    return Request({"type": "http", "headers": raw}, receive)


# ----------------------------------------------------------------------------------------------------------- decoding


def test_a_body_becomes_a_value():
    body = b'{"inner":{"size":2},"kind":"k","weights":{"a":1.5}}'
    assert BodyDecoder(Outer).decode(body) == Outer(Inner(2), weights={"a": 1.5}, kind_="k")


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"size":5.0}', Counts(size=5)),
        (b'{"size":1e1,"ids":[1.0,2,3e0],"nested":[4.0,null]}', Counts(size=10, ids=[1, 2, 3], nested=(4, None))),
        (b'{"size":5.0,"extra":{"size":5.0},"share":2}', Counts(size=5, extra={"size": 5.0}, share=2.0)),
    ],
)
def test_a_whole_number_is_an_integer_however_it_is_written(body, value):
    decoded = BodyDecoder(Counts).decode(body)
    assert decoded == value
    assert repr(decoded) == repr(value)


@pytest.mark.parametrize(
    ("body", "param", "seen"),
    [
        (b'{"size":5.5}', "size", "5.5"),
        (b'{"size":11.0}', "size", "11.0"),
        (b'{"size":1e300}', "size", "1e300"),
        (b'{"size":5.0,"ids":[1.0,2.5]}', "ids[1]", "2.5"),
        (b'{"size":"5"}', "size", '"5"'),
        (b'{"size":true}', "size", "true"),
        (b'{"size":5.0,"share":"x"}', "share", '"x"'),
        (b'{"size":5.0,"share":', None, "truncated"),
        (b'{"size":5.0,"share":1e999}', None, "want a number in range"),
    ],
)
def test_what_is_no_whole_number_is_refused_as_it_was_written(body, param, seen):
    error = refusal(body, BodyDecoder(Counts))
    assert (error.param, seen in error.message) == (param, True), error.message


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b'{"inner":{"size":"x"}}', "inner.size", 'inner.size: want int, got "x"'),
        (b'{"inner":{"size":1.5}}', "inner.size", "inner.size: want int, got 1.5"),
        (b"{" + INNER + b',"items":[{"size":1},{"size":null}]}', "items[1].size", "want int, got null"),
        (b"{" + INNER + b',"share":"1"}', "share", 'share: want float, got "1"'),
        (b"{" + INNER + b',"share":1e400}', "share", "share: want a number in range, got"),
        (b"{}", "inner", "inner: missing, want a value"),
        (b'{"inner":{}}', "inner.size", "inner.size: missing, want a value"),
        # of a mapping's values msgspec does not say which: the whole mapping is shown
        (b"{" + INNER + b',"weights":{"a":1,"b":"x"}}', "weights", 'got {"a":1,"b":"x"}'),
    ],
)
def test_a_field_is_named_by_its_path_with_what_was_seen_there(body, param, message):
    error = refusal(body)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        (b"", "broken JSON"),
        (b',"extra":oops}', "broken JSON"),
        (b"} trailing", "broken JSON"),
        (b',"extra":1e400, oops}', "broken JSON"),
        (b',"kind":"\xff"}', "not UTF-8"),
        (b',"extra":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
    ],
)
@pytest.mark.parametrize("size", [b'"x"', b"1e400"])
def test_a_body_that_breaks_after_a_bad_field_is_broken_first_of_all(size, rest, says):
    error = refusal(b'{"inner":{"size":' + size + b"}" + rest)
    assert error.code == "invalid_json"
    assert says in error.message


def test_a_number_no_float_holds_elsewhere_does_not_hide_what_was_seen():
    assert 'inner.size: want int, got "x"' in refusal(b'{"inner":{"size":"x"},"extra":1e400}').message


def test_a_body_of_another_type_is_shown_clipped():
    error = refusal(b'"' + b"x" * 1000 + b'"')
    assert (error.param, error.code) == (None, "invalid_type")
    assert error.message.startswith("body: want object, got ")
    assert len(error.message) < 200


def test_the_place_where_json_breaks_is_shown_without_control_characters():
    error = refusal(b"{" + INNER + b',"kind":"a\x00b"}')
    assert (error.param, error.code) == ("kind", "invalid_json")
    assert error.message.startswith(f"body: broken JSON at byte {len(INNER) + 11}, near ...")
    assert error.message.isprintable()


@pytest.mark.parametrize(
    ("text", "is_half"),
    [
        (rb"\ud800", True),
        (rb"\udc00", True),
        (rb"\ud800\ud800\udc00", True),
        (rb"\\\ud800", True),  # a backslash, then half a pair
        (rb"\\ud800", False),  # a backslash, then letters
    ],
)
def test_half_a_surrogate_pair_is_told_from_letters_that_look_like_one(text, is_half):
    body = b"{" + INNER + b',"kind":"' + text + b'" }'
    if is_half:
        assert "half of a surrogate pair" in refusal(body).message
    else:
        assert BodyDecoder(Outer).decode(body).kind_ == r"\ud800"
        assert "broken JSON at byte" in refusal(body[:-1] + b"oops}").message


def test_unknown_fields_are_logged_once_a_name_and_only_so_many_names(caplog):
    decoder = BodyDecoder(Outer)
    with caplog.at_level(logging.INFO, logger="cluster.openai.body"):
        for _ in range(2):
            decoder.decode(b"{" + INNER + b',"kind":"known","kind_":"the field\'s own name is none of the API\'s"}')
        assert [record.getMessage() for record in caplog.records] == [
            'ignored unknown request field "kind_" (logged once)'
        ]
        for number in range(1000):
            decoder.decode(b"{" + INNER + b',"made_up_%d":1}' % number)
    assert len(caplog.records) == 256


# ------------------------------------------------------------------------------------------------------------ reading


async def test_the_parts_of_a_body_are_joined_up_to_the_limit():
    assert await read_body(request_of(b'{"a"', b":1}"), max_bytes=7) == b'{"a":1}'


async def test_a_body_is_not_read_on_once_it_is_too_long():
    request = request_of(b"1234", b"5678", b"not read any more")
    with pytest.raises(RequestError, match="got more than 7 bytes, want at most 7") as caught:
        await read_body(request, max_bytes=7)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")
    assert (await request.receive())["body"] == b"not read any more"


@pytest.mark.parametrize("length", ["8", "9" * 5000])
async def test_a_declared_length_over_the_limit_is_refused_unread(length):
    request = request_of(b"12345678", content_length=length)
    with pytest.raises(RequestError) as caught:
        await read_body(request, max_bytes=7)
    assert caught.value.status == 413
    assert len(caught.value.message) < 100
    assert (await request.receive())["body"] == b"12345678"


@pytest.mark.parametrize("length", ["-1", "x", "1"])
async def test_a_declared_length_is_not_relied_upon(length):
    with pytest.raises(RequestError, match="got more than 7 bytes"):
        await read_body(request_of(b"12345678", content_length=length), max_bytes=7)


@pytest.mark.parametrize(
    ("content_type", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON ; charset=utf-8", True),
        ("application/problem+json", True),
        ("text/json", False),
        ("application/jsonl", False),
        ("", False),
    ],
)
async def test_only_json_is_read(content_type, is_json):
    request = request_of(b"{}", content_type=content_type)
    if is_json:
        assert await read_body(request, max_bytes=10) == b"{}"
        return
    with pytest.raises(RequestError) as caught:
        await read_body(request, max_bytes=10)
    assert (caught.value.status, caught.value.code) == (415, "unsupported_media_type")
