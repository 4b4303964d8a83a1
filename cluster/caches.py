"""What is cached in the fleet, for who manages it: the router says where it lies, node caches do what is wanted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from cluster.dispatch import Dispatcher
from cluster.openai.cache_protocol import (
    CACHE_TIERS,
    CacheFailure,
    CacheStatsReply,
    CacheTier,
    HeldTokens,
    Holder,
    LookupReply,
    OwnerStats,
    TierCounts,
    TierStats,
    WorkReply,
)
from kvcache.names import NAME_BYTES, TOKEN_BYTES, block_names
from messages.cache import BlocksListed, CheckBlocks, ClearBlocks, KeepBlocks, KnownRun, ListBlocks, PieceDone
from messages.errors import CapacityError, KvrayError, error_from_info
from messages.fleet import WorkerInfo
from messages.tier import Tier

_NAMES_AT_A_TIME: Final = 512  #: some ms of a node cache
_NAMES_LOOKED_UP: Final = 4096  #: some ms of a router, or 15 where no two neighbours have the same holders
_TIMEOUT_S: Final = 10.0  #: of what a node cache answers at once
_STORE_TIMEOUT_S: Final = 60.0  #: of what waits for its stores, which have deadlines of their own


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt by its tokens, packed (kvcache.names), and the salt of its blocks' names."""

    token_bytes: bytes
    salt: bytes


class Piece(NamedTuple):
    """What a node cache did of what was asked; in `failure` why it did not do more."""

    info: WorkerInfo
    tier: CacheTier
    done: PieceDone = PieceDone(query_id="")
    failure: str | None = None


_Work = ClearBlocks | KeepBlocks | CheckBlocks


@dataclass(slots=True)
class Sum:
    """What pieces add up to."""

    num_caches: int = 0
    tiers: dict[CacheTier, TierCounts] = field(default_factory=dict)
    failures: list[CacheFailure] = field(default_factory=list)

    def add(self, piece: Piece) -> TierCounts:
        """Take in a piece; return what its tier comes to."""
        info, tier, done, failure = piece
        before = self.tiers.get(tier, TierCounts())
        if failure is not None:
            self.failures.append(CacheFailure(info.worker_id, f"{tier}: {failure}"))
        self.tiers[tier] = TierCounts(
            blocks=before.blocks + done.num_done,
            tokens=before.tokens + done.num_tokens,
            bytes=before.bytes + done.num_done * info.block_bytes,
            in_use=before.in_use + done.num_in_use,
            damaged=before.damaged + done.num_damaged,
        )
        return self.tiers[tier]

    def reply(self, *, dry_run: bool | None = None) -> WorkReply:
        """Return what goes to the client."""
        return WorkReply(tiers=self.tiers, num_caches=self.num_caches, failures=self.failures, dry_run=dry_run)


