"""A store in plain memory: what a store must do, in the fewest lines, and what may go wrong with one, on demand."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice

from nodecache.quotas import Accounts
from nodecache.store import BlockStore, Collected, StoredBlock, StoreError, StorePage


class LoopbackStore(BlockStore):
    """Holds at most `max_blocks`; the least recently written goes first. `checksum`: of a block's bytes, 64 bits.

    `accounts`: of the tenants that are counted.

    `error`: raised by whatever does IO while it is set. While `answers` is cleared, such calls wait, and raise when
    their deadline is over.
    """

    def __init__(
        self, max_blocks: int, checksum: Callable[[memoryview], int], accounts: Accounts | None = None
    ) -> None:
        self._accounts = Accounts() if accounts is None else accounts
        self._max_blocks = max_blocks
        self._checksum = checksum
        self._blocks: OrderedDict[bytes, tuple[StoredBlock, bytes]] = OrderedDict()
        self._places: dict[bytes, int] = {}  # which of all that were written it is
        self._numbers = count()
        self._lock = threading.Lock()
        self.error: StoreError | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.num_reads = self.num_writes = self.num_syncs = 0

    @property
    def accounts(self) -> Accounts:
        """Return the blocks by tenant."""
        return self._accounts

    def find(self, name: bytes) -> StoredBlock | None:
        """Return what is kept of a block; None where it is not there."""
        with self._lock:
            entry = self._blocks.get(name)
        return None if entry is None else entry[0]

    def names(self) -> Iterable[bytes]:
        """Return the names of all blocks."""
        with self._lock:
            return list(self._blocks)

    def page(self, cursor: int, max_blocks: int) -> StorePage:
        """Return some blocks, in the order in which they came."""
        with self._lock:
            places = {name: self._places[name] for name in self._blocks}
            names = sorted((name for name in places if places[name] >= cursor), key=lambda name: places[name])
            shown = names[:max_blocks]
            return StorePage(
                [self._blocks[name][0] for name in shown],
                [places[name] for name in shown],
                len(self._blocks),
                places[names[max_blocks]] if len(names) > max_blocks else None,
            )

    def read(self, names: Sequence[bytes], targets: Sequence[memoryview], deadline_s: float) -> list[bool]:
        """Copy blocks out, and verify them; a damaged one is dropped."""
        self._meet_fault(deadline_s)
        self.num_reads += 1
        arrived: list[bool] = []
        for name, target in zip(names, targets, strict=True):
            with self._lock:
                entry = self._blocks.get(name)
            if entry is not None:
                target[:] = entry[1]
            is_whole = entry is not None and self._checksum(target) == entry[0].checksum
            if not is_whole:
                self.remove([name])
            arrived.append(is_whole)
        return arrived

    def write(self, blocks: Sequence[StoredBlock], sources: Sequence[memoryview], deadline_s: float) -> list[bytes]:
        """Copy blocks in; return the names of those that made room."""
        self._meet_fault(deadline_s)
        self.num_writes += 1
        with self._lock:
            dropped: list[bytes] = []
            for block, source in zip(blocks, sources, strict=True):
                if block.name in self._blocks:
                    self._forget(block.name)
                if self._accounts.num_over(block.tenant, 1):
                    own = [name for name, (other, _) in self._blocks.items() if other.tenant == block.tenant]
                    if not own or own[0] in {new.name for new in blocks}:
                        continue
                    dropped.append(own[0])
                    self._forget(own[0])
                self._blocks[block.name] = (block, bytes(source))
                self._places[block.name] = next(self._numbers)
                self._accounts.add(block.tenant, 1)
            num_over = max(0, len(self._blocks) - self._max_blocks)
            surplus = list(islice(self._blocks, num_over))
            for name in surplus:
                self._forget(name)
            return [*dropped, *surplus]

    def remove(self, names: Sequence[bytes]) -> None:
        """Forget blocks."""
        with self._lock:
            for name in names:
                if name in self._blocks:
                    self._forget(name)

    def collect(self, deadline_s: float) -> Collected:
        """Give nothing up: nothing takes room."""
        self._meet_fault(deadline_s)
        return Collected(0, 0, has_more=False)

    def sync(self, deadline_s: float) -> None:
        """Do nothing: nothing outlives the process."""
        self._meet_fault(deadline_s)
        self.num_syncs += 1

    def stats(self) -> dict[str, float]:
        """Return how many blocks there are."""
        return {"kvray_store_blocks": float(len(self._blocks))}

    def close(self) -> None:
        """Do nothing: there is nothing in the background."""

    def damage(self, name: bytes) -> None:
        """Flip a bit of a block."""
        with self._lock:
            block, data = self._blocks[name]
            self._blocks[name] = (block, bytes([data[0] ^ 1]) + data[1:])

    def _forget(self, name: bytes) -> None:
        block, _ = self._blocks.pop(name)
        self._accounts.add(block.tenant, -1)

    def _meet_fault(self, deadline_s: float) -> None:
        if not self.answers.wait(deadline_s):
            raise StoreError(f"loopback: no answer within {deadline_s:g} s")
        if self.error is not None:
            raise self.error
