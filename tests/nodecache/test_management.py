"""What a node cache lists, drops, keeps and verifies when it is told to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvcache.names import split_names
from messages.cache import BlocksListed, CheckBlocks, ClearBlocks, KeepBlocks, ListBlocks, PieceDone
from nodecache.cache import CacheLimits, NodeCache, Tell
from nodecache.long_work import LongWorker
from nodecache.loopback import LoopbackStore
from nodecache.management import Answer, Asked, Management
from nodecache.pool import Written, as_names
from nodecache.quotas import Accounts
from nodecache.reading import ReadBlocks
from nodecache.store import StoredBlock, StoreError
from nodecache.writing_down import WriteBlocks
from tests.nodecache.blocks import BLOCK_BYTES, BLOCK_SIZE, checksum, checksum_of, content_of, names_of, pool_of


class World:
    """A node cache with a disk, and who manages it; the threads that its work wants are here."""

    def __init__(
        self, num_blocks: int = 64, stored=(), *, has_disk: bool = True, has_remote: bool = False, quotas=None, **limits
    ) -> None:
        """`quotas`: in blocks, of tenants on disk."""
        self.pool = pool_of(num_blocks)
        self.disk = LoopbackStore(100_000, checksum, Accounts(quotas))
        blocks = [StoredBlock(name, BLOCK_SIZE, checksum_of(name)) for name in stored]
        self.disk.write(blocks, [memoryview(content_of(name)) for name in stored], 1.0)
        limits = {"lease_s": 10.0, "batch_bytes": 4 * BLOCK_BYTES} | limits
        self.remote = LoopbackStore(100_000, checksum)
        stores = ({"disk": self.disk} if has_disk else {}) | ({"remote": self.remote} if has_remote else {})
        self.cache = NodeCache(self.pool, stores, CacheLimits(**limits))
        self.management = Management(self.cache)
        self.now_s = 100.0
        self.worker = LongWorker(self.pool.arena, stores)
        self.between = lambda: None  #: what happens when long work is done, before its outcome is known

    def write(self, names, tenant=0, *, is_pinned=False) -> None:
        count = len(names)
        block_ids = self.pool.take([63] * count, self.now_s, tenant)
        assert len(block_ids) == count
        for block_id, name in zip(block_ids.tolist(), names, strict=True):
            self.pool.arena.block(block_id)[:] = content_of(name)
        written = Written(
            block_ids,
            as_names(b"".join(names)),
            np.array([checksum_of(name) for name in names], np.uint64),
            np.full(count, BLOCK_SIZE, np.uint32),
            np.arange(count, dtype=np.uint32),
        )
        assert self.pool.commit(written, np.ones(count, np.uint32), self.now_s).all()
        if not is_pinned:
            self.pool.unpin(block_ids)

    def damage(self, name) -> None:
        [block_id] = self.pool.find(name).tolist()
        self.pool.arena.block(block_id)[0] ^= 1

    def ask(self, question):
        """The answer, once all that it wants done was done."""
        pending = list(self.management.on_event(Asked(b"m", question), self.now_s))
        while True:
            work = pending.pop(0)
            match work:
                case Answer(asker, message):
                    assert (asker, pending) == (b"m", [])
                    self.pool.check_invariants()
                    return message
                case ReadBlocks() | WriteBlocks() | Tell():
                    continue  # the cache's own
                case _:
                    event = self.worker.do(work)
                    self.between()
            pending += self.management.on_event(event, self.now_s)

    def all(self, question) -> list:
        """The answers to all its pieces."""
        answers = [self.ask(question)]
        while answers[-1].next_cursor is not None:
            fields = {name: getattr(question, name) for name in question.__struct_fields__}
            answers.append(self.ask(type(question)(**fields | {"cursor": answers[-1].next_cursor})))
        return answers

    def held(self, names) -> list[bytes]:
        return [name for name in names if self.pool.find(name)[0] >= 0]

    def events(self) -> dict[str, tuple[bytes, bytes]]:
        return {tier: (stored, removed) for tier, stored, removed in self.cache.take_events()}


def clear(tier="host", **fields) -> ClearBlocks:
    return ClearBlocks(query_id="q", tier=tier, **{"is_dry_run": False} | fields)


def listed_names(answers) -> list[bytes]:
    return [name for answer in answers for name in split_names(answer.names)]


# -------------------------------------------------------------------------------------------------------------- listing


def test_what_the_arena_holds_is_listed_with_all_that_is_known_of_it():
    world = World()
    names = names_of(range(3))
    world.write(names[:2], tenant=7)
    world.write(names[2:], is_pinned=True)
    world.ask(KeepBlocks(query_id="q", names=names[0], ttl_s=30.0))
    world.now_s += 5.0
    found = world.pool.find(names[1])
    world.pool.see(found, world.now_s)
    [answer] = world.all(ListBlocks(query_id="q", tier="host"))
    assert isinstance(answer, BlocksListed)
    assert (answer.query_id, answer.num_blocks, answer.layout_version) == ("q", 3, 1)
    assert split_names(answer.names) == names
    assert np.frombuffer(answer.places, "<u8").tolist() == world.pool.find(b"".join(names)).tolist()
    assert np.frombuffer(answer.num_tokens, "<u4").tolist() == [BLOCK_SIZE] * 3
    assert np.frombuffer(answer.checksums, "<u8").tolist() == [checksum_of(name) for name in names]
    assert np.frombuffer(answer.tenants, "<u8").tolist() == [7, 7, 0]
    assert np.frombuffer(answer.num_pins, "<i4").tolist() == [0, 0, 1]
    assert np.frombuffer(answer.kept_s, "<f8").tolist() == [25.0, 0.0, 0.0]
    assert np.frombuffer(answer.num_hits, "<u4").tolist() == [0, 1, 0]
    assert np.frombuffer(answer.age_s, "<f8").tolist() == [5.0, 0.0, 5.0]


def test_a_large_arena_and_a_large_store_are_listed_in_pieces_each_block_once():
    stored = names_of(range(3000), "disk")
    world = World(10_000, stored)
    names = names_of(range(9000))
    world.write(names)
    answers = world.all(ListBlocks(query_id="q", tier="host"))
    assert sorted(listed_names(answers)) == sorted(names)
    assert [answer.num_blocks for answer in answers] == [4096, 4096, 808]
    below = world.all(ListBlocks(query_id="q", tier="disk"))
    assert listed_names(below) == stored
    assert max(answer.num_blocks for answer in below) <= 512
    assert not below[0].age_s


def test_a_tier_that_is_not_there_holds_nothing():
    world = World()
    assert world.ask(ListBlocks(query_id="q", tier="remote")).num_blocks == 0
    assert world.ask(clear("remote")) == PieceDone(query_id="q")
    assert world.ask(clear("remote", names=names_of([1])[0])) == PieceDone(query_id="q")
    assert world.ask(CheckBlocks(query_id="q", tier="remote")) == PieceDone(query_id="q")


@pytest.mark.parametrize("cursor", [-5, 63, 64, 10**15])
def test_a_cursor_that_is_nowhere_ends_it(cursor):
    world = World(64, names_of(range(3)))
    world.write(names_of(range(3)))
    for tier in ("host", "disk"):
        assert world.all(ListBlocks(query_id="q", tier=tier, cursor=cursor))[-1].next_cursor is None


# ------------------------------------------------------------------------------------------------------------- clearing


def test_a_dry_run_says_what_would_go_and_drops_nothing():
    names = names_of(range(4))
    world = World(64, names)
    world.write(names)
    world.events()
    for tier in ("host", "disk"):
        done = world.ask(clear(tier, is_dry_run=True))
        assert (done.num_done, done.num_tokens, done.num_in_use) == (4, 4 * BLOCK_SIZE, 0)
    assert world.held(names) == list(world.disk.names()) == names
    assert (world.events(), world.disk.num_syncs) == ({}, 0)


def test_blocks_by_name_go_and_the_router_hears_of_it():
    names = names_of(range(4))
    world = World(64, names)
    world.write(names)
    world.events()
    wanted = b"".join([*names[:2], *names_of([77])])
    assert world.ask(clear(names=wanted)).num_done == 2
    assert world.ask(clear("disk", names=wanted)).num_done == 2
    assert world.held(names) == list(world.disk.names()) == names[2:]
    assert {tier: (stored, sorted(split_names(removed))) for tier, (stored, removed) in world.events().items()} == {
        "host": (b"", sorted(names[:2])),
        "disk": (b"", sorted(names[:2])),
    }


def test_everything_goes_in_pieces_and_the_disk_is_synced_once_at_the_end():
    stored = names_of(range(2500), "disk")
    world = World(5000, stored)
    world.write(names_of(range(3000)))
    assert sum(done.num_done for done in world.all(clear())) == 3000
    assert (world.pool.num_held, world.pool.num_free) == (0, 5000)
    assert sum(done.num_done for done in world.all(clear("disk"))) == 2500
    assert list(world.disk.names()) == []
    assert world.disk.num_syncs == 1
    assert world.management.stats()['kvray_cache_cleared_total{tier="disk"}'] == 2500


def test_names_that_come_in_parts_are_synced_after_the_last():
    names = names_of(range(2))
    world = World(64, names)
    world.ask(clear("disk", names=names[0], is_last=False))
    assert world.disk.num_syncs == 0
    world.ask(clear("disk", names=names[1]))
    assert world.disk.num_syncs == 1


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_of_every_tier_one_tenants_blocks_are_listed_and_go(tier):
    world = World()
    names = names_of(range(4))
    world.write(names[:2], 7)
    world.write(names[2:], 2**64 - 1)
    rows = [
        (name, BLOCK_SIZE, checksum_of(name), tenant) for name, tenant in zip(names, [7, 7, 2**64 - 1, 0], strict=True)
    ]
    world.disk.write([StoredBlock(*row) for row in rows], [memoryview(content_of(name)) for name in names], 1.0)
    assert listed_names(world.all(ListBlocks(query_id="q", tier=tier, tenant=7))) == names[:2]
    assert world.ask(clear(tier, tenant=7)).num_done == 2
    assert listed_names(world.all(ListBlocks(query_id="q", tier=tier))) == names[2:]
    assert world.ask(clear(tier, tenant=7, names=names[3])).num_done == 0


def test_what_somebody_uses_stays_and_is_counted_and_what_a_pin_keeps_goes():
    world = World()
    names = names_of(range(3))
    world.write(names[:1], is_pinned=True)
    world.write(names[1:])
    world.ask(KeepBlocks(query_id="q", names=names[1], ttl_s=math.inf))
    done = world.ask(clear())
    assert (done.num_done, done.num_in_use) == (2, 1)
    assert world.held(names) == names[:1]


def test_eviction_spares_what_a_pin_keeps_until_it_ends():
    world = World()
    names = names_of(range(3))
    world.write(names)
    world.ask(KeepBlocks(query_id="q", names=names[1], ttl_s=60.0))
    would = world.ask(clear(spares_kept=True, is_dry_run=True))
    did = world.ask(clear(spares_kept=True))
    assert (would.num_done, would.num_in_use) == (did.num_done, did.num_in_use) == (2, 1)
    assert world.held(names) == names[1:2]
    world.now_s += 61.0
    assert world.ask(clear(spares_kept=True)).num_done == 1


def test_what_was_cleared_can_be_written_again_and_is_told_as_new():
    world = World(4)
    names = names_of(range(4))
    world.write(names)
    world.events()
    world.ask(clear())
    world.write(names)
    assert world.events() == {}  # gone and back between two looks
    world.ask(clear())
    world.events()
    world.write(names)
    assert sorted(split_names(world.events()["host"][0])) == sorted(names)


def test_a_disk_that_fails_to_sync_is_told_though_the_blocks_are_dropped():
    world = World(64, names_of(range(2)))
    world.disk.error = StoreError("the disk is read-only")
    done = world.ask(clear("disk"))
    assert (done.num_done, done.error.message) == (2, "the disk is read-only")


# -------------------------------------------------------------------------------------------------------------- keeping


def test_a_prompts_blocks_are_kept_until_their_time_is_over_or_they_are_unpinned():
    world = World(16)
    names = names_of(range(4))
    world.write(names)
    done = world.ask(KeepBlocks(query_id="q", names=b"".join([*names, *names_of([9])]), ttl_s=60.0, priority=2))
    assert (done.num_done, done.num_tokens) == (4, 4 * BLOCK_SIZE)
    assert world.pool.num_hinted(world.now_s) == 4
    assert world.pool.records(world.pool.find(names[0]))["priority"].tolist() == [2]
    assert world.pool.num_hinted(world.now_s + 61.0) == 0
    assert world.ask(KeepBlocks(query_id="q", names=names[0], ttl_s=0.0)).num_done == 1
    assert world.pool.num_hinted(world.now_s) == 3


def test_no_more_than_half_of_the_arena_is_kept_heads_first():
    world = World(16)
    names = names_of(range(12))
    world.write(names)
    assert world.ask(KeepBlocks(query_id="q", names=b"".join(names), ttl_s=math.inf)).num_done == 8
    kept = world.pool.records(world.pool.find(b"".join(names)))["pinned_until_s"]
    assert np.isinf(kept).tolist() == [True] * 8 + [False] * 4


@pytest.mark.parametrize("ttl_s", [-1.0, math.nan])
def test_a_time_that_is_none_keeps_nothing(ttl_s):
    world = World(16)
    world.write(names_of(range(2)))
    world.ask(KeepBlocks(query_id="q", names=names_of([0])[0], ttl_s=ttl_s))
    assert world.pool.num_hinted(world.now_s) == 0


# ------------------------------------------------------------------------------------------------------------- checking


def test_damaged_blocks_are_found_in_either_tier_dropped_and_counted():
    names = names_of(range(10))
    world = World(64, names)
    world.write(names)
    world.damage(names[3])
    world.disk.damage(names[5])
    world.events()
    for tier, bad in (("host", names[3]), ("disk", names[5])):
        answers = world.all(CheckBlocks(query_id="q", tier=tier))
        assert len(answers) > 1  # a few MiB at a time
        assert sum(done.num_done for done in answers) == 10
        assert sum(done.num_damaged for done in answers) == 1
        assert {done.num_held for done in answers} <= {9, 10}
        assert world.events() == {tier: (b"", bad)}
        assert sum(done.num_damaged for done in world.all(CheckBlocks(query_id="q", tier=tier))) == 0
    assert world.management.stats()['kvray_cache_damaged_total{tier="host"}'] == 1
    assert world.management.stats()['kvray_cache_damaged_total{tier="disk"}'] == 1


def test_a_prompts_blocks_are_checked_by_name():
    names = names_of(range(4))
    world = World(64, names)
    world.write(names)
    world.damage(names[0])
    for tier in ("host", "disk"):
        done = world.ask(CheckBlocks(query_id="q", tier=tier, names=b"".join([*names[1:3], *names_of([77])])))
        assert (done.num_done, done.num_damaged, done.num_held) == (2, 0, 2)  # and not how much there is of others


def test_a_block_that_was_reused_while_it_was_verified_is_not_dropped():
    world = World(1)
    [old, new] = names_of(range(2))
    world.write([old])
    world.damage(old)
    world.between = lambda: world.write([new])
    done = world.ask(CheckBlocks(query_id="q", tier="host"))
    assert (done.num_done, done.num_damaged) == (0, 0)
    assert world.held([old, new]) == [new]


def test_a_damaged_block_that_somebody_reads_stays_for_now_and_is_told():
    world = World()
    [name] = names_of([0])
    world.write([name], is_pinned=True)
    world.damage(name)
    done = world.ask(CheckBlocks(query_id="q", tier="host"))
    assert (done.num_damaged, done.num_in_use) == (1, 1)
    world.pool.unpin(world.pool.find(name))
    assert world.ask(CheckBlocks(query_id="q", tier="host")).num_in_use == 0
    assert world.held([name]) == []


def test_a_store_that_fails_is_told_and_nothing_is_dropped():
    names = names_of(range(2))
    world = World(64, names)
    world.disk.error = StoreError("no answer")
    done = world.ask(CheckBlocks(query_id="q", tier="disk"))
    assert (done.error.message, done.num_done, done.num_damaged) == ("no answer", 0, 0)
    assert list(world.disk.names()) == names