class Caches:
    """The fleet's caches. One event loop, any number of calls at once."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def found(self) -> list[WorkerInfo]:
        """Return the node caches that the router hears.

        Raises:
            CapacityError: there is no router now.
        """
        told = await self._dispatcher.fleet_stats()
        if not any(stats.role == "router" for stats in told):
            raise CapacityError("no router answers: nobody knows what lies where", status=503, retry_after_s=1.0)
        return list({cache.info.worker_id: cache.info for stats in told for cache in stats.caches}.values())

    # ---------------------------------------------------------------------------------------------------- where it is

    async def lookup(self, prompt: PromptTokens) -> LookupReply:
        """Tell where a prompt's blocks lie.

        Raises:
            CapacityError: no worker or no router is there.
            WorkerError: the router does not answer.
        """
        fleet = self._dispatcher.fleet
        if not fleet:
            raise CapacityError("no worker is there", status=503, code="no_workers", retry_after_s=1.0)
        nodes = {info.worker_id: info.node_id for info in [*fleet.values(), *await self.found()]}
        runs: list[HeldTokens] = []
        for fingerprint, block_size in sorted({(info.fingerprint, info.block_size) for info in fleet.values()}):
            runs += [
                HeldTokens(
                    run.begin * block_size,
                    run.end * block_size,
                    [Holder(one.worker_id, nodes.get(one.worker_id, ""), one.tier) for one in run.holders],
                )
                for run in await self._known(await _names_of(prompt, fingerprint, block_size))
            ]
        runs.sort(key=lambda run: (run.begin, run.end))
        tiers = sorted({holder.tier for run in runs for holder in run.holders})
        return LookupReply(
            num_tokens=len(prompt.token_bytes) // TOKEN_BYTES,
            block_size=next(iter(fleet.values())).block_size,
            held_tokens=_covered(runs),
            tokens={
                tier: _covered(run for run in runs if any(one.tier == tier for one in run.holders)) for tier in tiers
            },
            runs=runs,
        )

    async def _known(self, names: bytes) -> list[KnownRun]:
        """Ask the router for a prompt's runs, some of them at a time."""
        runs: list[KnownRun] = []
        size = _NAMES_LOOKED_UP * NAME_BYTES
        for begin in range(0, len(names), size):
            first, part = begin // NAME_BYTES, names[begin : begin + size]
            for run in (await self._dispatcher.where(part)).runs:
                if runs and runs[-1].holders == run.holders:
                    runs[-1] = KnownRun(runs[-1].begin, first + run.end, run.holders)
                else:
                    runs.append(KnownRun(first + run.begin, first + run.end, run.holders))
            if not runs or runs[-1].end < first + len(part) // NAME_BYTES:
                break
        return runs

    async def stats(self) -> CacheStatsReply:
        """Return what workers and node caches count of their tiers; who does not answer is without numbers."""
        told = await self._dispatcher.fleet_stats()
        values = {stats.worker_id: stats.values for stats in told}
        workers = [
            _owner(info, values.get(info.worker_id), ("device",))
            for info in sorted(self._dispatcher.fleet.values(), key=lambda info: (info.role, info.worker_id))
        ]
        caches = [_owner(cache.info, cache.values, CACHE_TIERS) for stats in told for cache in stats.caches]
        return CacheStatsReply(workers=workers, caches=caches)

    async def listed(
        self, tiers: Sequence[CacheTier]
    ) -> AsyncGenerator[tuple[WorkerInfo, CacheTier, BlocksListed], None]:
        """Yield all that node caches hold in these tiers, some thousand blocks at a time.

        Raises:
            WorkerError: a node cache was lost, or does not answer.
        """
        for info in await self.found():
            for tier in tiers:
                cursor: int | None = 0
                while cursor is not None:
                    question = ListBlocks(query_id="", tier=tier, cursor=cursor)
                    listed = await self._dispatcher.ask_cache(info, question, _TIMEOUT_S)
                    assert isinstance(listed, BlocksListed)
                    yield info, tier, listed
                    cursor = listed.next_cursor

    # -------------------------------------------------------------------------------------------------- what is done

    async def clear(
        self, tiers: Sequence[CacheTier], prompt: PromptTokens | None, tenant: int | None, *, is_dry_run: bool
    ) -> WorkReply:
        """Drop the blocks of a prompt or of a tenant, or all, from these tiers; or tell what would go."""
        work = ClearBlocks(query_id="", tier="host", tenant=tenant, is_dry_run=is_dry_run)
        total = await self._total(work, tiers, prompt)
        return total.reply(dry_run=is_dry_run)

    async def keep(self, prompt: PromptTokens, ttl_s: float, priority: int) -> WorkReply:
        """Keep a prompt's blocks in host memory for so long (inf: for good; 0: no longer than others)."""
        work = KeepBlocks(query_id="", names=b"", ttl_s=ttl_s, priority=priority)
        return (await self._total(work, ("host",), prompt)).reply()

    async def check(
        self, caches: Sequence[WorkerInfo], tiers: Sequence[CacheTier], prompt: PromptTokens | None
    ) -> AsyncGenerator[Piece, None]:
        """Have node caches verify blocks, a prompt's or all, and drop what is damaged; yields what was done."""
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue(maxsize=len(caches) + 1)

        async def work(info: WorkerInfo) -> None:
            async for piece in self._pieces(info, CheckBlocks(query_id="", tier="host"), tiers, prompt):
                await pieces.put(piece)
            await pieces.put(None)

        workers = [asyncio.ensure_future(work(info)) for info in caches]
        try:
            num_left = len(workers)
            while num_left:
                piece = await pieces.get()
                if piece is None:
                    num_left -= 1
                    continue
                yield piece
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _total(self, work: _Work, tiers: Sequence[CacheTier], prompt: PromptTokens | None) -> Sum:
        caches = await self.found()
        total = Sum(len(caches))

        async def add_all(info: WorkerInfo) -> None:
            async for piece in self._pieces(info, work, tiers, prompt):
                total.add(piece)

        await asyncio.gather(*(add_all(info) for info in caches))
        return total

    async def _pieces(
        self, info: WorkerInfo, work: _Work, tiers: Sequence[CacheTier], prompt: PromptTokens | None
    ) -> AsyncGenerator[Piece, None]:
        """Have one node cache do it, piece by piece, tier by tier; a tier that fails is left."""
        names = None if prompt is None else await _names_of(prompt, info.fingerprint, info.block_size)
        for tier in tiers:
            try:
                for part, is_last in _parts(names):
                    cursor: int | None = 0
                    while cursor is not None:
                        asked = _piece_of(work, tier, part, cursor, is_last=is_last)
                        done = await self._dispatcher.ask_cache(info, asked, _STORE_TIMEOUT_S)
                        assert isinstance(done, PieceDone)
                        failure = None if done.error is None else error_from_info(done.error).message
                        yield Piece(info, tier, done, failure)
                        cursor = done.next_cursor if failure is None else None
                    if failure is not None:
                        break
            except KvrayError as error:
                yield Piece(info, tier, failure=error.message)


