"""What a worker answers about its pool: a real pool of random bytes, the messages in a list."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from engine.management import BlockKind, PoolManagement
from kvcache.names import split_names
from messages.cache import (
    PIECE_BYTES,
    BlocksFetched,
    CheckBlocks,
    ClearBlocks,
    CollectGarbage,
    FetchBlocks,
    ListBlocks,
    PieceDone,
    PutBlocks,
)
from messages.tier import Tier
from tests.engine.shared_pools import NUM_BLOCKS, SIZE, SharedPool
from transport.checksum import checksum

NAMES = [bytes([index]) * 16 for index in range(5)]
ACMES = NAMES[2:]
TIERS: tuple[Tier, ...] = ("host", "disk", "remote")


class Bench:
    """A pool that holds NAMES, ACMES of tenant 7, of which the last one is in use."""

    def __init__(self, block_bytes: int | None = None) -> None:
        self.shared = SharedPool({})
        self.pool = self.shared.books
        self.block_ids = self.pool.allocate(len(NAMES))
        for block_id, name in zip(self.block_ids, NAMES, strict=True):
            self.pool.commit(block_id, name, tenant=7 if name in ACMES else 0)
        self.pool.unpin(self.block_ids[:-1])
        self.sent: list[tuple[bytes, object]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.num_changes = 0
        kind = BlockKind(block_bytes or self.shared.layout.block_bytes, 3, "a path")
        self.management = PoolManagement(
            *(self.pool, self.shared.checksums, kind, lambda *sent: self.sent.append(sent), self.spawn),
            *(self.note_change, {7: "acme", 9: "globex"}),
        )

    def spawn(self, coroutine) -> None:
        self.tasks.append(asyncio.ensure_future(coroutine))

    def note_change(self) -> None:
        self.num_changes += 1

    async def ask(self, question):
        self.management.take(b"m", question)
        await asyncio.gather(*self.tasks)
        self.tasks.clear()
        [(asker, answer)] = self.sent
        self.sent.clear()
        self.pool.check_invariants()
        assert (asker, answer.query_id) == (b"m", "q")
        return answer

    def held(self) -> list[bytes]:
        return [name for name in NAMES if self.pool.holds(name)]


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_what_the_pool_holds_is_listed(bench):
    listed = await bench.ask(ListBlocks(query_id="q", tier="device"))
    assert (listed.num_blocks, listed.layout_version, listed.next_cursor) == (5, 3, None)
    by_place = dict(zip(np.frombuffer(listed.places, "<u8").tolist(), split_names(listed.names), strict=True))
    assert by_place == dict(zip(bench.block_ids, NAMES, strict=True))
    assert np.frombuffer(listed.num_tokens, "<u4").tolist() == [SIZE] * 5
    assert sorted(np.frombuffer(listed.num_pins, "<i4").tolist()) == [0, 0, 0, 0, 1]
    assert (listed.checksums, listed.age_s) == (b"", b"")


async def test_a_dry_run_drops_nothing_and_what_is_in_use_stays(bench):
    would = await bench.ask(ClearBlocks(query_id="q", tier="device"))
    assert (would.num_done, would.num_tokens, would.num_in_use, would.num_held) == (4, 4 * SIZE, 1, 5)
    assert (bench.held(), bench.num_changes) == (NAMES, 0)
    did = await bench.ask(ClearBlocks(query_id="q", tier="device", is_dry_run=False))
    assert (did.num_done, did.num_in_use, did.num_held) == (4, 1, 1)
    assert (bench.held(), bench.num_changes) == (NAMES[-1:], 1)
    assert bench.pool.num_free == NUM_BLOCKS - 1


async def test_blocks_go_by_name(bench):
    names = b"".join([NAMES[1], NAMES[4], b"unknown " * 2, b"rest"])
    done = await bench.ask(ClearBlocks(query_id="q", tier="device", names=names, is_dry_run=False))
    assert (done.num_done, done.num_in_use) == (1, 1)
    assert bench.held() == [name for name in NAMES if name != NAMES[1]]


async def test_the_bytes_of_blocks_are_read_out_used_or_not(bench):
    wanted = [NAMES[4], NAMES[0], b"unknown " * 2]
    came = await bench.ask(FetchBlocks(query_id="q", tier="device", names=b"".join(wanted)))
    assert split_names(came.names) == wanted[:2]
    rows = [bench.shared.row(bench.block_ids[i]) for i in (4, 0)]
    assert bytes(came.data) == b"".join(rows)
    assert np.frombuffer(came.checksums, "<u8").tolist() == [checksum(row) for row in rows]
    assert (came.layout_version, came.kernel_path) == (3, "a path")


async def test_no_more_than_a_piece_is_read_out():
    bench = Bench()
    bench.management._max_blocks = PIECE_BYTES // (PIECE_BYTES // 2)
    came = await bench.ask(FetchBlocks(query_id="q", tier="device", names=b"".join(NAMES)))
    assert split_names(came.names) == NAMES[:2]


async def test_what_is_not_there_is_nothing(bench):
    for names in (b"", b"unknown " * 2, b"no name"):
        came = await bench.ask(FetchBlocks(query_id="q", tier="device", names=names))
        assert (came.names, came.checksums, bytes(came.data)) == (b"", b"", b"")
        assert (await bench.ask(CheckBlocks(query_id="q", tier="device", names=names))).num_done == 0


async def test_a_block_that_is_reused_while_it_is_read_out_does_not_come(bench, monkeypatch):
    copy_out = bench.shared.checksums.copy_out

    def reuse(block_ids, target, offsets):
        bench.pool.drop(bench.block_ids[1:2])
        bench.pool.unpin(bench.pool.allocate(bench.pool.num_free))
        return copy_out(block_ids, target, offsets)

    monkeypatch.setattr(bench.shared.checksums, "copy_out", reuse)
    came = await bench.ask(FetchBlocks(query_id="q", tier="device", names=NAMES[1] + NAMES[4]))
    assert split_names(came.names) == NAMES[4:]
    assert bytes(came.data) == bench.shared.row(bench.block_ids[4])


async def test_what_was_published_is_verified_and_dropped_where_it_is_damaged(bench):
    nothing = await bench.ask(CheckBlocks(query_id="q", tier="device"))
    assert (nothing.num_done, nothing.num_held) == (0, 5)
    bench.shared.checksums.published(bench.block_ids)
    good = await bench.ask(CheckBlocks(query_id="q", tier="device"))
    assert (good.num_done, good.num_tokens, good.num_damaged) == (5, 5 * SIZE, 0)
    for index in (1, 4):
        bench.shared.damage(bench.block_ids[index])
    found = await bench.ask(CheckBlocks(query_id="q", tier="device", names=b"".join(NAMES[1:])))
    assert (found.num_done, found.num_damaged, found.num_in_use, found.num_held) == (4, 2, 1, 4)
    assert bench.held() == [name for name in NAMES if name != NAMES[1]]
    assert bench.num_changes == 1


async def test_other_tiers_are_none_of_a_workers(bench):
    for tier in TIERS:
        assert (await bench.ask(ListBlocks(query_id="q", tier=tier))).num_blocks == 0
        assert await bench.ask(ClearBlocks(query_id="q", tier=tier, is_dry_run=False)) == PieceDone(query_id="q")
        assert await bench.ask(CheckBlocks(query_id="q", tier=tier)) == PieceDone(query_id="q")
        came = await bench.ask(FetchBlocks(query_id="q", tier=tier, names=NAMES[0]))
        assert came == BlocksFetched(query_id="q")
    refused = await bench.ask(CollectGarbage(query_id="q", tier="device"))
    assert refused.error.message == "a worker's pool does not take CollectGarbage"
    piece = PutBlocks(
        **{"query_id": "q", "fingerprint": b"", "layout_version": 3, "kernel_path": "", "first_index": 0},
        **{"block_size": SIZE, "names": b"", "checksums": b"", "data": memoryview(b"")},
    )
    assert "PutBlocks" in (await bench.ask(piece)).error.message


async def test_a_tenants_blocks_are_listed_and_dropped_and_nobody_elses(bench):
    listed = await bench.ask(ListBlocks(query_id="q", tier="device"))
    assert np.frombuffer(listed.tenants, "<u8").tolist() == [0, 0, 7, 7, 7]
    listed = await bench.ask(ListBlocks(query_id="q", tier="device", tenant=7))
    assert split_names(listed.names) == ACMES
    for is_dry_run in (True, False):
        done = await bench.ask(ClearBlocks(query_id="q", tier="device", tenant=7, is_dry_run=is_dry_run))
        assert (done.num_done, done.num_in_use) == (2, 1)
        assert bench.held() == ([*NAMES] if is_dry_run else [*NAMES[:2], NAMES[4]])
    for tenant in (9, 0):
        done = await bench.ask(ClearBlocks(query_id="q", tier="device", tenant=tenant))
        assert done.num_done == (2 if tenant == 0 else 0)


async def test_what_tenants_have_is_counted_by_their_names(bench):
    values = bench.management.stats()
    assert {name: value for name, value in values.items() if "tenant" in name} == {
        'kvray_cache_tenant_bytes{tenant="acme",tier="device"}': 3.0 * bench.shared.layout.block_bytes,
        'kvray_cache_tenant_bytes{tenant="globex",tier="device"}': 0.0,
    }


async def test_its_counters_are_numbers_by_name(bench):
    values = bench.management.stats()
    assert (values["kvray_cache_blocks_held"], values["kvray_blocks"], values["kvray_blocks_pinned"]) == (5, 8, 1)
    assert all(isinstance(value, float) for value in values.values())
