"""Checksums of the blocks of one pool: `transport.checksum`, computed where the blocks lie."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.memory.copies import DeviceCopies, PendingChecksums
from engine.memory.kv_pool import KvPool
from kvcache.pool import BlockPool
from transport.checksum import checksum, copy_all_checked
from transport.protocol import Copy

#: The generation of no block: they begin below 2^62.
_NEVER = (1 << 64) - 1
#: Steps whose checksums nobody asked for yet; those of older ones have been there for long.
_MAX_PENDING = 64
#: Copied in less than 1 ms, by a core and by a device.
_HOST_BATCH_BYTES = 4 << 20
_DEVICE_BATCH_BYTES = 16 << 20


class BlockChecksums:
    """Checksums of the blocks of one pool; those to be published are remembered until the block is reused."""

    def __init__(self, pool: BlockPool, kv_pool: KvPool, copies: DeviceCopies | None = None) -> None:
        """Compute them of the blocks of `kv_pool`; `copies` moves these where they lie on a device."""
        self._pool = pool
        self._copies = copies
        self._host_rows = None if copies else kv_pool.data.view(torch.uint8).numpy()  # [num_blocks, block_bytes]
        self._known = np.zeros(kv_pool.num_blocks, np.uint64)  # of each block, when it had that generation
        self._known_generations = np.full(kv_pool.num_blocks, _NEVER, np.uint64)
        #: blocks, their generations, and what a device computes of them, step by step
        self._pending: deque[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64], PendingChecksums]] = deque()
        self.batch_bytes = _DEVICE_BATCH_BYTES if copies else _HOST_BATCH_BYTES  #: for one call of `copy_out`

    # ---------------------------------------------------------------------------------------------- the steps' thread

    def launched(self, block_ids: Sequence[int]) -> None:
        """Note that a step was launched that writes these blocks for peers to read: here the bytes are in the cache.

        Waits for nothing; a CPU has computed the step by now.
        """
        if self._copies is None:
            if block_ids:
                self.published(block_ids)
            return
        self._copies.note_step()
        if block_ids:
            ids = np.asarray(block_ids, np.uint32)
            with contextlib.suppress(torch.OutOfMemoryError):  # then they are computed when somebody asks
                self._pending.append((ids, self._pool.generations(ids), self._copies.begin_checksums(block_ids)))
        while len(self._pending) > _MAX_PENDING:
            self._settle_one()

    def finished(self) -> None:
        """Note that the oldest step that was launched has ended."""
        if self._copies is not None:
            self._copies.end_step()

    # ----------------------------------------------------------------------------------------------------- any thread

    def published(self, block_ids: npt.ArrayLike) -> npt.NDArray[np.uint64]:
        """Return the checksums of written blocks, in order. Any thread; nobody may write these blocks meanwhile."""
        ids = np.asarray(block_ids, np.uint32)
        generations = self._pool.generations(ids)
        lacking = self._known_generations[ids] != generations
        # only for these: a step that still runs is not waited for because of others
        while self._is_pending(ids[lacking]) and self._settle_one():
            lacking = self._known_generations[ids] != generations
        if lacking.any():
            numbers = ids[lacking]
            self._note(numbers, generations[lacking], self.compute(numbers.tolist()))
        known: npt.NDArray[np.uint64] = self._known[ids]
        return known

    def known(self, block_id: int) -> int | None:
        """Return the checksum that a block was published with; None where it was not."""
        is_known = self._known_generations[block_id] == self._pool.generation(block_id)
        return int(self._known[block_id]) if is_known else None

    def are_steps_done(self) -> bool:
        """Tell whether blocks that no step has can be written: on a device steps may have ended and not be done."""
        return self._copies is None or self._copies.are_steps_done()

    def await_steps(self) -> None:
        """Block until they can be."""
        if self._copies is not None:
            self._copies.await_steps()

    def copy_out(self, block_ids: Sequence[int], target: memoryview, offsets: Sequence[int]) -> list[int]:
        """Copy blocks to these offsets of `target`; return the checksums of what was copied, in order. Any thread."""
        if self._copies is not None:
            return self._copies.copy_out(block_ids, target, offsets)
        assert self._host_rows is not None
        size = self._host_rows.shape[1]
        copies = [Copy(number * size, offset, size) for number, offset in zip(block_ids, offsets, strict=True)]
        return copy_all_checked(target, self._host_rows.reshape(-1), copies)

    def compute(self, block_ids: Sequence[int]) -> list[int]:
        """Compute the checksums of what these blocks hold now. Any thread."""
        if self._copies is not None:
            return self._copies.checksums(block_ids)
        assert self._host_rows is not None
        return [checksum(self._host_rows[block_id]) for block_id in block_ids]

    def _is_pending(self, wanted: npt.NDArray[np.uint32]) -> bool:
        """Tell whether a device computes the checksum of one of these blocks."""
        return any(np.isin(wanted, ids).any() for ids, _, _ in tuple(self._pending))

    def _settle_one(self) -> bool:
        """Wait for the oldest checksums that a device computes; False where there are none."""
        try:
            ids, generations, pending = self._pending.popleft()
        except IndexError:
            return False
        self._note(ids, generations, pending.values())
        return True

    def _note(self, ids: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint64], checksums: Sequence[int]) -> None:
        self._known[ids] = checksums
        self._known_generations[ids] = generations  # last: another thread may look