async def _names_of(prompt: PromptTokens, fingerprint: bytes, block_size: int) -> bytes:
    return await asyncio.to_thread(block_names, fingerprint, prompt.salt, prompt.token_bytes, block_size)


def _parts(names: bytes | None) -> list[tuple[bytes | None, bool]]:
    """Divide names into what is asked at a time, and whether it is the last; a prompt without a full block has none."""
    if names is None:
        return [(None, True)]
    size = _NAMES_AT_A_TIME * NAME_BYTES
    return [(names[begin : begin + size], begin + size >= len(names)) for begin in range(0, len(names), size)]


def _piece_of(work: _Work, tier: CacheTier, names: bytes | None, cursor: int, *, is_last: bool) -> _Work:
    match work:
        case ClearBlocks():
            return msgspec.structs.replace(work, tier=tier, names=names, cursor=cursor, is_last=is_last)
        case CheckBlocks():
            return msgspec.structs.replace(work, tier=tier, names=names, cursor=cursor)
        case KeepBlocks():
            return msgspec.structs.replace(work, names=names or b"")


def _covered(runs: Iterable[HeldTokens]) -> int:
    """Count the tokens that lie in any of the runs, which are in order."""
    num_tokens = end = 0
    for run in runs:
        num_tokens += max(0, run.end - max(run.begin, end))
        end = max(end, run.end)
    return num_tokens


def _owner(info: WorkerInfo, values: dict[str, float] | None, tiers: Sequence[Tier]) -> OwnerStats:
    stats = {tier: _tier_stats(info, tier, values or {}) for tier in tiers}
    return OwnerStats(
        worker_id=info.worker_id,
        role=info.role,
        node=info.node_id,
        block_bytes=info.block_bytes,
        block_size=info.block_size,
        is_answering=values is not None,
        tiers={tier: one for tier, one in stats.items() if one is not None},
    )


def _tier_stats(info: WorkerInfo, tier: Tier, values: dict[str, float]) -> TierStats | None:
    """Return a tier's numbers; None where the owner has no such tier."""

    def number(name: str) -> int | None:
        value = values.get(name)
        return None if value is None or not math.isfinite(value) else int(value)

    if tier in ("device", "host"):
        blocks = number("kvray_cache_blocks_held")
        return TierStats(
            blocks=blocks,
            bytes=None if blocks is None else blocks * info.block_bytes,
            capacity_bytes=info.num_blocks * info.block_bytes,
            hits=number("kvray_blocks_hit_total" if tier == "device" else 'kvray_cache_offered_total{tier="host"}'),
            evictions=number("kvray_blocks_evicted_total"),
        )
    if f"kvray_{tier}_blocks" not in values:
        return None
    return TierStats(
        blocks=number(f"kvray_{tier}_blocks"),
        bytes=number(f"kvray_{tier}_bytes"),
        capacity_bytes=number(f"kvray_{tier}_capacity_bytes"),
        hits=number(f'kvray_cache_offered_total{{tier="{tier}"}}'),
        evictions=number(f"kvray_{tier}_evicted_blocks_total"),
    )
