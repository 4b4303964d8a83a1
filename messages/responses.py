"""Responses that an ingress keeps for requests to come (/v1/responses), asked for by another, by way of the router."""

from __future__ import annotations

import msgspec


class StoredQuestion(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ingress to router, and on to the ingress that keeps the response."""

    query_id: str
    asker: str  #: the ingress that wants it
    holder: str  #: the one that made it
    owner: str  #: whose it has to be
    response_id: str
    drops: bool  #: it is to be forgotten


class StoredAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer, the same way back."""

    query_id: str
    asker: str
    reply: bytes | None  #: the response, JSON; None: it is not there, or nobody of that name is
    items: bytes = b""  #: all that it was given, a JSON array
