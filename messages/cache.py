"""Managing what is cached: an ingress asks the router where blocks lie, and their owners to do what is wanted.

Owners keep nothing of a question: each is about one tier, does a bounded piece of it and says where the next one
begins; the asker goes on from there, at its own pace. Node caches answer all of them, workers those that can be asked
of the tier "device".
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from messages.errors import ErrorInfo
from messages.tier import Tier

#: Bytes of blocks in a message, or one block where that is more: some ms of whoever sends or takes it.
PIECE_BYTES: Final = 4 << 20


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
    """To an owner: what do you hold in this tier? A block that is moved meanwhile may be listed twice."""

    query_id: str
    tier: Tier
    tenant: int | None = None  #: only this one's
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
    """To an owner: drop blocks of this tier, whatever was said of keeping them, unless `spares_kept`.

    What is being read or written right now stays, and is counted. The answer to the last piece comes when what was
    dropped is gone from disk for good.
    """

    query_id: str
    tier: Tier
    names: bytes | None = None  #: only these, 16 bytes each, concatenated
    tenant: int | None = None  #: only this one's
    spares_kept: bool = False  #: as eviction does: what is to be kept stays, and counts as in use
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
    """To an owner: read blocks of this tier, verify their checksums, drop those that do not have theirs.

    Of a worker's blocks those are verified whose checksums it knows, as it published them.
    """

    query_id: str
    tier: Tier
    names: bytes | None = None  #: only these
    cursor: int = 0


class MoveBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a node cache: bring blocks of this tier to another one; a bounded number of them for each question.

    What a tier above does not take in comes as far up as there is room, and stays where it is at worst.
    """

    query_id: str
    tier: Tier  #: where they lie
    target: Tier
    names: bytes  #: 16 bytes each, concatenated, heads first
    first_index: int = 0  #: position in its prefix of the first name
    keeps_source: bool = False  #: they are to lie in both
    cursor: int = 0  #: of the names, how many are done


class CollectGarbage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a node cache: give the room back that dropped blocks of this tier take, some of it for each question."""

    query_id: str
    tier: Tier
    cursor: int = 0


class FetchBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To an owner: what do these blocks hold? Names beyond the first PIECE_BYTES of blocks are left out."""

    query_id: str
    tier: Tier
    names: bytes  #: 16 bytes each, concatenated


class BlocksFetched(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: those of the blocks that are there and have their checksums, in the order wanted."""

    query_id: str
    layout_version: int = 0  #: of the bytes in a block, and of their checksum
    kernel_path: str = ""  #: what computed them
    names: bytes = b""  #: 16 bytes each
    checksums: bytes = b""  #: uint64, little endian
    data: memoryview = memoryview(b"")  #: the blocks, concatenated
    error: ErrorInfo | None = None  #: the store failed


class PutBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a node cache: take these whole blocks into the arena. All of them are verified before the first is held.

    At most PIECE_BYTES, or one block. They go to the nearest store at once, and so do those that find no room above.
    The answer is a PieceDone; a RequestError in it says that none was taken.
    """

    query_id: str
    fingerprint: bytes
    layout_version: int
    kernel_path: str
    first_index: int  #: position in its prefix of the first one; the others follow
    block_size: int  #: tokens in each
    names: bytes  #: 16 bytes each
    checksums: bytes  #: uint64, little endian
    data: memoryview  #: the blocks, concatenated
    tenant: int = 0  #: 64 bits of a digest of who they belong to; 0: nobody in particular
    tiers: tuple[Tier, ...] = ("host", "disk", "remote")  #: that may take them in now, the nearest first


class PieceDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to most questions: what became of the blocks of this piece."""

    query_id: str
    num_done: int = 0  #: blocks that were, or would be, dropped; that are kept; were verified; moved; taken in
    num_tokens: int = 0  #: of those
    num_in_use: int = 0  #: blocks that stay because somebody reads or writes them
    num_damaged: int = 0  #: of the verified ones, those that did not have their checksum
    num_below: dict[Tier, int] = {}  #: of those taken in or moved, the blocks that came no further up than this tier
    num_without_room: int = 0  #: blocks that no tier took in: what is there is worth more, or used
    num_above_quota: int = 0  #: blocks that no tier took in: their tenant has its quota
    num_failed: int = 0  #: blocks that no tier took in: the store that might have had them failed
    num_freed_files: int = 0  #: files or objects that were given up
    num_freed_bytes: int = 0  #: that they took, as far as it is known
    num_held: int = 0  #: blocks of the whole tier, or of what was asked for by name: for who shows progress
    next_cursor: int | None = None  #: None: there is no more
    error: ErrorInfo | None = None  #: it failed; what is told besides was done all the same


CacheQuestion: TypeAlias = (
    ListBlocks | ClearBlocks | KeepBlocks | CheckBlocks | MoveBlocks | CollectGarbage | FetchBlocks | PutBlocks
)
CacheAnswer: TypeAlias = BlocksListed | PieceDone | BlocksFetched
