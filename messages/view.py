"""What the router knows of the fleet, for people who look at it: who holds how much, how busy workers are, what is hot.

An ingress asks while somebody looks at the placement page, and never else.
"""

from __future__ import annotations

import msgspec

from messages.cache import KnownRun
from messages.fleet import Role
from messages.tier import Tier


class AskView(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ingress to router: what do you know?"""

    query_id: str
    tenant: int | None = None  #: only prefixes of this one's, and nobody's workers; None: everything
    num_prefixes: int = 20  #: at most


class HolderView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker or node cache, as the router sees it."""

    worker_id: str
    role: Role
    node_id: str
    is_in_step: bool  #: its snapshot came whole, and no gap since
    known_blocks: dict[Tier, int]  #: that the index has of it, by tier
    num_spare: int = 0  #: of them, those that others keep
    num_running: int = 0  #: sequences, reported and promised together with the next
    num_waiting: int = 0
    num_promised: int = 0  #: sequences that were placed and that it has not reported
    free_blocks: int = 0
    queue_s: float = 0.0  #: of prefill, reported and promised
    ttft_s: float | None = None  #: of `ViewTold.nominal_tokens` that nobody holds, computed there; None: no price yet


class PrefixView(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of prompts, as far as it was found held, and who has it now."""

    name: bytes  #: of its last block, 16 bytes
    num_blocks: int
    num_tokens: int
    num_requests: float  #: that were found to begin with it, each counting half as much every ten minutes
    age_s: float  #: since the last of them
    last_request: str  #: the id of its RouteRequest
    tenant: int
    runs: tuple[KnownRun, ...]  #: the first ones, head first, up to the first block that nobody holds


class ViewTold(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer."""

    query_id: str
    nominal_tokens: int
    holders: tuple[HolderView, ...] = ()
    prefixes: tuple[PrefixView, ...] | None = ()  #: hottest first; None: they are not counted
