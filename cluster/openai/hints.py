"""What a request says of keeping its blocks: `kvray.cache` in the body, or the same JSON in a header.

The words are those of vLLM's proposal of KV hints: pin, retain, demote. They are about the node caches' host memory.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from cluster.openai.body import BodyDecoder
from cluster.openai.callers import Caller
from cluster.openai.errors import bad_field
from cluster.openai.protocol import CacheHints, KvrayFields, SharedFields, TokenRange
from messages.errors import RequestError
from messages.request import CacheHint

HEADER: Final = "X-Kvray-Cache"

FieldsT = TypeVar("FieldsT", bound=SharedFields)

_decoder: Final = BodyDecoder(CacheHints)


def with_header(fields: FieldsT, header: str | None) -> FieldsT:
    """Return `fields` with the hints that came in the header, if there is one.

    Raises:
        RequestError: it holds none, or the body has some too.
    """
    if header is None:
        return fields
    if fields.kvray is not None and fields.kvray.cache is not None:
        raise bad_field(HEADER, header, "either it or kvray.cache in the body")
    try:
        hints = _decoder.decode(header.encode())
    except RequestError as error:
        raise RequestError(f"{HEADER}: {error.message}", param=HEADER, code=error.code) from None
    return msgspec.structs.replace(fields, kvray=KvrayFields(cache=hints))


def hints_of(fields: SharedFields, caller: Caller) -> tuple[CacheHint, ...]:
    """Return what is said of keeping blocks, the strongest word last: of two about one block that one counts.

    Raises:
        RequestError: a range is none (400); the caller may not say anything of the kind (403).
    """
    hints = fields.kvray.cache if fields.kvray is not None else None
    if hints is None:
        return ()
    found: list[CacheHint] = []
    if hints.demote is not None:
        found.append(CacheHint(*_range("demote", hints.demote.tokens), hints.demote.priority, 0.0))
    if hints.retain is not None:
        found.append(CacheHint(*_range("retain", hints.retain.tokens), hints.retain.priority, 0.0))
    if hints.pin is not None:
        found.append(CacheHint(*_range("pin", hints.pin.tokens), None, hints.pin.ttl_s))
    if found and not caller.may_hint:
        raise RequestError(
            "kvray.cache: got hints, want none: they are not allowed here, or not with this API key",
            param="kvray.cache",
            code="cache_hints_not_allowed",
            status=403,
        )
    return tuple(found)


def _range(word: str, tokens: TokenRange | None) -> tuple[int, int | None]:
    begin, end = tokens or (0, None)
    if end is not None and begin >= end:
        raise bad_field(f"kvray.cache.{word}.tokens", tokens, "the first token, and a later one where it ends")
    return begin, end
