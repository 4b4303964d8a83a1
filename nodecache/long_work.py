"""What managing a node cache takes time for, done: blocks are read, verified, copied, written. In any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, assert_never

from messages.cache import MoveBlocks
from messages.tier import Tier
from nodecache.arena import Arena
from nodecache.carrying import BlocksFilled, BlocksStored, FillBlocks, OutRead, ReadOut, StoreBlocks
from nodecache.management import (
    BlocksVerified,
    CollectStore,
    LongWork,
    StoreCollected,
    StoredVerified,
    StoreSynced,
    SyncStore,
    VerifyBlocks,
    VerifyStored,
    WorkDone,
)
from nodecache.store import BlockStore, StoredBlock, StoreError
from transport.checksum import checksum, copy_checked

T = TypeVar("T")


class LongWorker:
    """Carries out what `nodecache.management` wants done in one arena and the stores behind it."""

    def __init__(self, arena: Arena, stores: Mapping[Tier, BlockStore]) -> None:
        self._arena = arena
        self._stores = stores
        self._block_bytes = arena.layout.block_bytes

    def do(self, work: LongWork) -> WorkDone:
        """Do it; what became of it is the decider's to know."""
        match work:
            case VerifyBlocks():
                pairs = zip(work.block_ids.tolist(), work.checksums.tolist(), strict=True)
                are_whole = [checksum(self._arena.block(block_id)) == wanted for block_id, wanted in pairs]
                return BlocksVerified(work, are_whole)
            case VerifyStored():
                return StoredVerified(
                    work, self._read(work.tier, work.blocks, self._room(work.blocks), work.deadline_s)
                )
            case SyncStore():
                failed = _outcome(lambda: self._stores[work.tier].sync(work.deadline_s))
                return StoreSynced(work, failed if isinstance(failed, StoreError) else None)
            case CollectStore():
                return StoreCollected(work, _outcome(lambda: self._stores[work.question.tier].collect(work.deadline_s)))
            case ReadOut():
                targets = self._room(work.blocks)
                if work.tier != "host":
                    arrived = self._read(work.tier, work.blocks, targets, work.deadline_s)
                    if not isinstance(arrived, StoreError):  # others may have written a block anew, with other bytes
                        arrived = [
                            has_come and checksum(target) == block.checksum
                            for has_come, target, block in zip(arrived, targets, work.blocks, strict=True)
                        ]
                    return OutRead(work, arrived, targets)
                sources = map(self._arena.block, work.block_ids)
                return OutRead(work, _copied(targets, sources, work.blocks), targets)
            case FillBlocks():
                granted, count = map(self._arena.block, work.block_ids.tolist()), len(work.block_ids)
                copied = _copied(granted, work.sources[:count], work.blocks[:count])
                rest = zip(work.sources[count:], work.blocks[count:], strict=True)
                return BlocksFilled(work, [*copied, *(checksum(source) == block.checksum for source, block in rest)])
            case StoreBlocks():
                return BlocksStored(work, _outcome(lambda: self._store(work)))
            case _ as unreachable:
                assert_never(unreachable)

    def _store(self, work: StoreBlocks) -> list[bytes]:
        """Write blocks; those of which no other copy will stay are there for good."""
        store = self._stores[work.tier]
        dropped = store.write(work.blocks, work.sources, work.deadline_s)
        if isinstance(work.question, MoveBlocks) and not work.question.keeps_source:
            store.sync(work.deadline_s)
        return dropped

    def _room(self, blocks: Sequence[StoredBlock]) -> list[memoryview]:
        size = self._block_bytes
        room = memoryview(bytearray(size * len(blocks)))
        return [room[begin : begin + size] for begin in range(0, len(room), size)]

    def _read(
        self, tier: Tier, blocks: Sequence[StoredBlock], targets: Sequence[memoryview], deadline_s: float
    ) -> list[bool] | StoreError:
        return _outcome(lambda: self._stores[tier].read([block.name for block in blocks], targets, deadline_s))


def _copied(targets: Iterable[memoryview], sources: Iterable[memoryview], blocks: Sequence[StoredBlock]) -> list[bool]:
    """Copy blocks, and tell which copies have their checksums, whatever was written to the sources meanwhile."""
    return [
        copy_checked(target, source) == block.checksum
        for target, source, block in zip(targets, sources, blocks, strict=True)
    ]


def _outcome(call: Callable[[], T]) -> T | StoreError:
    try:
        return call()
    except StoreError as error:
        return error
