"""The prices of computing and of moving KV that a worker learned (kvcache.price) and reports to the router."""

from __future__ import annotations

import msgspec

from messages.tier import Tier


class ComputePrice(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of an engine step, as a sum: what each of its parts adds. All are at least 0."""

    step_s: float = 0.0  #: of any step
    row_s: float = 0.0  #: of a decode row
    row_key_s: float = 0.0  #: of a token's KV that a decode row reads
    token_s: float = 0.0  #: of a prefill token
    pair_s: float = 0.0  #: of a query and a key that meet in prefill


class MovePrice(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to bring blocks from one source to the worker that reports it, over the road that it takes from there."""

    source: str  #: the owner's channel endpoint
    tier: Tier = "device"  #: where the owner has the blocks
    road: str  #: "shm", "ucx", ...
    fixed_s: float  #: of a pull of any size
    byte_s: float  #: of a byte more
    handoff_s: float  #: what asking, publishing and the last pull add to the computation at the source
