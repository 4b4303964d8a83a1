"""What /v1/cache/... takes and gives, field by field. Unknown fields are refused: a typing error clears nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from cluster.openai.protocol import ChatMessage, ClientTemplate, Salt, Tool
from messages.tier import Tier

#: Those of node caches.
NodeTier: TypeAlias = Literal["host", "disk", "remote"]
NODE_TIERS: tuple[NodeTier, ...] = ("host", "disk", "remote")

Tiers = Annotated[list[Tier], Meta(min_length=1, description="default: all of them")]
StoreTiers = Annotated[list[Literal["disk", "remote"]], Meta(min_length=1, description="default: both of them")]
DryRun = Annotated[bool, Meta(description="say what would go, and drop nothing")]
Everything = Annotated[bool, Meta(description="all blocks of these tiers that the caller may clear")]
CacheSalt = Annotated[Salt, Meta(description="of the requests that the blocks are from")]
TenantName = Annotated[str, Meta(max_length=64, description="whose blocks; default: the caller's own")]
TtlSeconds = Annotated[float, Meta(gt=0.0, le=1e9, description="default: for good")]
BlockPriority = Annotated[int, Meta(ge=-2, le=2, description="each step doubles or halves what a block is worth")]


class PromptFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose blocks are meant: a `prompt`, as text or token ids, or `messages`, as the endpoints take them that answer.

    Blocks that other prompts begin with too are theirs as well.
    """

    model: str | None = None
    prompt: str | list[Any] | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: ClientTemplate | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: CacheSalt | None = None
    tenant: TenantName | None = None


class LookupRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/lookup."""


class ExportRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/export."""


class ClearRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/clear: a prompt's blocks; all of a `tenant`, or of nobody's `cache_salt`; or everything."""

    everything: Everything = False
    tiers: Tiers | None = None
    dry_run: DryRun = True


class PinRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/pin: of the blocks that lie in host memory, half of which may be kept so."""

    ttl_s: TtlSeconds | None = None
    priority: BlockPriority = 0


class UnpinRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/unpin."""


class EvictRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/evict: a prompt's blocks, but those that are to be kept."""

    tiers: Tiers | None = None
    dry_run: DryRun = True


class MoveRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/move: a prompt's blocks, on each node that has them."""

    source: NodeTier
    target: NodeTier


class WarmRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/warm: a prompt's blocks to host memory, and to a worker's pool where one is named."""

    worker_id: str | None = None


class CollectRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/cache/gc."""

    tiers: StoreTiers | None = None


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/cache/import, as MessagePack: consecutive blocks of a prompt, some of a file's (cluster.prefix_file)."""

    fingerprint: bytes
    layout_version: int
    kernel_path: str  #: what computed the blocks
    block_size: int  #: tokens
    block_bytes: int
    first_block: int  #: position in the prompt
    token_bytes: bytes  #: of the prompt up to the end of these blocks, uint32 each, little endian
    names: bytes  #: of these blocks without a salt, 16 bytes each
    checksums: bytes  #: uint64 each, little endian
    data: memoryview  #: the blocks, concatenated


class CheckRequest(PromptFields, frozen=True, kw_only=True):
    """POST /v1/cache/check: a prompt's blocks, or everything."""

    tiers: Tiers | None = None


class Holder(msgspec.Struct, frozen=True):
    """Who holds blocks, and where."""

    worker_id: str  #: a worker or a node cache
    node: str
    tier: Tier


class HeldTokens(msgspec.Struct, frozen=True):
    """Tokens [begin, end) of a prompt have these holders."""

    begin: int
    end: int
    holders: list[Holder]


class LookupReply(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prompt's blocks lie, as far as the router knows, from its head to the first block that nobody holds."""

    num_tokens: int  #: of the prompt
    block_size: int  #: tokens; the last block of a prompt has no name until it is full
    held_tokens: int  #: of the prompt, whoever holds them
    tokens: dict[Tier, int]  #: of the prompt, that some holder has in this tier
    runs: list[HeldTokens]


class TierCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a tier's blocks."""

    blocks: int = 0  #: dropped (or would be), kept, verified, moved, or taken in
    tokens: int = 0  #: of those
    bytes: int = 0  #: of those
    in_use: int = 0  #: blocks that stay because somebody uses them right now
    damaged: int = 0  #: of the verified ones: they did not have their checksum
    below: dict[Tier, int] = {}  #: of those taken in or moved, the blocks that came no further up than this tier
    without_room: int = 0  #: blocks that no tier took in: what is there is worth more, or used
    above_quota: int = 0  #: blocks that no tier took in: their tenant has its quota
    not_stored: int = 0  #: blocks that no tier took in: the store that might have had them failed
    freed_files: int = 0  #: files or objects that were given up
    freed_bytes: int = 0  #: that they took, as far as it is known


class CacheFailure(msgspec.Struct, frozen=True):
    """A worker or a node cache, or a store of it, that did not do all of it."""

    worker_id: str
    message: str


class WorkReply(msgspec.Struct, frozen=True, kw_only=True):
    """What all workers and node caches did that were asked."""

    tiers: dict[Tier, TierCounts]
    num_caches: int  #: node caches that were asked
    num_workers: int = 0  #: that were asked
    failures: list[CacheFailure] = []
    dry_run: bool | None = None  #: of clear


class WorkProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A line of check, move, warm and gc while they go on; the last line is the whole, a WorkReply."""

    worker_id: str
    tier: Tier
    blocks: int  #: done so far
    damaged: int
    held: int  #: blocks of the tier, or of the prompt there


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """A tier's numbers; None: nobody counts it."""

    blocks: int | None  #: that hold something
    bytes: int | None
    capacity_bytes: int | None
    hits: int | None  #: blocks that were found there, since it was started
    evictions: int | None  #: blocks that made room, since it was started


class TenantStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant's blocks take of a tier, uncompressed; of the remote store all that is known to lie there."""

    bytes: int
    quota_bytes: int | None  #: None: no limit of its own


class OwnerStats(msgspec.Struct, frozen=True, kw_only=True):
    """A worker or a node cache, and its tiers."""

    worker_id: str
    role: str
    node: str
    block_bytes: int
    block_size: int  #: tokens
    is_answering: bool
    tiers: dict[Tier, TierStats]
    tenants: dict[str, dict[Tier, TenantStats]] = {}  #: by name


class CacheStatsReply(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/cache/stats. A tenant is told of its own blocks only."""

    workers: list[OwnerStats]
    caches: list[OwnerStats]
