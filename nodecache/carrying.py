"""Blocks carried out of a tier, into one, and from one to another, because somebody who manages it wants it. Pure.

    FetchBlocks --> ReadOut --------------------------------> BlocksFetched
    MoveBlocks ---> ReadOut --> FillBlocks (up to the arena) --> StoreBlocks --> dropped where they lay --> PieceDone
                          '--------------------------------------^
    PutBlocks ----------------> FillBlocks --> StoreBlocks (to the nearest store) --> PieceDone

What a tier does not take in goes to the next one below it that may have it, of a move the ones above its source; the
answer counts what lies where, and what lies nowhere, by why.

What was read out is a copy in plain memory that has its checksum, so that nothing needs to be pinned meanwhile. Blocks
of the arena that are filled are in nobody else's books; a process that dies leaves them to be quarantined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from kvcache.names import split_names, whole_names
from messages.cache import PIECE_BYTES, BlocksFetched, FetchBlocks, MoveBlocks, PieceDone, PutBlocks
from messages.errors import RequestError
from messages.tier import Tier
from nodecache.arena import BlockIds, as_ids
from nodecache.cache import NodeCache
from nodecache.pool import Written, as_names
from nodecache.store import StoredBlock, StoreError
from nodecache.tiers import TierStore
from nodecache.worth import MAX_PRIORITY

_SIGHTS: Final = 2  #: somebody kept it, and somebody wants it
_UINT32: Final = 2**32 - 1
_UINT64: Final = 2**64 - 1

#: Why a tier did not take blocks in: what is there is worth more or used; their tenant's quota; its store failed.
Refusal: TypeAlias = Literal["no room", "quota", "failure"]


@dataclass(frozen=True, slots=True, eq=False)
class ReadOut:
    """Copy blocks of a tier to plain memory, and verify them there, in any thread; OutRead answers."""

    asker: bytes
    question: FetchBlocks | MoveBlocks
    answer: PieceDone  #: to a MoveBlocks, as far as it is known
    settled: tuple[bytes, ...]  #: names that the target of a MoveBlocks has already
    tier: Tier
    blocks: tuple[StoredBlock, ...]
    block_ids: tuple[int, ...]  #: of each, where the tier is the arena
    deadline_s: float


@dataclass(frozen=True, slots=True, eq=False)
class FillBlocks:
    """Copy blocks into those of the arena, and verify what was copied, in any thread; BlocksFilled answers.

    Blocks beyond `block_ids` found no room: they are only verified.
    """

    asker: bytes
    question: MoveBlocks | PutBlocks
    answer: PieceDone
    settled: tuple[bytes, ...]
    blocks: tuple[StoredBlock, ...]
    indexes: tuple[int, ...]  #: their positions in their prefix
    sources: tuple[memoryview, ...]
    block_ids: BlockIds
    refusal: Refusal  #: of those beyond `block_ids`


@dataclass(frozen=True, slots=True, eq=False)
class StoreBlocks:
    """Write blocks to a store, in any thread; BlocksStored answers."""

    asker: bytes
    question: MoveBlocks | PutBlocks
    answer: PieceDone
    settled: tuple[bytes, ...]
    arrived: tuple[bytes, ...]  #: names of blocks of a MoveBlocks that lie nearer than their source now
    tier: Tier
    blocks: tuple[StoredBlock, ...]
    sources: tuple[memoryview, ...]
    num_above: int  #: of them, the first, that lie in the arena too: those of a PutBlocks
    deadline_s: float


CarryingInstruction: TypeAlias = ReadOut | FillBlocks | StoreBlocks
CarryingAnswer: TypeAlias = PieceDone | BlocksFetched


@dataclass(frozen=True, slots=True, eq=False)
class OutRead:
    """A ReadOut was carried out: which blocks came whole, or that the store failed; where they lie now."""

    read: ReadOut
    arrived: Sequence[bool] | StoreError
    targets: Sequence[memoryview]


@dataclass(frozen=True, slots=True, eq=False)
class BlocksFilled:
    """A FillBlocks was carried out: which blocks have their checksums, also of those that are only verified."""

    filled: FillBlocks
    are_whole: Sequence[bool]


@dataclass(frozen=True, slots=True, eq=False)
class BlocksStored:
    """A StoreBlocks was carried out: the names that the store dropped for it, or that it failed."""

    stored: StoreBlocks
    dropped: Sequence[bytes] | StoreError


CarryingEvent: TypeAlias = OutRead | BlocksFilled | BlocksStored


class Carrying:
    """What is carried into and out of one node cache. Keeps nothing but what the cache does."""

    def __init__(self, cache: NodeCache, kernel_path: str) -> None:
        """`kernel_path`: what computed the blocks that are here."""
        self._cache = cache
        self._pool = cache.pool
        self._layout = cache.pool.arena.layout
        self._kernel_path = kernel_path
        self._max_blocks = max(1, PIECE_BYTES // self._layout.block_bytes)
        self._stores: Mapping[Tier, TierStore] = {entry.tier: entry for entry in cache.tiers.all}

    # ------------------------------------------------------------------------------------------- what somebody wants

    def fetch(self, asker: bytes, question: FetchBlocks) -> CarryingInstruction | CarryingAnswer:
        """Read blocks out for whoever asks."""
        names = list(dict.fromkeys(split_names(question.names)))[: self._max_blocks]
        blocks, block_ids = self._held(question.tier, names)
        if not blocks:
            return self._fetched(question)
        answer = PieceDone(query_id=question.query_id)
        deadline_s = self._cache.limits.read_deadline_s
        return ReadOut(asker, question, answer, (), question.tier, blocks, block_ids, deadline_s)

    def put(self, asker: bytes, question: PutBlocks, now_s: float) -> CarryingInstruction | CarryingAnswer:
        """Take blocks in that are not here yet: into the arena where there is room that is worth no more, or below."""
        try:
            names = self._checked(question)
        except RequestError as error:
            return PieceDone(query_id=question.query_id, error=error.info())
        sums = np.frombuffer(question.checksums, "<u8").tolist()
        here = {block.name for block in self._held(_wanted(question), names)[0]}
        lacking = [i for i, name in enumerate(names) if name not in here]
        data, size = question.data, self._layout.block_bytes
        answer = PieceDone(
            query_id=question.query_id,
            num_done=len(names) - len(lacking),
            num_tokens=(len(names) - len(lacking)) * question.block_size,
            num_held=self._pool.num_held,
        )
        blocks = [StoredBlock(names[i], question.block_size, sums[i], question.tenant & _UINT64) for i in lacking]
        indexes = [question.first_index + i for i in lacking]
        sources = [data[i * size : (i + 1) * size] for i in lacking]
        if not blocks:
            return answer
        return self._fill(asker, question, answer, (), blocks, indexes, sources, now_s)

    def move(self, asker: bytes, question: MoveBlocks) -> CarryingInstruction | CarryingAnswer:
        """Bring the next blocks from their tier to another."""
        if question.target != "host" and question.target not in self._stores:
            error = RequestError(f"there is no {question.target} tier here")
            return PieceDone(query_id=question.query_id, error=error.info())
        begin = max(0, question.cursor)
        every = whole_names(question.names)
        names = every[begin : begin + self._max_blocks]
        end = begin + len(names)
        answer = PieceDone(query_id=question.query_id, next_cursor=end if end < len(every) else None)
        blocks, block_ids = self._held(question.tier, names)
        if not blocks or question.tier == question.target:
            return answer
        at_target = {block.name for block in self._held(question.target, names)[0]}
        settled = tuple(block.name for block in blocks if block.name in at_target)
        is_lacking = [block.name not in at_target for block in blocks]
        if not any(is_lacking):
            return self._end_move(question, answer, settled, ())
        return ReadOut(
            asker,
            question,
            answer,
            settled,
            question.tier,
            tuple(block for block, lacks in zip(blocks, is_lacking, strict=True) if lacks),
            tuple(block_id for block_id, lacks in zip(block_ids, is_lacking, strict=False) if lacks),
            self._cache.limits.read_deadline_s,
        )

    # ----------------------------------------------------------------------------------------------- what became of it

    def on_event(self, event: CarryingEvent, now_s: float) -> CarryingInstruction | CarryingAnswer:
        """Take in what was done; return what is to be done next, or the answer."""
        match event:
            case OutRead(read, arrived, targets):
                return self._go_on(read, arrived, targets, now_s)
            case BlocksFilled(filled, are_whole):
                return self._end_fill(filled, np.asarray(are_whole, bool), now_s)
            case BlocksStored(stored, dropped):
                return self._end_store(stored, dropped, now_s)

    def _go_on(
        self, read: ReadOut, arrived: Sequence[bool] | StoreError, targets: Sequence[memoryview], now_s: float
    ) -> CarryingInstruction | CarryingAnswer:
        question = read.question
        if isinstance(arrived, StoreError):
            if isinstance(question, FetchBlocks):
                return BlocksFetched(query_id=question.query_id, error=arrived.info())
            return msgspec.structs.replace(read.answer, error=arrived.info())
        if read.tier != "host":
            self.forget_lost(read.tier, read.blocks, arrived)
        came = [
            (block, target) for block, target, is_there in zip(read.blocks, targets, arrived, strict=True) if is_there
        ]
        blocks, sources = [block for block, _ in came], [target for _, target in came]
        if isinstance(question, FetchBlocks):
            return self._fetched(question, blocks, sources)
        if not blocks:
            return self._end_move(question, read.answer, read.settled, ())
        if question.target == "host":
            position = {name: index for index, name in enumerate(whole_names(question.names))}
            indexes = [min(question.first_index + position[block.name], _UINT32) for block in blocks]
            return self._fill(read.asker, question, read.answer, read.settled, blocks, indexes, sources, now_s)
        return StoreBlocks(
            *(read.asker, question, read.answer, read.settled, (), question.target),
            *(tuple(blocks), tuple(sources), 0, self._cache.limits.write_deadline_s),
        )

    def _fill(
        self,
        asker: bytes,
        question: MoveBlocks | PutBlocks,
        answer: PieceDone,
        settled: tuple[bytes, ...],
        blocks: Sequence[StoredBlock],
        indexes: Sequence[int],
        sources: Sequence[memoryview],
        now_s: float,
    ) -> FillBlocks:
        """Take room in the arena, heads first: whoever manages it values it more than who would be granted it."""
        tenant = blocks[0].tenant  # of one chain
        block_ids = as_ids([])
        if isinstance(question, MoveBlocks) or "host" in question.tiers:
            positions, ones = np.array(indexes, np.int64), np.ones(len(indexes), np.int64)
            levels = self._pool.worth.levels(positions, _SIGHTS * ones, MAX_PRIORITY * ones)
            block_ids = self._pool.take(levels.tolist(), now_s, tenant)
        self._cache.num_filling += len(block_ids)
        refusal: Refusal = "quota" if self._pool.accounts.room(tenant) == 0 else "no room"
        return FillBlocks(
            *(asker, question, answer, settled),
            blocks=tuple(blocks),
            indexes=tuple(indexes),
            sources=tuple(sources),
            block_ids=block_ids,
            refusal=refusal,
        )

    def _end_fill(
        self, filled: FillBlocks, are_whole: npt.NDArray[np.bool_], now_s: float
    ) -> CarryingInstruction | CarryingAnswer:
        """Name what was filled, if all of it is whole; have the rest of it written below."""
        pool, question, block_ids = self._pool, filled.question, filled.block_ids
        self._cache.num_filling -= len(block_ids)
        if not are_whole.all():
            pool.give_back(block_ids)
            position = filled.indexes[int(np.argmin(are_whole))]
            error = RequestError(f"block {position}: its bytes do not have its checksum; nothing of this piece is kept")
            return msgspec.structs.replace(filled.answer, error=error.info())
        count = len(block_ids)
        above = filled.blocks[:count]
        written = Written(
            block_ids,
            as_names(b"".join(block.name for block in above)),
            np.array([block.checksum for block in above], np.uint64),
            np.array([block.num_tokens for block in above], np.uint32),
            np.array(filled.indexes[:count], np.uint32),
        )
        is_new = pool.commit(written, np.full(count, _SIGHTS, np.uint32), now_s)
        pool.give_back(block_ids[~is_new])  # a worker wrote the same block meanwhile: that one will do
        pool.unpin(block_ids[is_new])
        if isinstance(question, MoveBlocks):
            arrived = tuple(block.name for block in above)
            rest = StoreBlocks(
                *(filled.asker, question, filled.answer, filled.settled, arrived, "host"),
                *(filled.blocks[count:], filled.sources[count:], 0, 0.0),
            )
        else:
            self._cache.writing_down.offer(block_ids[is_new])
            answer = _with_more(filled.answer, count, sum(block.num_tokens for block in above))
            # All of them at once, so that more can be put in than the arena holds.
            rest = StoreBlocks(
                *(filled.asker, question, answer, (), (), "host"), *(filled.blocks, filled.sources, count, 0.0)
            )
        return self._go_below(rest, filled.refusal, now_s)

    def _go_below(self, left: StoreBlocks, refusal: Refusal, now_s: float) -> StoreBlocks | CarryingAnswer:
        """Have what a tier did not take in written to the next one that may have it; `refusal`: why it did not."""
        question = left.question
        for entry in self._allowed_below(question, left.tier) if left.blocks else ():
            if entry.is_usable(now_s):
                deadline_s = self._cache.limits.write_deadline_s
                return dataclasses.replace(left, tier=entry.tier, deadline_s=deadline_s)
            refusal = "failure"
        answer = _with_refused(left.answer, len(left.blocks) - left.num_above, refusal)
        if isinstance(question, MoveBlocks):
            return self._end_move(question, answer, left.settled, left.arrived)
        return answer

    def _allowed_below(self, question: MoveBlocks | PutBlocks, tier: Tier) -> list[TierStore]:
        """Return the stores below a tier that may have blocks which that one did not take in, the nearest first."""
        tiers: list[Tier] = ["host", *self._stores]
        below = tiers[tiers.index(tier) + 1 :]
        if isinstance(question, PutBlocks):
            return [self._stores[one] for one in below if one in question.tiers]
        is_above_source = tiers.index(question.tier)  # what does not come so far stays where it is
        return [self._stores[one] for one in below if tiers.index(one) < is_above_source]

    def _end_store(
        self, stored: StoreBlocks, dropped: Sequence[bytes] | StoreError, now_s: float
    ) -> StoreBlocks | CarryingAnswer:
        """Count what a store took in, and go on with what it did not."""
        question, entry = stored.question, self._stores[stored.tier]
        refusal: Refusal = "failure"
        kept: set[bytes] = set()
        answer = stored.answer
        if isinstance(dropped, StoreError):
            entry.on_failed(now_s)  # or each further piece of an import would wait for it as long
            answer = msgspec.structs.replace(answer, error=dropped.info())
        else:
            entry.on_worked()
            names = [block.name for block in stored.blocks]
            kept = {name for name in names if entry.store.find(name) is not None}
            tenants = {block.tenant for block in stored.blocks}
            entry.on_written(tenants, dropped)
            entry.on_changed([name for name in names if name in kept], dropped)
            is_at_quota = any(entry.store.accounts.room(tenant) == 0 for tenant in tenants)
            refusal = "quota" if is_at_quota else "no room"
        nowhere_else = list(zip(stored.blocks, stored.sources, strict=True))[stored.num_above :]
        came = [block for block, _ in nowhere_else if block.name in kept]
        left = [(block, source) for block, source in nowhere_else if block.name not in kept]
        if stored.tier != _wanted(question) and came:
            answer = msgspec.structs.replace(answer, num_below=answer.num_below | {stored.tier: len(came)})
        if isinstance(question, PutBlocks):
            answer = _with_more(answer, len(came), sum(block.num_tokens for block in came))
        rest = dataclasses.replace(
            stored,
            answer=answer,
            arrived=(*stored.arrived, *(block.name for block in came)),
            blocks=tuple(block for block, _ in left),
            sources=tuple(source for _, source in left),
            num_above=0,
        )
        return self._go_below(rest, refusal, now_s)

    def _end_move(
        self, question: MoveBlocks, answer: PieceDone, settled: tuple[bytes, ...], arrived: tuple[bytes, ...]
    ) -> CarryingAnswer:
        """Drop blocks where they lay, unless they are to stay: what `arrived` elsewhere, or was there before."""
        if question.keeps_source:
            blocks, _ = self._held(question.tier, arrived)
            return _with_more(answer, len(arrived), sum(block.num_tokens for block in blocks))
        blocks, block_ids = self._held(question.tier, (*settled, *arrived))
        if question.tier == "host":
            gone = set(self._pool.drop(as_ids(block_ids)).tolist())
            dropped = [block for block, block_id in zip(blocks, block_ids, strict=True) if block_id in gone]
        else:
            entry, dropped = self._stores[question.tier], list(blocks)
            entry.store.remove([block.name for block in dropped])
            entry.on_changed([], [block.name for block in dropped])
        answer = msgspec.structs.replace(answer, num_in_use=len(blocks) - len(dropped))
        return _with_more(answer, len(dropped), sum(block.num_tokens for block in dropped))

    # ------------------------------------------------------------------------------------------------- what is here

    def forget_lost(self, tier: Tier, blocks: Sequence[StoredBlock], arrived: Sequence[bool]) -> list[bytes]:
        """Note which of the blocks that a store was to read are gone from it: they did not come whole. Their names."""
        entry = self._stores[tier]
        lost = [block.name for block, has_come in zip(blocks, arrived, strict=True) if not has_come]
        gone = [name for name in lost if entry.store.find(name) is None]
        entry.on_changed([], gone)
        return gone

    def _held(self, tier: Tier, names: Sequence[bytes]) -> tuple[tuple[StoredBlock, ...], tuple[int, ...]]:
        """Return those of the blocks that a tier holds, in order, and their ids where that is the arena."""
        if tier == "host":
            found = self._pool.find(b"".join(names))
            block_ids = found[found >= 0]
            return self._pool.stored_blocks(block_ids), tuple(block_ids.tolist())
        entry = self._stores.get(tier)
        if entry is None:
            return (), ()
        return tuple(block for block in map(entry.store.find, names) if block is not None), ()

    def _fetched(
        self, question: FetchBlocks, blocks: Sequence[StoredBlock] = (), sources: Sequence[memoryview] = ()
    ) -> BlocksFetched:
        return BlocksFetched(
            query_id=question.query_id,
            layout_version=self._layout.version,
            kernel_path=self._kernel_path,
            names=b"".join(block.name for block in blocks),
            checksums=np.array([block.checksum for block in blocks], "<u8").tobytes(),
            data=memoryview(b"".join(sources)),
        )

    def _checked(self, question: PutBlocks) -> list[bytes]:
        """Return the names of blocks that come from outside, which are blocks of this model.

        Raises:
            RequestError: they are not.
        """
        layout = self._layout
        pairs: list[tuple[str, object, object]] = [
            ("fingerprint", question.fingerprint.hex(), layout.fingerprint.hex()),
            ("layout version", question.layout_version, layout.version),
            ("kernel path", question.kernel_path, self._kernel_path),
        ]
        for what, seen, wanted in pairs:
            if seen != wanted:
                raise RequestError(f"{what} of the blocks: got {seen}, want {wanted}")
        names = split_names(question.names)
        wanted_bytes = (len(names) * 16, len(names) * 8, len(names) * layout.block_bytes)
        seen_bytes = (len(question.names), len(question.checksums), len(question.data))
        if seen_bytes != wanted_bytes or not 0 < len(names) <= self._max_blocks:
            raise RequestError(
                f"blocks: got {seen_bytes} bytes of names, checksums and blocks, want 16, 8 and {layout.block_bytes} "
                f"for each of 1 to {self._max_blocks} blocks"
            )
        last_index = question.first_index + len(names) - 1
        if not (question.first_index >= 0 and last_index <= _UINT32 and 0 < question.block_size <= _UINT32):
            raise RequestError(f"blocks: got {question.first_index} as the first, of {question.block_size} tokens")
        if not any(tier == "host" or tier in self._stores for tier in question.tiers):
            there = ", ".join(["host", *self._stores])
            raise RequestError(f"tiers: got {', '.join(question.tiers)}, want one of those that are here: {there}")
        if last_index >= self._pool.num_blocks and not self._allowed_below(question, "host"):
            raise RequestError(
                f"a prefix of more than {last_index} blocks: host memory has room for {self._pool.num_blocks} here, "
                "and there is no store below that may take them in"
            )
        return names


def _wanted(question: MoveBlocks | PutBlocks) -> Tier:
    """Return the tier where blocks are wanted first of all."""
    return question.target if isinstance(question, MoveBlocks) else question.tiers[0]


def _with_refused(answer: PieceDone, num_blocks: int, refusal: Refusal) -> PieceDone:
    match refusal:
        case "no room":
            return msgspec.structs.replace(answer, num_without_room=num_blocks)
        case "quota":
            return msgspec.structs.replace(answer, num_above_quota=num_blocks)
        case "failure":
            return msgspec.structs.replace(answer, num_failed=num_blocks)


def _with_more(answer: PieceDone, num_blocks: int, num_tokens: int) -> PieceDone:
    return msgspec.structs.replace(
        answer, num_done=answer.num_done + num_blocks, num_tokens=answer.num_tokens + num_tokens
    )
