"""Where a block can lie."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

#: In a worker's pool; in the arena, on the disk or in the remote store of a node cache.
Tier: TypeAlias = Literal["device", "host", "disk", "remote"]

#: All of them, the slowest one last.
TIERS: Final[tuple[Tier, ...]] = ("device", "host", "disk", "remote")
#: Those whose blocks lie in memory: bringing them costs what the road costs.
AT_HAND: Final[frozenset[Tier]] = frozenset({"device", "host"})
#: Those from which an owner has to read.
SLOW_TIERS: Final[frozenset[Tier]] = frozenset({"disk", "remote"})
