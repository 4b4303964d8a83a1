"""Blocks whose bytes follow from their names, so that whatever comes out of a cache can be told right from wrong."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from nodecache.arena import Arena, ArenaLayout
from nodecache.pool import HostPool
from nodecache.quotas import Accounts
from nodecache.worth import Worth
from transport.checksum import checksum

BLOCK_BYTES = 256
BLOCK_SIZE = 16
QUARANTINE_S = 5.0
FINGERPRINT = b"a model"


def name_of(number: int, chain: str = "") -> bytes:
    return blake2b(f"{chain}/{number}".encode(), digest_size=16).digest()


def names_of(numbers: Sequence[int], chain: str = "") -> list[bytes]:
    return [name_of(number, chain) for number in numbers]


def content_of(name: bytes, block_bytes: int = BLOCK_BYTES) -> bytes:
    return (name * (block_bytes // len(name) + 1))[:block_bytes]


def checksum_of(name: bytes, block_bytes: int = BLOCK_BYTES) -> int:
    return checksum(memoryview(content_of(name, block_bytes)))


def layout_of(num_blocks: int, block_bytes: int = BLOCK_BYTES, *, version: int = 1) -> ArenaLayout:
    return ArenaLayout(fingerprint=FINGERPRINT, version=version, block_bytes=block_bytes, num_blocks=num_blocks)


def pool_of(num_blocks: int, now_s: float = 0.0, accounts: Accounts | None = None) -> HostPool:
    layout = layout_of(num_blocks)
    return HostPool(Arena(layout.allocate(), layout), Worth(BLOCK_SIZE), now_s, QUARANTINE_S, accounts)
