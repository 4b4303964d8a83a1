"""What is cached in the fleet, for who manages it: the router says where it lies, its owners do what is wanted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from cluster.cache_stats import owner_stats, seen_by
from cluster.dispatch import Dispatcher
from cluster.openai.cache_protocol import (
    NODE_TIERS,
    CacheFailure,
    CacheStatsReply,
    HeldTokens,
    Holder,
    LookupReply,
    TierCounts,
    WorkReply,
)
from kvcache.names import NAME_BYTES, TOKEN_BYTES, block_names, split_names
from messages.cache import (
    BlocksListed,
    CheckBlocks,
    ClearBlocks,
    CollectGarbage,
    KeepBlocks,
    KnownRun,
    ListBlocks,
    MoveBlocks,
    PieceDone,
)
from messages.errors import CapacityError, KvrayError, RequestError, WorkerError, error_from_info
from messages.fleet import TakeBlocks, WorkerInfo
from messages.tier import Tier

_NAMES_AT_A_TIME: Final = 512  #: some ms of their owner
_NAMES_LOOKED_UP: Final = 4096  #: some ms of a router, or 15 where no two neighbours have the same holders
_TIMEOUT_S: Final = 10.0  #: of what an owner answers at once
_STORE_TIMEOUT_S: Final = 60.0  #: of what waits for its stores, which have deadlines of their own
_LOOK_S: Final = 0.05  #: between looks at what a worker has pulled
_PATIENCE_S: Final = 3.0  #: for which it may pull nothing of what it was told to


class PromptTokens(NamedTuple):
    """A prompt by its tokens, packed (kvcache.names), and the salt of its blocks' names."""

    token_bytes: bytes
    salt: bytes


class Piece(NamedTuple):
    """What an owner did of what was asked; in `failure` why it did not do more."""

    info: WorkerInfo
    tier: Tier
    done: PieceDone = PieceDone(query_id="")
    failure: str | None = None


_Work = ClearBlocks | KeepBlocks | CheckBlocks | MoveBlocks | CollectGarbage


class _Part(NamedTuple):
    """Some of the names that are meant; None: all."""

    names: bytes | None
    first_index: int
    is_last: bool


