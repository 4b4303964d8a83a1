"""What a node cache does with what it is told: grants room, offers blocks, moves them between its tiers.

Pure: `NodeCache.on_event(event, now_s)` returns what is to be done; `nodecache.process` does it.

    RoomRequest ----> room taken ----BlocksWritten----> committed ----by worth----> written to the stores
                          '--- lost, too late --> quarantined
    BlocksRequest --> what lies in the arena offered at once; the rest read, batch by batch, and offered as it comes
                          '--- ReleaseLease, asker lost, lease ended --> unpinned
    PrefetchBlocks -> told where they lie, and told again when they were read into the arena

Who asks is known by its channel, and each question by that and its id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from kvcache import leases
from kvcache.leases import AskerLost, FreeBlocks, LeaseBook, TimePassed
from kvcache.locations import (
    LOCATION,
    BlockLocation,
    Locations,
    name_column,
    pack_locations,
    unpack_locations,
)
from kvcache.names import whole_names
from messages.errors import InvariantError
from messages.handoff import (
    BlockHint,
    BlocksFound,
    BlocksRequest,
    BlocksWritten,
    KvHandoff,
    PrefetchBlocks,
    ReleaseLease,
    RenewLease,
    RoomGranted,
    RoomRequest,
)
from messages.tier import Tier
from nodecache.arena import BlockIds, as_ids
from nodecache.keeping import Keeping, priorities
from nodecache.pool import HostPool, Written, as_names
from nodecache.prefetching import Prefetching
from nodecache.reading import Outcome, ReadBlocks, Reading
from nodecache.store import BlockStore
from nodecache.tiers import Tiers
from nodecache.writing_down import WriteBlocks, WritingDown

Asked: TypeAlias = RoomRequest | BlocksWritten | BlocksRequest | PrefetchBlocks | RenewLease | ReleaseLease

_UINT32: Final = 2**32 - 1
_UINT64: Final = 2**64 - 1
_MAX_WRITING_SHARE: Final = 0.5  #: of the arena's blocks, given out to be written at a time

# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Said:
    """A worker said something."""

    asker: bytes
    message: Asked


@dataclass(frozen=True, slots=True)
class Hinted:
    """Who may do so wants blocks kept until then (inf: for good, 0: not), and valued by `priority`, -2 to 2."""

    names: bytes
    priority: int
    pinned_until_s: float


@dataclass(frozen=True, slots=True)
class BlocksRead:
    """A ReadBlocks was carried out: which blocks came whole; None: the store failed."""

    read_id: int
    arrived: tuple[bool, ...] | None


@dataclass(frozen=True, slots=True)
class BlocksKept:
    """A WriteBlocks was carried out: the names that the store dropped for it; None: the store failed."""

    write_id: int
    dropped: tuple[bytes, ...] | None


CacheEvent: TypeAlias = Said | Hinted | BlocksRead | BlocksKept | AskerLost | TimePassed

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to the asker."""

    asker: bytes
    message: RoomGranted | KvHandoff | BlocksFound


CacheInstruction: TypeAlias = Tell | ReadBlocks | WriteBlocks

# ---------------------------------------------------------------------------------------------------------- the decider


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLimits:
    """The times and amounts that a node cache keeps to."""

    lease_s: float  #: of what is offered, and of room to write
    quarantine_s: float = 10.0  #: late bytes of a writer that was lost may land for so long
    batch_bytes: int = 8 << 20  #: read or written at a time: some ms of a disk
    max_reads: int = 4  #: batches of one store at a time
    read_deadline_s: float = 10.0
    write_deadline_s: float = 30.0


@dataclass(slots=True)
class _Question:
    """Blocks that somebody asked for, from the question until they are released."""

    asker: bytes
    request_id: str
    asked_s: float
    pinned: list[BlockIds]
    waiting: set[bytes] = field(default_factory=set)  #: names that are being read for it, or will be


@dataclass(slots=True)
class _Grant:
    """Room that somebody writes into."""

    blocks: Locations  #: `[n]`, without checksums
    num_sights: npt.NDArray[np.uint32]  #: `[n]`
    held: bytes  #: names of the same prefix that were held already
    hints: tuple[BlockHint, ...]

    @property
    def block_ids(self) -> BlockIds:
        """All of its blocks."""
        return as_ids(self.blocks["block_id"])

    @property
    def names(self) -> list[bytes]:
        """What is to be written there."""
        names: list[bytes] = self.blocks["name"].tolist()
        return names


