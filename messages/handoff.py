"""Who lacks KV asks an owner, which computes it or has it and publishes it under a lease; the asker pulls, releases."""

from __future__ import annotations

import msgspec

from messages.errors import ErrorInfo
from messages.request import GenerateRequest
from messages.stream import TokenLogprob
from messages.tier import Tier

#: Of a block's location among packed ones (kvcache.locations).
LOCATION_BYTES = 52


class RegionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A registered region as its owner describes it to a puller. Travels only over the authenticated channel."""

    road: str  #: transport that can read it: "shm", "loopback", ...
    handle: bytes  #: opaque to all but that transport
    num_bytes: int
    nonce: bytes  #: random; proves that what was opened is what was described


class DescribeRegions(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Whoever may pull from a worker asks once, when it connects: where do your blocks lie?"""


class RegionsDescribed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: the same pool, once for each road that reaches it. All block locations of this peer refer to it."""

    regions: list[RegionInfo]
    num_blocks: int  #: of the pool: with the block size in bytes, gives every block's offset (kvcache.region)
    has_generations: bool


class RoadMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a road's two ends have to tell each other (transport.protocol.Link)."""

    road: str
    body: bytes


class PrefillRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Compute the KV of `request`'s prompt, sample its first token, publish.

    `num_held_tokens`: leading tokens whose blocks the asker holds (a multiple of the block size): they need not be
    published, though they must be attended to.
    """

    request: GenerateRequest
    num_held_tokens: int = 0


class BlocksRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Whoever lacks blocks to an owner that may have them: offer what you hold of these, under a lease.

    The answer is one KvHandoff or more, without a token; blocks that none of them has are not there. An owner that
    reads them from a slower tier offers them as they come, in the order wanted.
    """

    request_id: str  #: of this question; the asker gives each another one
    first_index: int  #: position in the asker's sequence of the first name
    names: bytes  #: 16 bytes each, concatenated, of consecutive blocks
    is_tail_first: bool = False  #: the last ones are wanted first: the head is being computed meanwhile


class PrefetchBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to a node cache: a sequence that waits will ask for these. What of them do you hold, and where?

    The answer is BlocksFound; and BlocksFound again when what lay on slower tiers was read up into the arena, as far
    as there is room that is not worth more. Nothing is pinned. ReleaseLease of the same id ends what is not read yet.
    """

    request_id: str  #: of this question; the asker gives each another one
    first_index: int  #: position in the asker's sequence of the first name
    names: bytes  #: 16 bytes each, concatenated, of consecutive blocks


class FoundRun(msgspec.Struct, frozen=True, array_like=True):
    """Blocks [begin, end) of the asker's sequence lie in this tier."""

    begin: int
    end: int
    tier: Tier


class BlocksFound(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Node cache to worker: where the blocks of a PrefetchBlocks lie now; those in no run are not there."""

    request_id: str
    runs: tuple[FoundRun, ...]


class KvHandoff(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Owner to asker: these blocks are readable until the lease ends. Prefill's last one carries the first token.

    Handoffs of one request come in order; each adds blocks; all share one lease. `is_last` is False on those
    that are published while prefill still runs, or slower tiers are read.
    """

    request_id: str
    lease_s: float  #: from receipt; RenewLease starts it anew, ReleaseLease ends it
    blocks: bytes  #: their locations, packed
    is_last: bool = True
    first_token: int | None = None
    first_logprob: TokenLogprob | None = None
    num_cached_tokens: int = 0  #: prompt tokens that prefill found in its own cache
    elapsed_s: float = 0.0  #: at the owner, from the question to this
    tier: Tier = "device"  #: where the owner had these blocks

    def __post_init__(self) -> None:
        """Raise ValueError where blocks cannot be told apart."""
        _check_locations(self.blocks)


class BlockHint(msgspec.Struct, frozen=True, array_like=True):
    """What is wanted of the blocks at positions [begin, end) of a prefix; the other fields as CacheHint's."""

    begin: int
    end: int | None
    priority: int | None
    ttl_s: float


class RoomRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to the node cache of its node: I could write these blocks into your arena.

    Blocks of one prefix, in any order. To name those before them as well, which are held, keeps heads from leaving
    before their tails.
    """

    request_id: str  #: of this question; the asker gives each another one
    names: bytes  #: 16 bytes each, concatenated
    indexes: list[int]  #: of each, its position in its prefix: later ones cost more to recompute
    tenant: int = 0  #: whose they are, 64 bits; 0: nobody's in particular
    hints: tuple[BlockHint, ...] = ()  #: of those that are held, and of the others once they are written
    is_again: bool = False  #: of the same prefix as its last question, for what was left out: not wanted a second time


class RoomGranted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Node cache to worker: write these, and only these, where they are to lie, and say so with BlocksWritten.

    A location's index is the position in its prefix; its generation is the one to be named with BlocksWritten. Before
    each block is written its generation is looked at in the arena: another one means that the room was taken back.
    What is not among them is held already, on its way, or left out. RenewLease gives more time, ReleaseLease gives all
    of it back.
    """

    request_id: str
    blocks: bytes  #: their locations, packed
    num_left: int = 0  #: blocks left out: there was no room at once, or they are not worth it

    def __post_init__(self) -> None:
        """Raise ValueError where blocks cannot be told apart."""
        _check_locations(self.blocks)


class BlocksWritten(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to node cache: these granted blocks hold their bytes, of these checksums; the others are given back.

    The locations are those of RoomGranted, with number of tokens and checksum. It ends the grant.
    """

    request_id: str
    blocks: bytes  #: their locations, packed

    def __post_init__(self) -> None:
        """Raise ValueError where blocks cannot be told apart."""
        _check_locations(self.blocks)


class PrefillFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Owner to asker: no handoff will come for this request; nothing is held for it."""

    request_id: str
    error: ErrorInfo


class RenewLease(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asker to owner: the pull makes progress, so the lease starts anew. Unknown ids are ignored."""

    request_id: str


class ReleaseLease(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asker to owner: the blocks were pulled, or are not wanted any more. Also cancels what is still being made."""

    request_id: str


def _check_locations(blocks: bytes) -> None:
    if len(blocks) % LOCATION_BYTES:
        raise ValueError(f"{len(blocks)} bytes of packed locations, wanted a multiple of {LOCATION_BYTES}")
