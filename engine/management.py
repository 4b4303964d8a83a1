"""What a worker answers to who manages caches: what its pool holds, and what is to be dropped, verified, read out.

As `nodecache.management` does for a node cache's tiers: a bounded piece of the tier "device" for each question, by the
same messages. Nothing is pinned meanwhile and no step waits: a block that was reused while its bytes were looked at has
another generation, and counts as not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from engine.memory.checksums import BlockChecksums
from kvcache.names import whole_names
from kvcache.pool import BlockPool, BlockState
from messages.cache import (
    PIECE_BYTES,
    BlocksFetched,
    BlocksListed,
    CacheQuestion,
    CheckBlocks,
    ClearBlocks,
    FetchBlocks,
    ListBlocks,
    PieceDone,
)
from messages.errors import RequestError
from messages.wire import Message

#: Looked at for one answer: a ms or so of the event loop.
_LISTED_BLOCKS: Final = 2048
_TOUCHED_BLOCKS: Final = 512


class BlockKind(NamedTuple):
    """What the blocks of a pool are."""

    block_bytes: int
    layout_version: int
    kernel_path: str  #: what computes them


class PoolManagement:
    """Answers questions about one worker's pool. All methods belong to the event loop that the pool belongs to."""

    def __init__(
        self,
        pool: BlockPool,
        checksums: BlockChecksums,
        kind: BlockKind,
        send: Callable[[bytes, Message], object],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_changed: Callable[[], None],
        tenants: Mapping[int, str],
    ) -> None:
        """Answer by `send`; what takes time is spawned. `on_changed` is called when blocks were dropped.

        `tenants`: names of those that are counted, by the numbers in their blocks.
        """
        self._pool = pool
        self._checksums = checksums
        self._kind = kind
        self._send = send
        self._spawn = spawn
        self._on_changed = on_changed
        self._tenants = tenants
        self._max_blocks = max(1, PIECE_BYTES // kind.block_bytes)
        self._turn = asyncio.Lock()  # one piece at a time is copied or verified, whoever asks

    def take(self, asker: bytes, question: CacheQuestion) -> None:
        """Take in a question; the answer goes to the asker, now or later."""
        match question:
            case ListBlocks(tier="device"):
                self._send(asker, self._list(question))
            case ListBlocks():
                self._send(asker, self._listed(question, [], None))
            case ClearBlocks(tier="device"):
                self._send(asker, self._clear(question))
            case CheckBlocks(tier="device"):
                self._spawn(self._check(asker, question))
            case FetchBlocks(tier="device"):
                self._spawn(self._fetch(asker, question))
            case FetchBlocks():
                self._send(asker, BlocksFetched(query_id=question.query_id))
            case ClearBlocks() | CheckBlocks():
                self._send(asker, PieceDone(query_id=question.query_id))
            case _:
                error = RequestError(f"a worker's pool does not take {type(question).__name__}")
                self._send(asker, PieceDone(query_id=question.query_id, error=error.info()))

    def stats(self) -> dict[str, float]:
        """Return the pool's counters and gauges by metric name."""
        pool = self._pool
        values = {
            "kvray_blocks": pool.num_blocks,
            "kvray_blocks_free": pool.num_free,
            "kvray_blocks_pinned": pool.num_used,
            "kvray_blocks_quarantined": pool.num_quarantined,
            "kvray_blocks_allocated_total": pool.stats.num_allocated_blocks,
            "kvray_blocks_hit_total": pool.stats.num_hit_blocks,
            'kvray_evictions_total{tier="device",reason="spare"}': pool.stats.num_evicted_spare_blocks,
            'kvray_evictions_total{tier="device",reason="room"}': (
                pool.stats.num_evicted_blocks - pool.stats.num_evicted_spare_blocks
            ),
            "kvray_blocks_evicted_total": pool.stats.num_evicted_blocks,
            "kvray_cache_blocks_held": pool.num_named,
            "kvray_block_bytes": self._kind.block_bytes,
            "kvray_block_size_tokens": pool.block_size,
        }
        num_blocks = pool.num_blocks_by_tenant() if self._tenants else {}
        for tenant, name in self._tenants.items():
            label = f'{{tenant="{name}",tier="device"}}'
            values[f"kvray_cache_tenant_bytes{label}"] = num_blocks.get(tenant, 0) * self._kind.block_bytes
        return {name: float(value) for name, value in values.items()}

    def _list(self, question: ListBlocks) -> BlocksListed:
        block_ids, next_cursor = self._chosen(None, question.cursor, _LISTED_BLOCKS)
        return self._listed(question, self._of_tenant(block_ids, question.tenant), next_cursor)

    def _listed(self, question: ListBlocks, block_ids: Sequence[int], next_cursor: int | None) -> BlocksListed:
        pool = self._pool
        return BlocksListed(
            query_id=question.query_id,
            layout_version=self._kind.layout_version,
            num_blocks=len(block_ids),
            names=b"".join(pool.name(block_id) or b"" for block_id in block_ids),
            places=np.array(block_ids, "<u8").tobytes(),
            num_tokens=np.full(len(block_ids), pool.block_size, "<u4").tobytes(),
            checksums=b"",  # most are not known
            tenants=np.array([pool.tenant(block_id) for block_id in block_ids], "<u8").tobytes(),
            num_pins=np.array([pool.num_pins(block_id) for block_id in block_ids], "<i4").tobytes(),
            next_cursor=next_cursor,
        )

    def _clear(self, question: ClearBlocks) -> PieceDone:
        pool = self._pool
        block_ids, next_cursor = self._chosen(question.names, question.cursor, _TOUCHED_BLOCKS)
        block_ids = self._of_tenant(block_ids, question.tenant)
        gone = [block_id for block_id in block_ids if pool.state(block_id) is BlockState.EVICTABLE]
        if not question.is_dry_run:
            gone = pool.drop(gone)
            self._on_changed()
        return PieceDone(
            query_id=question.query_id,
            num_done=len(gone),
            num_tokens=len(gone) * pool.block_size,
            num_in_use=len(block_ids) - len(gone),
            num_held=pool.num_named,
            next_cursor=next_cursor,
        )

    async def _check(self, asker: bytes, question: CheckBlocks) -> None:
        """Verify the blocks whose checksums are known, and drop those that do not have theirs."""
        pool = self._pool
        block_ids, next_cursor = self._chosen(question.names, question.cursor, _TOUCHED_BLOCKS)
        num_verified, damaged = 0, 0
        dropped: list[int] = []
        for begin in range(0, len(block_ids), self._max_blocks):
            async with self._turn:
                verified = await self._verified(block_ids[begin : begin + self._max_blocks])
            num_verified += len(verified)
            bad = [block_id for block_id, is_whole in verified.items() if not is_whole]
            damaged += len(bad)
            dropped += pool.drop(bad)
        if dropped:
            self._on_changed()
        answer = PieceDone(
            query_id=question.query_id,
            num_done=num_verified,
            num_tokens=num_verified * pool.block_size,
            num_damaged=damaged,
            num_in_use=damaged - len(dropped),
            num_held=pool.num_named if question.names is None else len(block_ids),
            next_cursor=next_cursor,
        )
        self._send(asker, answer)

    async def _verified(self, block_ids: Sequence[int]) -> dict[int, bool]:
        """Tell of blocks whose checksums are known, and that are not reused meanwhile, whether they have theirs."""
        known = {block_id: value for block_id in block_ids if (value := self._checksums.known(block_id)) is not None}
        if not known:
            return {}
        before = self._generations(list(known))
        found = await asyncio.to_thread(self._checksums.compute, list(known))
        after = self._generations(list(known))
        return {
            block_id: value == known[block_id]
            for block_id, value, now, then in zip(known, found, after, before, strict=True)
            if now == then
        }

    async def _fetch(self, asker: bytes, question: FetchBlocks) -> None:
        async with self._turn:
            pool, size = self._pool, self._kind.block_bytes
            found = map(pool.find, dict.fromkeys(whole_names(question.names)))
            block_ids = [block_id for block_id in found if block_id is not None][: self._max_blocks]
            generations = self._generations(block_ids)
            names = [pool.name(block_id) or b"" for block_id in block_ids]
            data = memoryview(bytearray(size * len(block_ids)))
            offsets = [i * size for i in range(len(block_ids))]
            sums: list[int] = []
            if block_ids:
                sums = await asyncio.to_thread(self._checksums.copy_out, block_ids, data, offsets)
            kept = [i for i, now in enumerate(self._generations(block_ids)) if now == generations[i]]
        answer = BlocksFetched(
            query_id=question.query_id,
            layout_version=self._kind.layout_version,
            kernel_path=self._kind.kernel_path,
            names=b"".join(names[i] for i in kept),
            checksums=np.array([sums[i] for i in kept], "<u8").tobytes(),
            data=memoryview(b"".join(data[i * size : (i + 1) * size] for i in kept)),
        )
        self._send(asker, answer)

    def _chosen(self, names: bytes | None, cursor: int, num_blocks: int) -> tuple[list[int], int | None]:
        """Return the next of the blocks that have these names (None: of all that have one), and where to go on."""
        begin, pool = max(cursor, 0), self._pool
        if names is None:
            end = min(begin + num_blocks, pool.num_blocks)
            block_ids = [block_id for block_id in range(begin, end) if pool.name(block_id) is not None]
            return block_ids, end if end < pool.num_blocks else None
        every = list(dict.fromkeys(whole_names(names)))
        end = begin + num_blocks
        found = [block_id for block_id in map(pool.find, every[begin:end]) if block_id is not None]
        return found, end if end < len(every) else None

    def _of_tenant(self, block_ids: list[int], tenant: int | None) -> list[int]:
        """Return those of the blocks that are this one's; None: all."""
        return block_ids if tenant is None else [each for each in block_ids if self._pool.tenant(each) == tenant]

    def _generations(self, block_ids: Sequence[int]) -> list[int]:
        return [self._pool.generation(block_id) for block_id in block_ids]
