"""What a node cache answers to who manages it: lists what it holds, drops, keeps, verifies, carries blocks. Pure.

    ListBlocks ---> BlocksListed       one tier, some thousand blocks at a time; nothing is kept between two questions
    ClearBlocks --> dropped -----------------------last piece, not a dry run--> SyncStore --> PieceDone
    KeepBlocks ---> the cache's own hint --> PieceDone
    CheckBlocks --> VerifyBlocks, VerifyStored --> what is damaged dropped --> PieceDone
    CollectGarbage --> CollectStore --> PieceDone
    FetchBlocks, PutBlocks, MoveBlocks --> nodecache.carrying

`nodecache.long_work` does what takes time: one thing at a time, whoever asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, assert_never

import msgspec
import numpy as np
import numpy.typing as npt

from kvcache.names import whole_names
from messages.cache import (
    BlocksFetched,
    BlocksListed,
    CacheAnswer,
    CacheQuestion,
    CheckBlocks,
    ClearBlocks,
    CollectGarbage,
    FetchBlocks,
    KeepBlocks,
    ListBlocks,
    MoveBlocks,
    PieceDone,
    PutBlocks,
)
from messages.errors import ErrorInfo
from messages.tier import Tier
from nodecache.arena import BlockIds
from nodecache.cache import CacheInstruction, Hinted, NodeCache
from nodecache.carrying import (
    BlocksFilled,
    BlocksStored,
    Carrying,
    CarryingAnswer,
    CarryingEvent,
    CarryingInstruction,
    OutRead,
)
from nodecache.store import Collected, StoredBlock, StoreError
from nodecache.tiers import TierStore

#: Looked at for one answer: what takes some ms of the event loop.
_LISTED_BLOCKS: Final = 4096
_TOUCHED_BLOCKS: Final = 512

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Answer:
    """Send `message` to the asker."""

    asker: bytes
    message: CacheAnswer


@dataclass(frozen=True, slots=True, eq=False)
class VerifyBlocks:
    """Compare blocks of the arena with their checksums, in any thread; BlocksVerified answers."""

    asker: bytes
    answer: PieceDone  #: as far as it is known
    block_ids: BlockIds
    generations: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class VerifyStored:
    """Read blocks of a store, which verifies them, in any thread; StoredVerified answers."""

    asker: bytes
    answer: PieceDone
    tier: Tier
    blocks: tuple[StoredBlock, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class SyncStore:
    """Wait until what was removed is gone for good, in any thread; StoreSynced answers."""

    asker: bytes
    answer: PieceDone
    tier: Tier
    deadline_s: float


@dataclass(frozen=True, slots=True)
class CollectStore:
    """Have a store give up what it can for once, in any thread; StoreCollected answers."""

    asker: bytes
    question: CollectGarbage
    deadline_s: float


LongWork: TypeAlias = VerifyBlocks | VerifyStored | SyncStore | CollectStore | CarryingInstruction
ManagementInstruction: TypeAlias = Answer | LongWork | CacheInstruction

# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody asked something."""

    asker: bytes
    question: CacheQuestion


@dataclass(frozen=True, slots=True)
class BlocksVerified:
    """A VerifyBlocks was carried out: which blocks have their checksums."""

    verified: VerifyBlocks
    are_whole: Sequence[bool]


@dataclass(frozen=True, slots=True)
class StoredVerified:
    """A VerifyStored was carried out: which blocks came whole, or that the store failed."""

    verified: VerifyStored
    arrived: Sequence[bool] | StoreError


@dataclass(frozen=True, slots=True)
class StoreSynced:
    """A SyncStore was carried out; `error`: it failed."""

    synced: SyncStore
    error: StoreError | None


@dataclass(frozen=True, slots=True)
class StoreCollected:
    """A CollectStore was carried out: what it came to, or that the store failed."""

    collected: CollectStore
    outcome: Collected | StoreError


WorkDone: TypeAlias = BlocksVerified | StoredVerified | StoreSynced | StoreCollected | CarryingEvent
ManagementEvent: TypeAlias = Asked | WorkDone

# ---------------------------------------------------------------------------------------------------------- the decider