class NodeCache:
    """The decider of one node cache. `now_s` is CLOCK_MONOTONIC, and never goes back."""

    def __init__(self, pool: HostPool, stores: Mapping[Tier, BlockStore], limits: CacheLimits) -> None:
        """Decide for `pool` and the `stores` behind it, the nearest first."""
        self.pool = pool
        self.limits = limits
        self.tiers = Tiers(stores)
        self.leases = LeaseBook(limits.lease_s)
        self.keeping = Keeping(pool)
        batch_blocks = max(1, limits.batch_bytes // pool.arena.layout.block_bytes)
        self.reading = Reading(pool, self.tiers, batch_blocks, limits.max_reads, limits.read_deadline_s)
        self.prefetching = Prefetching(pool, self.tiers, self.reading)
        self.writing_down = WritingDown(pool, self.tiers, batch_blocks, limits.write_deadline_s)
        self._questions: dict[str, _Question] = {}
        self._grants: dict[str, _Grant] = {}
        self._writing: set[bytes] = set()  # names that somebody was granted room for
        self._left: dict[bytes, dict[bytes, int]] = {}  # by asker, of what its last grant left out: sights, by name
        self.num_filling = 0  #: blocks of the arena that who manages it writes into (nodecache.carrying)
        self.num_offered: dict[Tier, int] = {"host": 0, **dict.fromkeys(stores, 0)}  #: blocks, by where they lay
        self.num_missed = 0  #: blocks that were asked for and are nowhere
        self.num_granted = self.num_refused = self.num_written = self.num_seen_again = 0

    @property
    def num_waiting(self) -> int:
        """Questions that wait for a store."""
        return sum(bool(question.waiting) for question in self._questions.values())

    def on_event(self, event: CacheEvent, now_s: float) -> list[CacheInstruction]:
        """Take in `event`; return what is to be done, in order."""
        done: list[CacheInstruction] = []
        match event:
            case Said(asker, message):
                done += self._take(asker, message, now_s)
            case Hinted(names, priority, pinned_until_s):
                found = self.pool.find(names)
                self.keeping.decree(np.unique(found[found >= 0]), priority, pinned_until_s, now_s)
            case BlocksRead(read_id, arrived):
                outcomes, block_ids = self.reading.end(read_id, arrived, now_s)
                done += self._offer_outcomes(outcomes, now_s)
                self.pool.unpin(block_ids)
            case BlocksKept(write_id, dropped):
                self.writing_down.end(write_id, None if dropped is None else list(dropped), now_s)
            case AskerLost(asker):
                self._left.pop(asker, None)
                self.prefetching.lose(asker)
                self._free(self.leases.on_event(event, now_s), now_s)
            case TimePassed():
                self._free(self.leases.on_event(event, now_s), now_s)
                self.pool.release_quarantined(now_s)
                done += self._offer_outcomes(self.reading.give_up(now_s), now_s)
                self.writing_down.give_up(now_s)
            case _ as unreachable:
                assert_never(unreachable)
        self.prefetching.begin(now_s)
        reads, without_room = self.reading.begin(now_s)
        done += [*reads, *self._offer_outcomes(without_room, now_s), *self.writing_down.begin(now_s)]
        return [*done, *(Tell(*found) for found in self.prefetching.take_found(now_s))]

    def snapshot(self) -> list[tuple[Tier, bytes]]:
        """Return all names held, by tier. Call `take_events` with it, or a change is told twice."""
        below = [(entry.tier, b"".join(entry.store.names())) for entry in self.tiers.all]
        return [("host", self.pool.snapshot()), *below]

    def take_events(self) -> list[tuple[Tier, bytes, bytes]]:
        """Return by tier the names (stored, removed) since the last call, where there are any."""
        events: list[tuple[Tier, bytes, bytes]] = [("host", *self.pool.take_events())]
        events += [(entry.tier, *entry.take_events()) for entry in self.tiers.all]
        return [event for event in events if event[1] or event[2]]

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges by metric name."""
        pool = self.pool
        values = {
            "kvray_blocks": pool.num_blocks,
            "kvray_blocks_free": pool.num_free,
            "kvray_blocks_pinned": pool.num_used,
            "kvray_blocks_quarantined": pool.num_quarantined,
            "kvray_blocks_allocated_total": pool.num_taken,
            "kvray_blocks_evicted_total": pool.num_evicted,
            'kvray_evictions_total{tier="host",reason="quota"}': pool.num_evicted_for_quota,
            'kvray_evictions_total{tier="host",reason="room"}': pool.num_evicted - pool.num_evicted_for_quota,
            "kvray_block_bytes": pool.arena.layout.block_bytes,
            "kvray_leases": self.leases.num_open,
            "kvray_leases_expired_total": self.leases.num_expired,
            "kvray_cache_blocks_adopted": pool.num_adopted,
            "kvray_cache_blocks_held": pool.num_held,
            "kvray_cache_bookkeeping_bytes": pool.num_bookkeeping_bytes,
            "kvray_cache_granted_total": self.num_granted,
            "kvray_cache_refused_total": self.num_refused,
            "kvray_cache_written_total": self.num_written,
            "kvray_cache_duplicates_total": pool.num_duplicates,
            "kvray_cache_missed_total": self.num_missed,
            "kvray_cache_seen_again_total": self.num_seen_again,
            "kvray_cache_prefetched_total": self.prefetching.num_read,
            "kvray_cache_without_room_total": self.reading.num_without_room,
        }
        for tier, num_offered in self.num_offered.items():
            values[f'kvray_cache_offered_total{{tier="{tier}"}}'] = num_offered
        for entry in self.tiers.all:
            label = f'{{tier="{entry.tier}"}}'
            values[f"kvray_cache_read_total{label}"] = self.reading.num_read[entry.tier]
            values[f"kvray_cache_lost_total{label}"] = self.reading.num_lost[entry.tier]
            values[f"kvray_cache_written_down_total{label}"] = self.writing_down.num_written[entry.tier]
            values[f"kvray_cache_store_failures_total{label}"] = entry.num_failed
        return {name: float(value) for name, value in values.items()}

    # ----------------------------------------------------------------------------------------------- what workers say

    def _take(self, asker: bytes, message: Asked, now_s: float) -> list[CacheInstruction]:
        match message:
            case RoomRequest():
                return self._grant(asker, message, now_s)
            case BlocksWritten():
                self._commit(asker, message, now_s)
            case BlocksRequest():
                return self._offer(asker, message, now_s)
            case PrefetchBlocks(request_id=request_id):
                key, names = _ahead_key(asker, request_id), whole_names(message.names)
                return [Tell(asker, self.prefetching.ask(key, asker, message, names, now_s))]
            case RenewLease(request_id=request_id):
                for key in (_offer_key(asker, request_id), _room_key(asker, request_id)):
                    self._free(self.leases.on_event(leases.Renewed(key, asker), now_s), now_s)
            case ReleaseLease(request_id=request_id):
                self.prefetching.end(_ahead_key(asker, request_id))
                self._free(self.leases.on_event(leases.Released(_offer_key(asker, request_id), asker), now_s), now_s)
                grant = self._end_grant(asker, request_id, now_s)
                if grant is not None:
                    self.pool.give_back(grant.block_ids)
            case _ as unreachable:
                assert_never(unreachable)
        return []

    def _grant(self, asker: bytes, message: RoomRequest, now_s: float) -> list[CacheInstruction]:
        """Give room for what is neither held nor on its way, if it is worth it."""
        key = _room_key(asker, message.request_id)
        self._free(self.leases.on_event(leases.Asked(key, asker), now_s), now_s)
        missing, held = self._missing(message)
        if message.hints:
            found = self.pool.find(held)
            self.keeping.advise(found[found >= 0], message.hints, now_s)
        grant = self._take_room(asker, missing, held, message, now_s)
        num_left = len(missing) - len(grant.blocks)
        self.num_granted += len(grant.blocks)
        self.num_refused += num_left
        if len(grant.blocks):
            self._grants[key] = grant
            self._writing.update(grant.names)
            self.leases.on_event(leases.Published(key), now_s)
        else:
            self.leases.on_event(leases.Failed(key), now_s)
        blocks = grant.blocks.tobytes()
        return [Tell(asker, RoomGranted(request_id=message.request_id, blocks=blocks, num_left=num_left))]

    def _missing(self, message: RoomRequest) -> tuple[dict[bytes, int], bytes]:
        """Return what is neither held nor on its way, by name its position, and the names that are held."""
        names = whole_names(message.names)
        if len(message.indexes) != len(names):
            return {}, b""
        found = self.pool.find(message.names).tolist()
        missing = {
            name: min(max(index, 0), _UINT32)
            for name, index, block_id in zip(names, message.indexes, found, strict=True)
            if block_id < 0 and name not in self._writing and not self.reading.is_reading(name)
        }
        held = b"".join(name for name, block_id in zip(names, found, strict=True) if block_id >= 0)
        return missing, held

    def _take_room(
        self, asker: bytes, missing: dict[bytes, int], held: bytes, message: RoomRequest, now_s: float
    ) -> _Grant:
        """Take blocks for what is missing, the dearest first, heads before tails."""
        pool, names = self.pool, list(missing)
        wanted = as_names(b"".join(names))
        sights = 1 + pool.ghosts.seen(wanted).astype(np.int64)
        left = self._left.pop(asker, {})
        if message.is_again:  # what was left out is in the table by its first question
            sights = np.array([left.get(name, num) for name, num in zip(names, sights.tolist(), strict=True)], np.int64)
        else:
            self.num_seen_again += int((sights > 1).sum())
        pool.ghosts.add(wanted)
        indexes = np.array(list(missing.values()), np.int64)
        levels = pool.worth.levels(indexes, sights, priorities(indexes, message.hints))
        order = np.lexsort((indexes, -levels))
        num_most = max(0, int(pool.num_blocks * _MAX_WRITING_SHARE) - len(self._writing))
        block_ids = pool.take(levels[order[:num_most]].tolist(), now_s, message.tenant & _UINT64)
        if 0 < len(block_ids) < len(names):
            self._left[asker] = {names[i]: int(sights[i]) for i in order[len(block_ids) :]}
        order = order[: len(block_ids)]
        rows = np.zeros(len(block_ids), LOCATION)
        rows["index"], rows["block_id"], rows["generation"] = (
            indexes[order],
            block_ids,
            pool.arena.generations[block_ids],
        )
        rows["name"] = name_column([names[i] for i in order.tolist()])
        return _Grant(rows, sights[order].astype(np.uint32), held, message.hints)

    def _commit(self, asker: bytes, message: BlocksWritten, now_s: float) -> None:
        grant = self._end_grant(asker, message.request_id, now_s)
        if grant is None:
            return  # its time was over
        pool, granted = self.pool, grant.blocks
        told = unpack_locations(message.blocks)
        place_of = {block_id: place for place, block_id in enumerate(told["block_id"].tolist())}  # the last word counts
        granted_ids = granted["block_id"].tolist()
        places = np.array([place for place, block_id in enumerate(granted_ids) if block_id in place_of], np.int64)
        told = told[[place_of[granted_ids[place]] for place in places]]
        is_right = (told["generation"] == granted["generation"][places]) & (told["num_tokens"] > 0)
        told, places = told[is_right], places[is_right]
        block_ids = as_ids(told["block_id"])
        written = Written(
            block_ids,
            as_names(granted["name"][places].tobytes()),
            told["checksum"],
            told["num_tokens"],
            granted["index"][places],
        )
        is_new = pool.commit(written, grant.num_sights[places], now_s)
        kept = block_ids[is_new]
        pool.give_back(np.setdiff1d(grant.block_ids, kept))
        pool.unpin(kept)
        self.keeping.advise(kept, grant.hints, now_s)
        held = pool.find(grant.held)
        pool.replace(np.union1d(held[held >= 0], kept))  # heads after their tails
        self.num_written += len(kept)
        self.writing_down.offer(kept)

    def _offer(self, asker: bytes, message: BlocksRequest, now_s: float) -> list[CacheInstruction]:
        """Offer what lies in the arena, and have the rest read as far as a store has it."""
        pool, key = self.pool, _offer_key(asker, message.request_id)
        self._free(self.leases.on_event(leases.Asked(key, asker), now_s), now_s)
        names = whole_names(message.names)
        first_index = min(max(message.first_index, 0), _UINT32 - len(names))
        found = pool.find(message.names)
        _, first = np.unique(as_names(message.names), axis=0, return_index=True)
        is_first = np.zeros(len(names), bool)
        is_first[first] = True  # nobody is served better for asking twice
        held = np.flatnonzero((found >= 0) & is_first)
        block_ids = found[held]
        pool.see(block_ids, now_s)
        pool.pin(block_ids)
        question = self._questions[key] = _Question(asker, message.request_id, now_s, [block_ids])
        missing = np.flatnonzero((found < 0) & is_first)
        step = -1 if message.is_tail_first else 1
        wanted = [(names[i], first_index + i) for i in missing[::step].tolist()]
        question.waiting = self.reading.want(key, wanted, now_s)
        self.num_missed += len(wanted) - len(question.waiting)
        self.num_offered["host"] += len(block_ids)
        pool.ghosts.add(as_names(b"".join(name for name, _ in wanted if name not in question.waiting)))
        self.writing_down.offer(block_ids)
        if not len(block_ids) and question.waiting:
            return []
        records, rows = pool.records(block_ids), np.empty(len(block_ids), LOCATION)
        rows["index"], rows["block_id"] = held + first_index, block_ids
        rows["name"] = name_column(pool.names(block_ids))
        for column in ("generation", "num_tokens", "checksum", "tenant"):
            rows[column] = records[column]
        return [self._handoff(key, question, "host", rows[::step].tobytes(), now_s)]

    def _offer_outcomes(self, outcomes: Sequence[Outcome], now_s: float) -> list[CacheInstruction]:
        """Offer what came from a store to those who wait for it; tell who waits for nothing more."""
        told: dict[tuple[str, Tier], list[BlockLocation]] = {}
        for outcome in outcomes:
            question = self._questions.get(outcome.key)
            if question is None:
                self.prefetching.take(outcome)
                continue
            question.waiting.discard(outcome.block.name)
            locations = told.setdefault((outcome.key, outcome.tier), [])
            if outcome.block_id is None:
                self.num_missed += 1
                continue
            block_ids = as_ids([outcome.block_id])
            self.pool.pin(block_ids)
            question.pinned.append(block_ids)
            generation = int(self.pool.arena.generations[outcome.block_id])
            block = outcome.block
            locations.append(
                BlockLocation(
                    *(outcome.position, outcome.block_id, generation, block.name, block.num_tokens, block.checksum),
                    tenant=block.tenant,
                )
            )
            self.num_offered[outcome.tier] += 1
        handoffs: list[CacheInstruction] = []
        for key, tier in sorted(told):
            question = self._questions[key]
            is_over = not question.waiting and (key, tier) == max(pair for pair in told if pair[0] == key)
            if told[key, tier] or is_over:
                blocks = pack_locations(told[key, tier])
                handoffs.append(self._handoff(key, question, tier, blocks, now_s, is_last=is_over))
        return handoffs

    def _handoff(
        self,
        key: str,
        question: _Question,
        tier: Tier,
        blocks: bytes,
        now_s: float,
        *,
        is_last: bool | None = None,
    ) -> Tell:
        """Offer blocks; the lease begins with the last offer. `is_last` None: if nothing more is waited for."""
        is_last = not question.waiting if is_last is None else is_last
        if is_last and not any(len(block_ids) for block_ids in question.pinned):
            del self._questions[key]
            self.leases.on_event(leases.Failed(key), now_s)
        elif is_last:
            self.leases.on_event(leases.Published(key), now_s)
        handoff = KvHandoff(
            request_id=question.request_id,
            lease_s=self.limits.lease_s,
            blocks=blocks,
            is_last=is_last,
            elapsed_s=now_s - question.asked_s,
            tier=tier,
        )
        return Tell(question.asker, handoff)

    # --------------------------------------------------------------------------------------------- what was held ends

    def _free(self, freed: Sequence[FreeBlocks], now_s: float) -> None:
        """Unpin what was offered; quarantine what was granted, into which its writer may still write."""
        for item in freed:
            question = self._questions.pop(item.request_id, None)
            if question is not None:
                self.reading.forget(item.request_id, question.waiting)
                self.pool.unpin(np.concatenate(question.pinned))
                continue
            grant = self._grants.pop(item.request_id)
            self._writing.difference_update(grant.names)
            self.pool.quarantine(grant.block_ids, now_s + self.limits.quarantine_s)

    def _end_grant(self, asker: bytes, request_id: str, now_s: float) -> _Grant | None:
        """Take a grant off the books, into whose blocks its writer writes no more; they are the caller's."""
        key = _room_key(asker, request_id)
        grant = self._grants.pop(key, None)
        if grant is not None:
            self.leases.on_event(leases.Released(key, asker), now_s)
            self._writing.difference_update(grant.names)
        return grant

    # ----------------------------------------------------------------------------------------------------- invariants

    def check_invariants(self) -> None:
        """Raise InvariantError where the books do not agree."""
        self.pool.check_invariants()
        self.leases.check_invariants([*self._questions, *self._grants])
        wrong = [*self.reading.check_invariants(), *self.prefetching.check_invariants(), *self._wrong()]
        if wrong:
            raise InvariantError(f"node cache: {'; '.join(wrong)}")

    def _wrong(self) -> Iterator[str]:
        granted = [name for grant in self._grants.values() for name in grant.names]
        if len(granted) != len(self._writing) or set(granted) != self._writing:
            yield "the names in grants are not those that are being written"
        num_bound = len(granted) + self.reading.num_bound + self.num_filling
        is_idle = not self._questions and not self.writing_down.num_bound
        if is_idle and self.pool.num_used != num_bound:
            yield f"{self.pool.num_used} blocks are in use, {num_bound} are written or read"


def _offer_key(asker: bytes, request_id: str) -> str:
    return f"offer/{asker.hex()}/{request_id}"


def _ahead_key(asker: bytes, request_id: str) -> str:
    return f"ahead/{asker.hex()}/{request_id}"


def _room_key(asker: bytes, request_id: str) -> str:
    return f"room/{asker.hex()}/{request_id}"
