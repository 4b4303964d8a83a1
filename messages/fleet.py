"""Which workers are there, what they hold, how busy they are. The router subscribes to every worker."""

from __future__ import annotations

from typing import Literal

import msgspec

from messages.price import ComputePrice, MovePrice
from messages.tier import Tier

Role = Literal["prefill", "decode", "cache"]


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's constants, recorded as its replica's metadata. A restarted worker has a new `worker_id`."""

    worker_id: str
    role: Role
    address: str  #: channel endpoint, tcp://KEY_ID@host:port
    node_id: str
    fingerprint: bytes  #: of weights, dtype, KV layout, rope, the bits it computes: root of all its block names
    block_size: int  #: tokens
    num_blocks: int
    block_bytes: int
    max_model_len: int  #: tokens
    max_num_seqs: int
    roads: tuple[str, ...]  #: transports it offers
    kernel_path: str = ""  #: what computes its model, for people
    dtype: str = ""  #: of its weights and KV, for people
    lacks_kernels: bool = False  #: it computes on a CPU, slowly, for want of the C++ kernels
    checksum_path: str = ""  #: what computes its blocks' checksums on the host, for people
    compute: ComputePrice | None = None  #: as it measured itself at the start


class Subscribe(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Router to worker: send a snapshot, then events and reports. Also the answer to a gap."""


class KvEvents(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What changed in a worker's pool, in order: `cleared` first, then `stored`, then `removed`.

    `seq` counts from 0 per (worker_id, subscription); a receiver that sees a gap subscribes again. A snapshot is
    everything stored, in pieces: the first is cleared and has seq 0, and nothing comes between them. Names are 16 bytes
    each, concatenated.
    """

    worker_id: str
    seq: int
    tier: Tier = "device"  #: of `stored` and `removed`
    cleared: bool = False
    num_pieces_left: int | None = None  #: of a snapshot: how many follow this one; None: it is no piece, but a change
    stored: bytes = b""
    removed: bytes = b""


class NodeCacheFound(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to router, after Subscribe and with every change: the node cache of its node; None: it has none now."""

    worker_id: str
    info: WorkerInfo | None


class SpareBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Router to worker: other holders keep these blocks, so that the copies here are the first to go, or not any more.

    Names are 16 bytes each, concatenated; of blocks that are gone meanwhile nothing is to be done. After a Subscribe
    every block counts as kept until this says otherwise.
    """

    spare: bytes = b""
    kept: bytes = b""


class TakeBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Router, or an ingress for who manages caches, to worker: pull those of these that are worth more than yours.

    They are of one prefix, and come as they are to be evicted: tails before heads. For whom there is no room are tails.
    """

    address: str  #: of the owner that holds them: its channel endpoint
    names: bytes  #: 16 bytes each, concatenated
    age_s: float | None  #: since they were last used; None: they are wanted now


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker's load and measured rates, about once a second and soon after each admission or end."""

    worker_id: str
    #: counts a worker's reports, the same for all subscribers; a receiver that sees a gap subscribes again
    seq: int = 0
    #: until the prompts that wait are computed, by its own price and by how much longer that took lately
    queued_s: float
    queued_short_s: float = 0.0  #: of computing those of them that are short, by its price alone
    num_short: int = 0  #: sequences, waiting or running, whose prompts were short
    num_waiting: int
    num_running: int
    free_blocks: int  #: free or evictable
    idle_blocks: int = 0  #: of those, the ones that are no loss, up to some: free, kept by others, or unused for long
    reused_share: float = 0.0  #: of what lay unused and nobody else kept, what was used again and not evicted, of late
    decode_step_s: float  #: measured median; 0 before the first measurement
    compute: ComputePrice | None = None  #: None before the first measurement
    moves: tuple[MovePrice, ...] = ()  #: of sources whose price changed since the last report; all after Subscribe
    is_whole: bool = True  #: the next three are all, as after Subscribe; else what changed since the report before
    request_ids: tuple[str, ...] = ()  #: sequences it has: replaces the router's prediction for them
    ended_ids: tuple[str, ...] = ()  #: sequences it has no more; those that came since the report before, too
    declined_ids: tuple[str, ...] = ()  #: of those it has, the ones that it computes itself though prefill was to do it


class GetStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Anyone to a worker or the router: answer with Stats."""

    query_id: str


class RoadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The road that a worker pulls over from one peer."""

    peer: str  #: the peer's channel endpoint
    road: str  #: "" while none works
    carriers: str  #: what really carries the bytes: "memcpy", "tcp", "cuda_ipc", ...
    bytes_per_s: float  #: measured; 0 before the first pull
    num_failed: int  #: transfers that failed, over any road


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Counters and gauges by metric name; labels as `name{a="b"}`.

    An ingress tells the router its own every second, unasked, and so does a node cache whom it may concern: a scrape
    of one ingress shows all.
    """

    query_id: str
    worker_id: str
    role: str
    values: dict[str, float]
    roads: tuple[RoadStatus, ...] = ()
    ingresses: tuple[Stats, ...] = ()  #: of the router: what other ingresses than the one that asks told last
    caches: tuple[NodeCacheStats, ...] = ()  #: of the router: the node caches that it hears, and what they told last


class NodeCacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """A node cache, and its counters and gauges."""

    info: WorkerInfo
    values: dict[str, float]