@dataclass(slots=True)
class Sum:
    """What pieces add up to."""

    owners: Sequence[WorkerInfo] = ()
    tiers: dict[Tier, TierCounts] = field(default_factory=dict)
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
            below=dict(Counter(before.below) + Counter(done.num_below)),
            without_room=before.without_room + done.num_without_room,
            above_quota=before.above_quota + done.num_above_quota,
            not_stored=before.not_stored + done.num_failed,
            freed_files=before.freed_files + done.num_freed_files,
            freed_bytes=before.freed_bytes + done.num_freed_bytes,
        )
        return self.tiers[tier]

    def reply(self, *, dry_run: bool | None = None) -> WorkReply:
        """Return what goes to the client."""
        num_caches = sum(info.role == "cache" for info in self.owners)
        return WorkReply(
            tiers=self.tiers,
            num_caches=num_caches,
            num_workers=len(self.owners) - num_caches,
            failures=self.failures,
            dry_run=dry_run,
        )


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

    async def owners(self, tiers: Sequence[Tier]) -> list[WorkerInfo]:
        """Return who may have blocks in these tiers, workers first.

        Raises:
            CapacityError: there is no router now.
        """
        workers = sorted(self._dispatcher.fleet.values(), key=lambda info: (info.role, info.worker_id))
        caches = await self.found() if any(tier != "device" for tier in tiers) else []
        return [*(workers if "device" in tiers else []), *caches]

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
        runs = [
            HeldTokens(
                run.begin * block_size,
                run.end * block_size,
                [Holder(one.worker_id, nodes.get(one.worker_id, ""), one.tier) for one in run.holders],
            )
            for (_, block_size), found in (await self.known(prompt)).items()
            for run in found
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

    async def known(self, prompt: PromptTokens) -> dict[tuple[bytes, int], list[KnownRun]]:
        """Return what the router knows of a prompt's blocks, by the fingerprints and block sizes of the workers."""
        kinds = sorted({(info.fingerprint, info.block_size) for info in self._dispatcher.fleet.values()})
        return {kind: await self._known(await names_of(prompt, *kind)) for kind in kinds}

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

    async def stats(self, tenant: str | None) -> CacheStatsReply:
        """Return what workers and node caches count of their tiers; who does not answer is without numbers.

        `tenant`: only what this one has; None: all.
        """
        told = await self._dispatcher.fleet_stats()
        values = {stats.worker_id: stats.values for stats in told}
        workers = [
            owner_stats(info, values.get(info.worker_id), ("device",))
            for info in sorted(self._dispatcher.fleet.values(), key=lambda info: (info.role, info.worker_id))
        ]
        caches = [owner_stats(cache.info, cache.values, NODE_TIERS) for stats in told for cache in stats.caches]
        if tenant is None:
            return CacheStatsReply(workers=workers, caches=caches)
        return CacheStatsReply(
            workers=[seen_by(tenant, worker) for worker in workers],
            caches=[seen_by(tenant, cache) for cache in caches],
        )

    async def listed(
        self, tiers: Sequence[Tier], tenant: int | None
    ) -> AsyncGenerator[tuple[WorkerInfo, Tier, BlocksListed], None]:
        """Yield all that workers and node caches hold in these tiers, or of a tenant, some thousand blocks at a time.

        Raises:
            WorkerError: one was lost, or does not answer.
        """
        for info in await self.owners(tiers):
            for tier in _tiers_of(info, tiers):
                cursor: int | None = 0
                while cursor is not None:
                    question = ListBlocks(query_id="", tier=tier, tenant=tenant, cursor=cursor)
                    listed = await self._dispatcher.ask_owner(info, question, _TIMEOUT_S)
                    assert isinstance(listed, BlocksListed)
                    yield info, tier, listed
                    cursor = listed.next_cursor

    # -------------------------------------------------------------------------------------------------- what is done

    async def clear(
        self,
        tiers: Sequence[Tier],
        prompt: PromptTokens | None,
        tenant: int | None,
        *,
        is_dry_run: bool,
        spares_kept: bool = False,
    ) -> WorkReply:
        """Drop the blocks of a prompt or of a tenant, or all, from these tiers; or tell what would go.

        `spares_kept`: what is to be kept stays.
        """
        work = ClearBlocks(query_id="", tier="host", tenant=tenant, is_dry_run=is_dry_run, spares_kept=spares_kept)
        total = await self._total(work, tiers, prompt)
        return total.reply(dry_run=is_dry_run)

    def move(
        self, owners: Sequence[WorkerInfo], source: Tier, target: Tier, prompt: PromptTokens
    ) -> AsyncGenerator[Piece, None]:
        """Bring a prompt's blocks to another tier of the nodes where they lie in this one; yields what was done."""
        work = MoveBlocks(query_id="", tier=source, target=target, names=b"")
        return self._all_pieces(owners, work, (source,), prompt)

    def collect(self, owners: Sequence[WorkerInfo], tiers: Sequence[Tier]) -> AsyncGenerator[Piece, None]:
        """Have stores give back the room that dropped blocks take; yields what was done."""
        return self._all_pieces(owners, CollectGarbage(query_id="", tier="disk"), tiers, None)

    async def warm(
        self, owners: Sequence[WorkerInfo], worker: WorkerInfo | None, prompt: PromptTokens
    ) -> AsyncGenerator[Piece, None]:
        """Bring a prompt's blocks up to host memory where a store has them, and from there to a worker's pool."""
        work = MoveBlocks(query_id="", tier="disk", target="host", names=b"", keeps_source=True)
        caches = [info for info in owners if info.role == "cache"]
        async with aclosing(self._all_pieces(caches, work, ("disk", "remote"), prompt)) as pieces:
            async for piece in pieces:
                yield piece
        if worker is not None:
            names = await names_of(prompt, worker.fingerprint, worker.block_size)
            caches.sort(key=lambda info: info.node_id != worker.node_id)
            async for piece in self._taken(worker, caches, names):
                yield piece

    def worker(self, worker_id: str) -> WorkerInfo:
        """Return the worker of this id.

        Raises:
            RequestError: there is none.
        """
        found = self._dispatcher.fleet.get(worker_id)
        if found is None:
            there = ", ".join(sorted(self._dispatcher.fleet))
            raise RequestError(f"worker_id: got {worker_id}, want one of {there}", param="worker_id")
        return found

    async def _taken(
        self, worker: WorkerInfo, caches: Sequence[WorkerInfo], names: bytes
    ) -> AsyncGenerator[Piece, None]:
        """Have a worker pull what node caches hold of a prompt in host memory; it leaves what it has no room for."""
        loop = asyncio.get_running_loop()
        for part, _, _ in _parts(names):
            assert part is not None
            tails_first = b"".join(reversed(split_names(part)))
            try:
                num_before = num_now = await self._num_held(worker, "device", part)
                for cache in caches:
                    num_there = await self._num_held(cache, "host", part)
                    self._dispatcher.have_taken(
                        worker, TakeBlocks(address=cache.address, names=tails_first, age_s=None)
                    )
                    until_s = loop.time() + _PATIENCE_S
                    while (num_now := await self._num_held(worker, "device", part)) < num_there:
                        if loop.time() >= until_s:
                            break
                        await asyncio.sleep(_LOOK_S)
            except WorkerError as error:
                yield Piece(worker, "device", failure=error.message)
                break
            num_taken = max(0, num_now - num_before)  # others may have gone for what was wanted beside
            done = PieceDone(query_id="", num_done=num_taken, num_tokens=num_taken * worker.block_size)
            yield Piece(worker, "device", done)
            if num_taken == 0 and num_before == 0:
                break  # what it has is worth more, or used

    async def _num_held(self, info: WorkerInfo, tier: Tier, names: bytes) -> int:
        """Count those of the blocks that an owner has in a tier, used or not.

        Raises:
            WorkerError: it does not answer.
        """
        work = ClearBlocks(query_id="", tier=tier, is_dry_run=True)
        num_held = 0
        async for piece in self._pieces(info, work, (tier,), names):
            if piece.failure is not None:
                raise WorkerError(f"{info.worker_id}: {piece.failure}")
            num_held += piece.done.num_done + piece.done.num_in_use
        return num_held

    async def keep(self, prompt: PromptTokens, ttl_s: float, priority: int) -> WorkReply:
        """Keep a prompt's blocks in host memory for so long (inf: for good; 0: no longer than others)."""
        work = KeepBlocks(query_id="", names=b"", ttl_s=ttl_s, priority=priority)
        return (await self._total(work, ("host",), prompt)).reply()

    def check(
        self, owners: Sequence[WorkerInfo], tiers: Sequence[Tier], prompt: PromptTokens | None
    ) -> AsyncGenerator[Piece, None]:
        """Have owners verify blocks, a prompt's or all, and drop what is damaged; yields what was done."""
        return self._all_pieces(owners, CheckBlocks(query_id="", tier="host"), tiers, prompt)

    async def _all_pieces(
        self, owners: Sequence[WorkerInfo], work: _Work, tiers: Sequence[Tier], prompt: PromptTokens | None
    ) -> AsyncGenerator[Piece, None]:
        """Have all owners do it, each at its own pace; yields what was done."""
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue(maxsize=len(owners) + 1)

        async def do(info: WorkerInfo) -> None:
            async for piece in self._pieces(info, work, tiers, await _names_at(info, prompt)):
                await pieces.put(piece)
            await pieces.put(None)

        workers = [asyncio.ensure_future(do(info)) for info in owners]
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

    async def _total(self, work: _Work, tiers: Sequence[Tier], prompt: PromptTokens | None) -> Sum:
        total = Sum(await self.owners(tiers))
        async with aclosing(self._all_pieces(total.owners, work, tiers, prompt)) as pieces:
            async for piece in pieces:
                total.add(piece)
        return total

    async def _pieces(
        self, info: WorkerInfo, work: _Work, tiers: Sequence[Tier], names: bytes | None
    ) -> AsyncGenerator[Piece, None]:
        """Have one owner do it, piece by piece, tier by tier; a tier that fails is left. `names`: None, all of them."""
        for tier in _tiers_of(info, tiers):
            try:
                for part in _parts(names):
                    cursor: int | None = 0
                    while cursor is not None:
                        asked = _piece_of(work, tier, part, cursor)
                        done = await self._dispatcher.ask_owner(info, asked, _STORE_TIMEOUT_S)
                        assert isinstance(done, PieceDone)
                        failure = None if done.error is None else error_from_info(done.error).message
                        yield Piece(info, tier, done, failure)
                        cursor = done.next_cursor if failure is None else None
                    if failure is not None:
                        break
            except KvrayError as error:
                yield Piece(info, tier, failure=error.message)


def _tiers_of(info: WorkerInfo, tiers: Sequence[Tier]) -> list[Tier]:
    """Return those of the tiers that such an owner has."""
    return [tier for tier in tiers if (tier == "device") == (info.role != "cache")]


async def names_of(prompt: PromptTokens, fingerprint: bytes, block_size: int) -> bytes:
    """Name a prompt's blocks at workers of this kind; a thread does it."""
    return await asyncio.to_thread(block_names, fingerprint, prompt.salt, prompt.token_bytes, block_size)


async def _names_at(info: WorkerInfo, prompt: PromptTokens | None) -> bytes | None:
    return None if prompt is None else await names_of(prompt, info.fingerprint, info.block_size)


def _parts(names: bytes | None) -> list[_Part]:
    """Divide names into what is asked at a time; a prompt without a full block has none."""
    if names is None:
        return [_Part(None, 0, is_last=True)]
    size = _NAMES_AT_A_TIME * NAME_BYTES
    return [
        _Part(names[begin : begin + size], begin // NAME_BYTES, is_last=begin + size >= len(names))
        for begin in range(0, len(names), size)
    ]


def _piece_of(work: _Work, tier: Tier, part: _Part, cursor: int) -> _Work:
    names, first_index, is_last = part
    match work:
        case ClearBlocks():
            return msgspec.structs.replace(work, tier=tier, names=names, cursor=cursor, is_last=is_last)
        case CheckBlocks():
            return msgspec.structs.replace(work, tier=tier, names=names, cursor=cursor)
        case KeepBlocks():
            return msgspec.structs.replace(work, names=names or b"")
        case MoveBlocks():
            return msgspec.structs.replace(work, tier=tier, names=names or b"", first_index=first_index, cursor=cursor)
        case CollectGarbage():
            return msgspec.structs.replace(work, tier=tier, cursor=cursor)


def _covered(runs: Iterable[HeldTokens]) -> int:
    """Count the tokens that lie in any of the runs, which are in order."""
    num_tokens = end = 0
    for run in runs:
        num_tokens += max(0, run.end - max(run.begin, end))
        end = max(end, run.end)
    return num_tokens
