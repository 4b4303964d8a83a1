"""Where the values or the fields of something are listed, an error lists them."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from cluster.openai.body import BodyDecoder
from messages.errors import RequestError


class Choosing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["a", "b"]
    inner: list[Choosing] | dict[str, Choosing] | None = None


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b'{"kind":"c"}', "kind", 'kind: want one of a, b, got "c"'),
        (b'{"kind":"a","inner":[{"kind":"%b"}]}' % (b"x" * 1000), "inner[0].kind", "inner[0].kind: want one of a, b"),
        (b'{"kind":"a","inner":{"x":{"kind":1}}}', "inner", 'want str, got {"x":{"kind":1}}'),
        (b'{"kind":"a","inne":1}', None, "got the unknown field inne, want one of inner, kind"),
        (b'{"kind":"a","inner":[{"kind":"b","%b":1}]}' % (b"x" * 1000), "inner[0]", "want one of inner, kind"),
    ],
)
def test_where_values_or_fields_are_listed_an_error_lists_them(body, param, message):
    with pytest.raises(RequestError) as caught:
        BodyDecoder(Choosing).decode(body)
    error = caught.value
    assert error.param == param
    assert message in error.message
    assert len(error.message) < 300
