"""Managing what is cached: an ingress asks the router where blocks lie, and node caches to list, drop, keep, verify.

Node caches keep nothing of a question: each is about one tier, does a bounded piece of it and says where the next one
begins; the asker goes on from there, at its own pace.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from messages.errors import ErrorInfo
from messages.tier import Tier


class WhereBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ingress to router: who holds the blocks of this prompt?"""

    query_id: str
    names: bytes  #: 16 bytes each, concatenated


class BlockHolder(msgspec.Struct, frozen=True, array_like=True):
    """An owner that holds blocks, and in which of its tiers."""

    worker_id: str
    tier: Tier


class KnownRun(msgspec.Struct, frozen=True, array_like=True):
    """Blocks [begin, end) of a prompt have these holders."""

    begin: int
    end: int
    holders: tuple[BlockHolder, ...]


class BlocksKnown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: from the prompt's head up to the first block that nobody holds. A hint, as all that a router says."""

    query_id: str
    runs: tuple[KnownRun, ...]


class ListBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a node cache: what do you hold in this tier? A block that is moved meanwhile may be listed twice."""

    query_id: str
    tier: Tier
    cursor: int = 0


class BlocksListed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: columns of numbers, little endian; those of which a tier keeps nothing are empty."""

    query_id: str
    layout_version: int  #: of the bytes in a block, and of their checksum
    num_blocks: int
    names: bytes  #: 16 bytes each
    places: bytes  #: uint64: block id in the arena, where in a store
    num_tokens: bytes  #: uint32
    checksums: bytes  #: uint64
    tenants: bytes = b""  #: uint64; 0: nobody in particular
    num_pins: bytes = b""  #: int32: readers of the block right now
    kept_s: bytes = b""  #: float64: from now on, for so long it is not evicted; inf: for good
    num_hits: bytes = b""  #: uint32: how often it was wanted again
    age_s: bytes = b""  #: float64: since its last use
    next_cursor: int | None = None  #: None: there is no more


class ClearBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a node cache: drop blocks of this tier, whatever was said of keeping them.

    What is being read or written right now stays, and is counted. The answer to the last piece comes when what was
    dropped is gone from disk for good.
    """

    query_id: str
    tier: Tier
    names: bytes | None = None  #: only these, 16 bytes each, concatenated
    tenant: int | None = None  #: only this one's; tiers below the host's do not know whose their blocks are
    is_dry_run: bool = True  #: tell what would go
    is_last: bool = True  #: no more names come after these
    cursor: int = 0


class KeepBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a node cache: do not evict these blocks from the arena for so long, and value them by `priority`."""

    query_id: str
    names: bytes  #: 16 bytes each, concatenated, heads first
    ttl_s: float  #: inf: for good; 0: no longer than others
    priority: int = 0  #: -2 to 2, each step doubles or halves their worth


class CheckBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a node cache: read blocks of this tier, verify their checksums, drop those that do not have theirs."""

    query_id: str
    tier: Tier
    names: bytes | None = None  #: only these
    cursor: int = 0


class PieceDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to ClearBlocks, KeepBlocks and CheckBlocks: what became of the blocks of this piece."""

    query_id: str
    num_done: int = 0  #: blocks that were, or would be, dropped; that are kept; that were verified
    num_tokens: int = 0  #: of those
    num_in_use: int = 0  #: blocks that stay because somebody reads or writes them
    num_damaged: int = 0  #: of the verified ones, those that did not have their checksum
    num_held: int = 0  #: blocks of the whole tier, for who shows progress
    next_cursor: int | None = None  #: None: there is no more
    error: ErrorInfo | None = None  #: the store failed; what is told besides was done all the same


CacheQuestion: TypeAlias = ListBlocks | ClearBlocks | KeepBlocks | CheckBlocks
CacheAnswer: TypeAlias = BlocksListed | PieceDone
