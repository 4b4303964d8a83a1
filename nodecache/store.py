"""The contract of a tier below host memory: whole blocks, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from messages.errors import KvrayError
from nodecache.quotas import Accounts


class StoreError(KvrayError):
    """A store cannot do what was asked: it is full, read-only, gone, or slower than the deadline. Others may try."""

    default_status = 503


class StoredBlock(NamedTuple):
    """What a store keeps of a block besides its bytes."""

    name: bytes  #: 16 bytes
    num_tokens: int
    checksum: int  #: of the plain bytes, 64 bits (transport.checksum)
    tenant: int = 0  #: whose it is, 64 bits; 0: nobody's in particular


class StorePage(NamedTuple):
    """Some of the blocks that a store holds."""

    blocks: Sequence[StoredBlock]
    places: Sequence[int]  #: of each, where it lies: a number that means something to the store, below 2^64
    num_held: int  #: blocks of the whole store
    next_cursor: int | None  #: where to go on; None: there is no more


class Collected(NamedTuple):
    """What a store gave up."""

    num_files: int  #: or objects
    num_bytes: int  #: that they took, as far as it is known
    has_more: bool  #: there is more that could be given up at once


class BlockStore(Protocol):
    """A tier below host memory. Any thread may call; every call that does IO ends by its deadline at the latest.

    A store holds blocks of one model fingerprint, layout version and size in bytes, which it was opened with, and of a
    tenant no more than its quota: beyond it a write drops others of the same tenant, or does not take in its last ones.
    """

    def find(self, name: bytes) -> StoredBlock | None:
        """Return what is kept of a block; None where it is not there. Does no IO."""
        ...

    def names(self) -> Iterable[bytes]:
        """Return the names of all blocks that it holds, for a snapshot. Does no IO."""
        ...

    def page(self, cursor: int, max_blocks: int) -> StorePage:
        """Return at most so many blocks, beginning at `cursor`: 0, or the one that the page before told. Does no IO.

        A block that is moved or written meanwhile may be missed or come twice; none that lay there all the time is
        missed, also where others are removed between two pages.
        """
        ...

    def read(self, names: Sequence[bytes], targets: Sequence[memoryview], deadline_s: float) -> list[bool]:
        """Read each block into its target, `block_bytes` writable bytes, and verify its checksum there.

        The answer tells of each whether it came whole; a block that did not is dropped, and counted. `deadline_s`:
        seconds from now.

        Raises:
            StoreError: the store as a whole does not answer; what the targets hold is undefined.
        """
        ...

    def write(self, blocks: Sequence[StoredBlock], sources: Sequence[memoryview], deadline_s: float) -> list[bytes]:
        """Keep these blocks, of one chain, head first; return the names of those that were dropped to make room.

        When it returns, they survive the end of the process; see the store for what survives the loss of power.

        Raises:
            StoreError: it could not; none of these blocks is found afterwards.
        """
        ...

    def remove(self, names: Sequence[bytes]) -> None:
        """Forget blocks; unknown names are ignored. Their room comes back by and by."""
        ...

    def collect(self, deadline_s: float) -> Collected:
        """Give up some files of which much was removed, now and not by and by; no block that can be read goes.

        Raises:
            StoreError: the store failed, or did not answer in time.
        """
        ...

    def sync(self, deadline_s: float) -> None:
        """Return when all that was written and removed before is so for good.

        Raises:
            StoreError: the store failed, or did not answer in time.
        """
        ...

    @property
    def accounts(self) -> Accounts:
        """Blocks by tenant, and their quotas; to be read only."""
        ...

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges by metric name."""
        ...

    def close(self) -> None:
        """End what it does in the background, and let another process open it."""
        ...
