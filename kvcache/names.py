"""Block names: what makes KV recognisable everywhere, and only to those who may use it.

A name is 16 bytes of keyed BLAKE2b (RFC 7693) over *all* tokens from the first to the block's last, as uint32 little
endian. The key is derived from the model's fingerprint, the tenant's salt, the adapter and the block size: KV of
another model or tenant has other names, and nobody without the salt can compute them. The digest is
streamed: position i can be named without keeping the names before it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import Self

NAME_BYTES = 16
TOKEN_BYTES = 4
_CONTEXT = b"kvray names v1"  # at most 16 bytes
_SALT_BYTES = 16


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Pack token ids as uint32 little endian.

    Raises:
        OverflowError: an id is negative or needs more than 32 bits.
    """
    tokens = array("I", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def unpack_tokens(token_bytes: bytes) -> list[int]:
    """Return the token ids in `token_bytes`, which `pack_tokens` wrote.

    Raises:
        ValueError: the length is no multiple of four.
    """
    return token_array(token_bytes).tolist()


def token_array(token_bytes: bytes) -> array[int]:
    """Do as `unpack_tokens`, without an object for each: lists of many are gone through by every garbage collection."""
    tokens = array("I")
    tokens.frombytes(token_bytes)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def split_names(names: bytes) -> list[bytes]:
    """Split concatenated names into a list of them, 16 bytes each."""
    return [names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES)]


def whole_names(names: bytes) -> list[bytes]:
    """Split concatenated names that came from elsewhere, without a rest that is none."""
    return split_names(names[: len(names) // NAME_BYTES * NAME_BYTES])


def tenant_of(salt: bytes) -> int:
    """Return by what number blocks say whose they are, 64 bits: of whoever salts names so; 0: nobody in particular."""
    return int.from_bytes(blake2b(salt, digest_size=8).digest(), "little") if salt else 0


def tenant_number(name: str) -> int:
    """Return by what number blocks say that they are those of the tenant of this name: 64 bits, the same everywhere."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8, person=b"kvray tenant").digest(), "little") or 1


def tenant_salt(name: str, secret: bytes) -> bytes:
    """Return what stands before every salt of a tenant's block names, 16 bytes: nobody without `secret` can tell it."""
    return blake2b(name.encode(), digest_size=_SALT_BYTES, key=secret, person=b"kvray salt").digest()


def block_names(fingerprint: bytes, salt: bytes, token_bytes: bytes, block_size: int, *, adapter: bytes = b"") -> bytes:
    """Name the full blocks of a sequence: 16 bytes each, concatenated. Tokens after the last full block are ignored.

    128 k tokens in blocks of 16 take about 4 ms; with BLAKE3, whose tree is finished anew for every name, 7 to 17 ms
    (one busy EPYC core, 2026-11-23).
    """
    return b"".join(BlockNamer(fingerprint, salt, block_size, adapter=adapter).extend(token_bytes))


class BlockNamer:
    """Names the blocks of one growing sequence."""

    __slots__ = ("_block_bytes", "_digest", "_pending")

    def __init__(self, fingerprint: bytes, salt: bytes, block_size: int, *, adapter: bytes = b"") -> None:
        self._block_bytes = block_size * TOKEN_BYTES
        key = _key(fingerprint, salt, adapter, block_size)
        self._digest = blake2b(digest_size=NAME_BYTES, key=key)
        self._pending = b""  # tokens after the last full block

    def extend(self, token_bytes: bytes) -> list[bytes]:
        """Append tokens (as `pack_tokens` gives them); return the names of the blocks that they complete."""
        data = memoryview(self._pending + token_bytes)
        update, digest = self._digest.update, self._digest.digest
        names: list[bytes] = []
        step = self._block_bytes
        num_full_bytes = len(data) // step * step
        for begin in range(0, num_full_bytes, step):
            update(data[begin : begin + step])
            names.append(digest())
        self._pending = bytes(data[num_full_bytes:])
        return names

    def copy(self) -> Self:
        """Return a namer of another sequence that begins with the same tokens."""
        other = object.__new__(type(self))
        other._block_bytes, other._digest, other._pending = self._block_bytes, self._digest.copy(), self._pending
        return other


@lru_cache(maxsize=1024)
def _key(fingerprint: bytes, salt: bytes, adapter: bytes, block_size: int) -> bytes:
    hasher = blake2b(digest_size=32, person=_CONTEXT)
    for field in (fingerprint, salt, adapter, block_size.to_bytes(8, "little")):
        hasher.update(len(field).to_bytes(8, "little"))  # no two lists of fields give the same bytes
        hasher.update(field)
    return hasher.digest()
