"""The host arena: blocks in shared memory, each with a record that outlives the process that wrote it.

    region, which peers map (kvcache.region)   [generations][block 0][block 1] ...
    tail, the node cache's own                 [header: magic, versions, sizes, fingerprint, epoch][record 0] ...

A record counts only while it bears its block's generation: that is written last when a block is committed, and the
generation changes before anything else when the block is reused. Whoever adopts the arena of a process that was killed
at any moment finds whole records, or none.

The memory's descriptor is kept by whoever starts the process, and inherited: the file outlives the process. (The other
choice, a named file with a lock, would need a place that is large enough: a container's /dev/shm has 64 MiB.)
"""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache.region import RegionLayout
from messages.errors import ConfigError
from transport.memory import PAGE_BYTES, Memory

logger = logging.getLogger(__name__)

BlockIds: TypeAlias = npt.NDArray[np.int32]

_MAGIC: Final = b"kvarena\0"
_VERSION: Final = 1
_FINGERPRINT_BYTES: Final = 64
#: magic, arena version, layout version, block_bytes, num_blocks, fingerprint, epoch
_HEADER: Final = struct.Struct(f"<8sIIQQ{_FINGERPRINT_BYTES}sQ")
_EPOCH: Final = struct.Struct("<Q")
_ALL: Final = slice(None)

#: Of one block, 72 bytes. Times are the node's CLOCK_MONOTONIC, which every process of one boot shares.
RECORD: Final = np.dtype(
    [
        ("name", "<u8", (2,)),
        ("generation", "<u8"),  #: of the block when the record was written
        ("checksum", "<u8"),
        ("tenant", "<u8"),  #: whose it is: 0 where nobody said
        ("pinned_until_s", "<f8"),  #: not evicted before
        ("used_s", "<f8"),
        ("num_tokens", "<u4"),
        ("index", "<u4"),  #: position in its prefix, in blocks
        ("num_sights", "<u4"),  #: how often it was wanted, the first time included
        ("state", "u1"),
        ("priority", "i1"),
        ("unused", "<u2"),
    ]
)


class RecordState(IntEnum):
    """What a record says of its block."""

    FREE = 0
    WRITING = 1  #: somebody may write into it
    COMMITTED = 2  #: true only with the block's generation


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaLayout:
    """What must be equal for an arena's blocks to be of use to a process."""

    fingerprint: bytes  #: of the model: at most 64 bytes
    version: int  #: of the bytes in a block, and of their checksum
    block_bytes: int
    num_blocks: int

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_bytes < 1:
            raise ConfigError(
                f"host memory for {self.num_blocks} blocks of {self.block_bytes} bytes: at least one block is wanted"
            )
        if len(self.fingerprint) > _FINGERPRINT_BYTES:
            raise ConfigError(f"a fingerprint of {len(self.fingerprint)} bytes, at most {_FINGERPRINT_BYTES} wanted")

    @property
    def region(self) -> RegionLayout:
        """How the blocks lie in what peers map."""
        return RegionLayout(self.num_blocks, self.block_bytes)

    @property
    def tail_bytes(self) -> int:
        """Bytes behind the region: header and records."""
        return PAGE_BYTES + self.num_blocks * RECORD.itemsize

    def allocate(self) -> Memory:
        """Reserve the memory of such an arena, zeroed; about 0.3 s per GiB.

        Raises:
            ConfigError: there is not that much memory.
        """
        return Memory.allocate(self.region.num_bytes, tail_bytes=self.tail_bytes)

    def adopt(self, fd: int) -> Memory:
        """Take over memory that `allocate` of an equal layout made, by its descriptor.

        Raises:
            ConfigError: it is other memory.
        """
        return Memory.adopt(fd, self.region.num_bytes, tail_bytes=self.tail_bytes)


class Arena:
    """Blocks and records in `memory`. One thread, but for `block`, which any may call.

    `epoch` counts the processes that owned it, this one included.
    """

    def __init__(self, memory: Memory, layout: ArenaLayout) -> None:
        """Adopt what `memory` (of `ArenaLayout.allocate`) holds, if it is of this layout; else it is made empty."""
        self.memory = memory
        self.layout = layout
        self._region = layout.region
        count = layout.num_blocks
        #: `[num_blocks]` uint64: changes before a block's bytes may, and only then
        self.generations: npt.NDArray[np.uint64] = np.frombuffer(memory.view, np.uint64, count)
        #: `[num_blocks]` RECORD
        self.records: npt.NDArray[Any] = np.frombuffer(memory.tail, RECORD, count, PAGE_BYTES)
        header = (_MAGIC, _VERSION, layout.version, layout.block_bytes, count, _padded(layout.fingerprint))
        seen = _HEADER.unpack_from(memory.tail)
        self.epoch: int = seen[-1] + 1 if seen[:-1] == header else 1
        if seen[:-1] != header:
            if seen[0] != bytes(len(_MAGIC)):
                logger.warning("the arena has another layout, its blocks are dropped: %s", _difference(seen, header))
            memory.tail[: _HEADER.size] = bytes(_HEADER.size)
            self.records[:] = np.zeros((), RECORD)
            self.generations[:] = secrets.randbits(62)  # random: a reader of what was there before sees the difference
            _HEADER.pack_into(memory.tail, 0, *header, 0)
        _EPOCH.pack_into(memory.tail, _HEADER.size - _EPOCH.size, self.epoch)  # the rest stays whole all the time

    def committed(self, block_ids: BlockIds | slice = _ALL) -> npt.NDArray[np.bool_]:
        """Tell of each of these blocks, or of all, whether its record counts: `[num_blocks]`."""
        is_committed: npt.NDArray[np.bool_] = self.records["state"][block_ids] == RecordState.COMMITTED
        is_committed &= self.records["generation"][block_ids] == self.generations[block_ids]
        return is_committed

    def renew(self, block_ids: BlockIds) -> None:
        """Declare what these blocks hold void, before anybody writes into them."""
        self.generations[block_ids] += np.uint64(1)
        self.records["state"][block_ids] = RecordState.WRITING

    def commit(self, block_ids: BlockIds) -> None:
        """Make the records of written blocks count; all their other fields are in place."""
        self.records["state"][block_ids] = RecordState.COMMITTED
        self.records["generation"][block_ids] = self.generations[block_ids]

    def free(self, block_ids: BlockIds) -> None:
        """Note that nobody writes into these blocks any more."""
        self.records["state"][block_ids] = RecordState.FREE

    def block(self, block_id: int) -> memoryview:
        """Return a block's bytes, `[block_bytes]` uint8, writable."""
        return self.memory.slice(self._region.block_offset(block_id), self._region.block_bytes)


def as_ids(block_ids: Sequence[int] | BlockIds) -> BlockIds:
    """Return block ids as an array, `[num_blocks]` int32."""
    return np.asarray(block_ids, np.int32)


def _padded(fingerprint: bytes) -> bytes:
    return fingerprint.ljust(_FINGERPRINT_BYTES, b"\0")


def _difference(seen: tuple[Any, ...], wanted: tuple[Any, ...]) -> str:
    words = ("magic", "arena version", "layout version", "block_bytes", "num_blocks", "fingerprint")
    return ", ".join(
        f"{word} {_shown(a)} seen, {_shown(b)} wanted"
        for word, a, b in zip(words, seen, wanted, strict=False)
        if a != b
    )


def _shown(value: object) -> str:
    return value.rstrip(b"\0").hex() if isinstance(value, bytes) else str(value)
