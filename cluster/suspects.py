"""Requests that were there when a worker crashed, remembered by content, so that they are suspects when sent again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from messages.request import GenerateRequest

_REMEMBERED_S = 600.0
_MAX_REMEMBERED = 10_000


def digest(asked: Sequence[GenerateRequest]) -> bytes:
    """Return 16 bytes, the same for the same prompt and parameters but for the seed, which is often drawn by us.

    Of another tenant, or with another cache_salt, they differ: nobody can tell by it what others asked.
    """
    first = asked[0]
    params = msgspec.structs.replace(first.params, seed=0)
    return hashlib.blake2b(msgspec.msgpack.encode((first.salt, first.token_ids, params)), digest_size=16).digest()


class Suspects:
    """The digests of suspects, for ten minutes each. One thread; pure."""

    def __init__(self) -> None:
        self._until_s: dict[bytes, float] = {}  #: in the order of their ends

    def __len__(self) -> int:
        """Return how many digests are remembered, those whose time is over and nobody asked about included."""
        return len(self._until_s)

    def add(self, key: bytes, now_s: float) -> None:
        """Remember a digest from now on; the oldest goes where there are too many."""
        self._until_s.pop(key, None)
        self._until_s[key] = now_s + _REMEMBERED_S
        if len(self._until_s) > _MAX_REMEMBERED:
            del self._until_s[next(iter(self._until_s))]

    def discard(self, key: bytes) -> None:
        """Forget a digest, if it is remembered: the request went well."""
        self._until_s.pop(key, None)

    def has(self, key: bytes, now_s: float) -> bool:
        """Tell whether a digest is remembered, and forget those whose time is over."""
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            del self._until_s[next(iter(self._until_s))]
        return key in self._until_s
