"""The contract of a road: moves bytes out of another process's region into one's own memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from messages.errors import ServeError
from messages.handoff import RegionInfo
from transport.memory import Memory


class TransferError(ServeError):
    """A pull did not happen or did not end in time. What the target ranges hold is undefined."""

    default_status = 503


class RegionError(TransferError):
    """The region is unknown, gone, not the one described, or a range lies outside it. Nothing was written."""


class Copy(NamedTuple):
    """`num_bytes` from `source_offset` of the remote region to `target_offset` of the own memory."""

    source_offset: int
    target_offset: int
    num_bytes: int


class Transport(Protocol):
    """A road. One object per process and road; safe to use from one event loop.

    `is_one_sided`: the owner's process takes no part in a pull. `can_abort_safely`: after a pull that timed out or
    was cancelled has returned, no late byte can land in the target ranges; where False the caller keeps the target
    blocks quarantined.
    """

    @property
    def road(self) -> str:
        """As in `RegionInfo.road`."""
        ...

    @property
    def is_one_sided(self) -> bool:
        """See above."""
        ...

    @property
    def can_abort_safely(self) -> bool:
        """See above."""
        ...

    def register(self, memory: Memory) -> RegionInfo:
        """Make `memory` readable by peers; the answer describes it to them. Idempotent."""
        ...

    async def pull(self, source: RegionInfo, copies: Sequence[Copy], target: Memory, timeout_s: float) -> None:
        """Carry out all copies, in order; return when the last byte has landed.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: it failed or made no end within `timeout_s` seconds.
        """
        ...

    def forget(self, source: RegionInfo) -> None:
        """Drop what is kept open for `source` (its owner is gone)."""
        ...

    def close(self) -> None:
        """Unregister everything; later pulls from this process's regions fail."""
        ...