class Management:
    """Answers questions about one node cache, and changes what it holds. `now_s` as for the cache."""

    def __init__(self, cache: NodeCache, kernel_path: str = "") -> None:
        """Manage `cache`, whose blocks were computed by `kernel_path`."""
        self._cache = cache
        self._carrying = Carrying(cache, kernel_path)
        self._pool = cache.pool
        self._batch_blocks = max(1, cache.limits.batch_bytes // cache.pool.arena.layout.block_bytes)
        self._stores: dict[Tier, TierStore] = {entry.tier: entry for entry in cache.tiers.all}
        self.num_cleared: dict[Tier, int] = {"host": 0, **dict.fromkeys(self._stores, 0)}  #: blocks, by tier
        self.num_checked = dict(self.num_cleared)
        self.num_damaged = dict(self.num_cleared)

    def on_event(self, event: ManagementEvent, now_s: float) -> Sequence[ManagementInstruction]:
        """Take in `event`; return what is to be done, in order."""
        match event:
            case Asked(asker, question):
                return self._take(asker, question, now_s)
            case BlocksVerified(verified, are_whole):
                return [Answer(verified.asker, self._drop_damaged(verified, np.asarray(are_whole, bool)))]
            case StoredVerified(verified, arrived):
                return [Answer(verified.asker, self._note_verified(verified, arrived))]
            case StoreSynced(synced, error):
                return [Answer(synced.asker, _with_error(synced.answer, error))]
            case StoreCollected(collected, outcome):
                return [Answer(collected.asker, _collected(collected.question, outcome))]
            case OutRead(read):
                return [self._carried(read.asker, self._carrying.on_event(event, now_s))]
            case BlocksFilled(filled):
                return [self._carried(filled.asker, self._carrying.on_event(event, now_s))]
            case BlocksStored(stored):
                return [self._carried(stored.asker, self._carrying.on_event(event, now_s))]
            case _ as unreachable:
                assert_never(unreachable)

    def stats(self) -> dict[str, float]:
        """Return the counters by metric name."""
        counts = {
            "kvray_cache_cleared_total": self.num_cleared,
            "kvray_cache_checked_total": self.num_checked,
            "kvray_cache_damaged_total": self.num_damaged,
        }
        return {
            f'{name}{{tier="{tier}"}}': float(number)
            for name, by_tier in counts.items()
            for tier, number in by_tier.items()
        }

    def _take(self, asker: bytes, question: CacheQuestion, now_s: float) -> Sequence[ManagementInstruction]:
        match question:
            case ListBlocks(tier="host"):
                return [Answer(asker, self._list_arena(question, now_s))]
            case ListBlocks():
                return [Answer(asker, self._list_stored(question))]
            case ClearBlocks(tier="host"):
                return [Answer(asker, self._clear_arena(question, now_s))]
            case ClearBlocks():
                return [self._clear_stored(asker, question)]
            case KeepBlocks():
                return self._keep(asker, question, now_s)
            case CheckBlocks(tier="host"):
                return [self._check_arena(asker, question)]
            case CheckBlocks():
                return [self._check_stored(asker, question)]
            case CollectGarbage():
                return [self._collect(asker, question)]
            case FetchBlocks():
                return [self._carried(asker, self._carrying.fetch(asker, question))]
            case PutBlocks():
                return [self._carried(asker, self._carrying.put(asker, question, now_s))]
            case MoveBlocks():
                return [self._carried(asker, self._carrying.move(asker, question))]
            case _ as unreachable:
                assert_never(unreachable)

    # -------------------------------------------------------------------------------------------------------- listing

    def _list_arena(self, question: ListBlocks, now_s: float) -> BlocksListed:
        block_ids, next_cursor = self._committed(question.cursor, _LISTED_BLOCKS)
        if question.tenant is not None:
            block_ids = block_ids[self._pool.records(block_ids)["tenant"] == question.tenant]
        rows = self._pool.records(block_ids)
        return BlocksListed(
            query_id=question.query_id,
            layout_version=self._pool.arena.layout.version,
            num_blocks=len(rows),
            names=rows["name"].tobytes(),
            places=block_ids.astype("<u8").tobytes(),
            num_tokens=rows["num_tokens"].tobytes(),
            checksums=rows["checksum"].tobytes(),
            tenants=rows["tenant"].tobytes(),
            num_pins=self._pool.num_pins(block_ids).tobytes(),
            kept_s=np.maximum(rows["pinned_until_s"] - now_s, 0.0).tobytes(),
            num_hits=(rows["num_sights"] - np.uint32(1)).tobytes(),
            age_s=np.maximum(now_s - rows["used_s"], 0.0).tobytes(),
            next_cursor=next_cursor,
        )

    def _list_stored(self, question: ListBlocks) -> BlocksListed:
        blocks, places, _, next_cursor = self._page(question.tier, question.cursor, _TOUCHED_BLOCKS)
        if question.tenant is not None:
            pairs = [
                (block, place) for block, place in zip(blocks, places, strict=True) if block.tenant == question.tenant
            ]
            blocks, places = [block for block, _ in pairs], [place for _, place in pairs]
        return BlocksListed(
            query_id=question.query_id,
            layout_version=self._pool.arena.layout.version,
            num_blocks=len(blocks),
            names=b"".join(block.name for block in blocks),
            places=np.array(places, "<u8").tobytes(),
            num_tokens=np.array([block.num_tokens for block in blocks], "<u4").tobytes(),
            checksums=np.array([block.checksum for block in blocks], "<u8").tobytes(),
            tenants=np.array([block.tenant for block in blocks], "<u8").tobytes(),
            next_cursor=next_cursor,
        )

    # ------------------------------------------------------------------------------------------------------- clearing

    def _clear_arena(self, question: ClearBlocks, now_s: float) -> PieceDone:
        pool = self._pool
        block_ids, next_cursor = self._chosen(question.names, question.cursor)
        if question.tenant is not None:
            block_ids = block_ids[pool.records(block_ids)["tenant"] == question.tenant]
        is_free = pool.num_pins(block_ids) == 0
        if question.spares_kept:
            is_free &= pool.records(block_ids)["pinned_until_s"] <= now_s
        free_ids = block_ids[is_free]
        num_tokens = int(pool.records(free_ids)["num_tokens"].sum())
        if not question.is_dry_run:
            pool.drop(free_ids)
            self.num_cleared["host"] += len(free_ids)
        return PieceDone(
            query_id=question.query_id,
            num_done=len(free_ids),
            num_tokens=num_tokens,
            num_in_use=len(block_ids) - len(free_ids),
            num_held=pool.num_held,
            next_cursor=next_cursor,
        )

    def _clear_stored(self, asker: bytes, question: ClearBlocks) -> ManagementInstruction:
        blocks, num_held, next_cursor = self._chosen_stored(question.tier, question.names, question.cursor)
        if question.tenant is not None:
            blocks = [block for block in blocks if block.tenant == question.tenant]
        answer = PieceDone(
            query_id=question.query_id,
            num_done=len(blocks),
            num_tokens=sum(block.num_tokens for block in blocks),
            num_held=num_held,
            next_cursor=next_cursor,
        )
        entry = self._stores.get(question.tier)
        if question.is_dry_run or entry is None:
            return Answer(asker, answer)
        names = [block.name for block in blocks]
        entry.store.remove(names)
        entry.on_changed([], names)
        self.num_cleared[question.tier] += len(names)
        if next_cursor is not None or not question.is_last:
            return Answer(asker, answer)
        return SyncStore(asker, answer, question.tier, self._cache.limits.write_deadline_s)

    def _collect(self, asker: bytes, question: CollectGarbage) -> ManagementInstruction:
        if question.tier not in self._stores:
            return Answer(asker, PieceDone(query_id=question.query_id))
        return CollectStore(asker, question, self._cache.limits.write_deadline_s)

    def _carried(self, asker: bytes, outcome: CarryingInstruction | CarryingAnswer) -> Answer | CarryingInstruction:
        return Answer(asker, outcome) if isinstance(outcome, PieceDone | BlocksFetched) else outcome

    # --------------------------------------------------------------------------------------------------------- keeping

    def _keep(self, asker: bytes, question: KeepBlocks, now_s: float) -> Sequence[ManagementInstruction]:
        pool, ttl_s = self._pool, max(0.0, question.ttl_s)
        until_s = now_s + ttl_s if ttl_s else 0.0
        names = b"".join(whole_names(question.names))
        instructions = self._cache.on_event(Hinted(names, question.priority, until_s), now_s)
        found = pool.find(names)
        rows = pool.records(found[found >= 0])
        rows = rows[rows["pinned_until_s"] == until_s]
        answer = PieceDone(
            query_id=question.query_id,
            num_done=len(rows),
            num_tokens=int(rows["num_tokens"].sum()),
            num_held=pool.num_held,
        )
        return [*instructions, Answer(asker, answer)]

    # -------------------------------------------------------------------------------------------------------- checking

    def _check_arena(self, asker: bytes, question: CheckBlocks) -> VerifyBlocks:
        pool = self._pool
        block_ids, next_cursor = self._chosen(question.names, question.cursor, self._batch_blocks)
        rows = pool.records(block_ids)
        answer = PieceDone(
            query_id=question.query_id,
            num_tokens=int(rows["num_tokens"].sum()),
            num_held=pool.num_held if question.names is None else len(block_ids),
            next_cursor=next_cursor,
        )
        return VerifyBlocks(asker, answer, block_ids, rows["generation"], rows["checksum"])

    def _drop_damaged(self, verified: VerifyBlocks, are_whole: npt.NDArray[np.bool_]) -> PieceDone:
        """Drop what is damaged; what was reused meanwhile was not verified, whatever was seen."""
        pool, block_ids = self._pool, verified.block_ids
        is_same = pool.arena.committed(block_ids) & (pool.arena.generations[block_ids] == verified.generations)
        damaged = block_ids[is_same & ~are_whole]
        dropped = pool.drop(damaged)
        self.num_checked["host"] += int(is_same.sum())
        self.num_damaged["host"] += len(damaged)
        return msgspec.structs.replace(
            verified.answer,
            num_done=int(is_same.sum()),
            num_damaged=len(damaged),
            num_in_use=len(damaged) - len(dropped),
        )

    def _check_stored(self, asker: bytes, question: CheckBlocks) -> ManagementInstruction:
        blocks, num_held, next_cursor = self._chosen_stored(
            question.tier, question.names, question.cursor, self._batch_blocks
        )
        answer = PieceDone(query_id=question.query_id, num_held=num_held, next_cursor=next_cursor)
        if not blocks:
            return Answer(asker, answer)
        return VerifyStored(asker, answer, question.tier, tuple(blocks), self._cache.limits.read_deadline_s)

    def _note_verified(self, verified: VerifyStored, arrived: Sequence[bool] | StoreError) -> PieceDone:
        if isinstance(arrived, StoreError):
            return _with_error(verified.answer, arrived)
        came = [block for block, has_come in zip(verified.blocks, arrived, strict=True) if has_come]
        num_lost = len(verified.blocks) - len(came)
        gone = self._carrying.forget_lost(verified.tier, verified.blocks, arrived)
        self.num_checked[verified.tier] += len(verified.blocks)
        self.num_damaged[verified.tier] += num_lost
        return msgspec.structs.replace(
            verified.answer,
            num_done=len(verified.blocks),
            num_tokens=sum(block.num_tokens for block in came),
            num_damaged=num_lost,
            num_in_use=num_lost - len(gone),
        )

    # --------------------------------------------------------------------------------------------- what is looked at

    def _committed(self, cursor: int, num_blocks: int) -> tuple[BlockIds, int | None]:
        """Return those of the next blocks of the arena that hold something, and where to go on."""
        begin = min(max(cursor, 0), self._pool.num_blocks)
        end = min(begin + num_blocks, self._pool.num_blocks)
        block_ids = np.flatnonzero(self._pool.arena.committed(slice(begin, end))) + begin
        return block_ids.astype(np.int32), end if end < self._pool.num_blocks else None

    def _chosen(
        self, names: bytes | None, cursor: int, num_blocks: int = _TOUCHED_BLOCKS
    ) -> tuple[BlockIds, int | None]:
        """Return the blocks of the arena that have these names; None: the next ones that hold something."""
        if names is None:
            return self._committed(cursor, num_blocks)
        found = self._pool.find(b"".join(whole_names(names)))
        return np.unique(found[found >= 0]), None

    def _page(
        self, tier: Tier, cursor: int, num_blocks: int
    ) -> tuple[Sequence[StoredBlock], Sequence[int], int, int | None]:
        entry = self._stores.get(tier)
        return entry.store.page(max(cursor, 0), num_blocks) if entry is not None else ((), (), 0, None)

    def _chosen_stored(
        self, tier: Tier, names: bytes | None, cursor: int, num_blocks: int = _TOUCHED_BLOCKS
    ) -> tuple[Sequence[StoredBlock], int, int | None]:
        """Return the store's blocks of these names, or the next ones; how many it holds; where to go on."""
        if names is None:
            blocks, _, num_held, next_cursor = self._page(tier, cursor, num_blocks)
            return blocks, num_held, next_cursor
        entry = self._stores.get(tier)
        if entry is None:
            return (), 0, None
        found = map(entry.store.find, dict.fromkeys(whole_names(names)))
        blocks = [block for block in found if block is not None]
        return blocks, len(blocks), None


def _with_error(answer: PieceDone, error: StoreError | None) -> PieceDone:
    info: ErrorInfo | None = None if error is None else error.info()
    return msgspec.structs.replace(answer, error=info)


def _collected(question: CollectGarbage, outcome: Collected | StoreError) -> PieceDone:
    if isinstance(outcome, StoreError):
        return PieceDone(query_id=question.query_id, error=outcome.info())
    return PieceDone(
        query_id=question.query_id,
        num_freed_files=outcome.num_files,
        num_freed_bytes=outcome.num_bytes,
        next_cursor=question.cursor + 1 if outcome.has_more else None,
    )
