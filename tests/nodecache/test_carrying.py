"""What is carried out of a node cache's tiers, into its arena, and from one tier to another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvcache.names import split_names
from messages.cache import PIECE_BYTES, CollectGarbage, FetchBlocks, MoveBlocks, PutBlocks
from messages.errors import ErrorInfo
from nodecache.store import Collected, StoredBlock, StoreError
from tests.nodecache.blocks import BLOCK_BYTES, BLOCK_SIZE, FINGERPRINT, checksum, checksum_of, content_of, names_of
from tests.nodecache.test_management import World


def fetch(world, tier, names):
    return world.ask(FetchBlocks(query_id="q", tier=tier, names=b"".join(names)))


def move(world, source, target, names, **fields):
    """All that became of it, in pieces."""
    question = MoveBlocks(query_id="q", tier=source, target=target, names=b"".join(names), **fields)
    return world.all(question)


def put(world, blocks, **fields):
    wanted = {
        "query_id": "q",
        "fingerprint": FINGERPRINT,
        "layout_version": 1,
        "kernel_path": "",
        "first_index": 0,
        "block_size": BLOCK_SIZE,
        "names": b"".join(blocks),
        "checksums": np.array([checksum_of(name) for name in blocks], "<u8").tobytes(),
        "data": memoryview(b"".join(map(content_of, blocks))),
    }
    return world.ask(PutBlocks(**wanted | fields))


def on_disk(world) -> list[bytes]:
    return list(world.disk.names())


# ------------------------------------------------------------------------------------------------------------------ out


def test_blocks_are_read_out_of_either_tier_in_the_order_wanted():
    names = names_of(range(6))
    world = World(64, names)
    world.write(names[:3])
    for tier, held in (("host", names[:3]), ("disk", names)):
        wanted = [*reversed(names), *names_of([77])]
        came = fetch(world, tier, wanted)
        assert (came.query_id, came.layout_version, came.error) == ("q", 1, None)
        assert split_names(came.names) == list(reversed(held))
        assert bytes(came.data) == b"".join(content_of(name) for name in reversed(held))
        assert np.frombuffer(came.checksums, "<u8").tolist() == [checksum_of(name) for name in reversed(held)]
    assert fetch(world, "remote", names).names == b""
    assert world.pool.num_used == 0


@pytest.mark.slow
def test_no_more_than_a_piece_is_read_out():
    count = PIECE_BYTES // BLOCK_BYTES
    world = World(64, names_of(range(count + 5)))
    assert split_names(fetch(world, "disk", names_of(range(count + 5))).names) == names_of(range(count))


def test_what_is_damaged_or_reused_meanwhile_is_not_read_out():
    names = names_of(range(3))
    world = World(3, names)
    world.write(names)
    world.damage(names[1])
    world.disk.damage(names[2])
    assert split_names(fetch(world, "host", names).names) == [names[0], names[2]]
    assert split_names(fetch(world, "disk", names).names) == names[:2]
    assert world.events()["disk"] == (b"", names[2])  # the store dropped it
    world.between = lambda: world.write(names_of(range(10, 13)))
    came = fetch(world, "host", names)  # copied before it was evicted: whole all the same
    assert bytes(came.data[:BLOCK_BYTES]) == content_of(names[0])


def test_a_store_that_fails_says_so():
    names = names_of(range(2))
    world = World(64, names)
    world.disk.error = StoreError("no answer")
    assert fetch(world, "disk", names).error.message == "no answer"
    [done] = move(world, "disk", "host", names)
    assert (done.error.message, done.num_done) == ("no answer", 0)
    assert on_disk(world) == names


# ------------------------------------------------------------------------------------------------------------------- in


def test_blocks_are_put_in_read_again_and_written_down():
    world = World()
    names = names_of(range(4))
    done = put(world, names, tenant=7, first_index=2)
    assert (done.num_done, done.num_tokens, done.error) == (4, 4 * BLOCK_SIZE, None)
    rows = world.pool.records(world.pool.find(b"".join(names)))
    assert rows["index"].tolist() == [2, 3, 4, 5]
    assert set(rows["tenant"].tolist()) == {7}
    assert bytes(fetch(world, "host", names).data) == b"".join(map(content_of, names))
    assert on_disk(world) == names
    events = world.events()
    assert split_names(events["host"][0]) == split_names(events["disk"][0]) == names


def test_more_can_be_put_in_than_the_arena_holds_where_there_is_a_disk():
    world = World(8)
    for begin in range(0, 24, 4):
        assert put(world, names_of(range(begin, begin + 4)), first_index=begin).num_done == 4
    assert on_disk(world) == names_of(range(24))
    assert world.pool.num_held == 8


def test_where_there_is_no_store_a_prefix_that_the_arena_does_not_hold_is_refused():
    world = World(8, has_disk=False)
    assert put(world, names_of(range(4)), first_index=4).num_done == 4
    done = put(world, names_of(range(8, 12)), first_index=8)
    assert "host memory has room for 8 here, and there is no store below" in done.error.message
    assert world.pool.num_held == 4


def test_a_disk_that_cannot_be_written_is_told_and_costs_nothing_of_what_is_in_the_arena():
    world = World()
    names = names_of(range(4))
    world.disk.error = StoreError("the disk is full")
    done = put(world, names)
    assert (done.num_done, done.num_failed, world.held(names)) == (4, 0, names)
    assert (done.error.kind, done.error.message) == ("StoreError", "the disk is full")
    done = put(world, names_of(range(4, 8)), first_index=4)
    assert (done.num_done, done.error) == (4, None)
    assert world.cache.tiers["disk"].num_failed == 1  # it is left alone: nobody waits for it again and again
    world.disk.error = None
    world.now_s += 1
    [write] = world.cache.writing_down.begin(world.now_s)
    assert [block.name for block in write.blocks] == names


def test_what_is_here_already_stays_and_counts():
    world = World()
    names = names_of(range(4))
    world.write(names[:2])
    assert put(world, names).num_done == 4
    assert put(world, names).num_done == 4
    assert world.pool.num_held == 4


def test_of_a_piece_with_one_altered_block_nothing_is_kept():
    world = World()
    names = names_of(range(4))
    data = bytearray(b"".join(map(content_of, names)))
    data[3 * BLOCK_BYTES - 1] ^= 1
    done = put(world, names, data=memoryview(data), first_index=10)
    assert isinstance(done.error, ErrorInfo)
    assert "block 12: its bytes do not have its checksum" in done.error.message
    assert (done.num_done, world.pool.num_held, world.pool.num_free) == (0, 0, 64)
    world.cache.check_invariants()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fingerprint": b"another"}, "fingerprint of the blocks: got 616e6f74686572, want "),
        ({"layout_version": 2}, "layout version of the blocks: got 2, want 1"),
        ({"kernel_path": "fma"}, "kernel path of the blocks: got fma, want "),
        ({"names": b"x" * 31}, "31, 16"),
        ({"checksums": b""}, "0, 512) bytes"),
        ({"data": memoryview(b"short")}, "5) bytes"),
        ({"names": b"", "checksums": b"", "data": memoryview(b"")}, "for each of 1 to"),
        ({"first_index": -1}, "-1 as the first"),
        ({"first_index": 2**32 - 1}, "as the first"),
        ({"block_size": 0}, "of 0 tokens"),
    ],
)
def test_what_are_no_blocks_of_this_model_is_refused_with_the_reason(fields, words):
    world = World()
    done = put(world, names_of(range(2)), **fields)
    assert words in done.error.message
    assert world.pool.num_held == 0


@pytest.mark.parametrize("has_disk", [False, True])
def test_what_is_put_in_makes_room_by_worth_and_never_takes_what_is_used(has_disk):
    world = World(8, has_disk=has_disk)
    used, cold = names_of(range(3)), names_of(range(10, 15))
    world.write(used, is_pinned=True)
    world.write(cold)
    done = put(world, names_of(range(20, 28)))
    assert (done.num_done, done.num_without_room, done.num_below) == ((8, 0, {"disk": 3}) if has_disk else (5, 3, {}))
    assert done.num_tokens == done.num_done * BLOCK_SIZE
    assert world.held([*used, *cold]) == used
    assert world.held(names_of(range(20, 28))) == names_of(range(20, 25))  # heads
    assert on_disk(world) == (names_of(range(20, 28)) if has_disk else [])


def full_world(**fields) -> World:
    """One whose arena takes nothing in: all of it is used."""
    world = World(2, **fields)
    world.write(names_of(range(90, 92)), is_pinned=True)
    return world


def refused(done) -> tuple[int, int, int]:
    return done.num_without_room, done.num_above_quota, done.num_failed


def test_what_no_tier_takes_in_is_told_with_the_reason():
    names = names_of(range(4))
    world = full_world(has_disk=False)
    assert refused(put(world, names[:2])) == (2, 0, 0)
    world = full_world(quotas={7: 3})
    done = put(world, names, tenant=7)
    assert (done.num_done, done.num_below, refused(done)) == (3, {"disk": 3}, (0, 1, 0))
    assert on_disk(world) == names[:3]
    world = full_world()
    world.disk.error = StoreError("the disk is full")
    done = put(world, names)
    assert (done.num_done, done.error.message, refused(done)) == (0, "the disk is full", (0, 0, 4))
    done = put(world, names)  # the disk is left alone: nobody waits for it
    assert (done.num_done, done.error, refused(done)) == (0, None, (0, 0, 4))
    world.disk.error = None
    world.now_s += 10
    assert put(world, names).num_below == {"disk": 4}


def test_what_the_nearest_store_does_not_take_in_goes_to_the_one_below_it():
    names = names_of(range(4))
    for quotas, error, below in (
        ({7: 1}, None, {"disk": 1, "remote": 3}),
        ({}, StoreError("the disk is full"), {"remote": 4}),
    ):
        world = full_world(quotas=quotas, has_remote=True)
        world.disk.error = error
        done = put(world, names, tenant=7)
        assert (done.num_done, done.num_below, refused(done)) == (4, below, (0, 0, 0))
        assert done.error == (error and error.info())
        assert list(world.remote.names()) == names[4 - below["remote"] :]
        assert world.events()["remote"] == (b"".join(names[4 - below["remote"] :]), b"")
    both = World(64, has_remote=True)
    put(both, names)
    assert (on_disk(both), list(both.remote.names())) == (names, [])


def test_blocks_go_into_the_tiers_that_are_wanted_and_into_no_others():
    names = names_of(range(4))
    world = World(64, names[:1], has_remote=True)
    done = put(world, names, tiers=("disk",))
    assert (done.num_done, done.num_below, world.held(names), on_disk(world)) == (4, {}, [], names)
    assert split_names(world.events()["disk"][0]) == names[1:]
    done = put(world, names, tiers=("remote",))
    assert (done.num_done, done.num_below, list(world.remote.names())) == (4, {}, names)
    full = full_world()
    done = put(full, names[:2], tiers=("host",))
    assert (done.num_done, refused(done), on_disk(full)) == (0, (2, 0, 0), [])
    for tiers in ((), ("device",), ("remote",)):
        done = put(full, names, tiers=tiers)
        assert "want one of those that are here: host, disk" in done.error.message


def test_what_goes_to_a_store_only_is_verified_before():
    world = full_world()
    names = names_of(range(4))
    data = bytearray(b"".join(map(content_of, names)))
    data[-1] ^= 1
    done = put(world, names, data=memoryview(data))
    assert "block 3: its bytes do not have its checksum" in done.error.message
    assert (done.num_done, refused(done), on_disk(world)) == (0, (0, 0, 0), [])


def test_a_block_that_a_worker_writes_meanwhile_is_held_once():
    world = World()
    names = names_of(range(2))
    world.between = lambda: world.held(names) or world.write(names[:1])
    assert put(world, names).num_done == 2
    assert (world.pool.num_held, world.pool.num_free) == (2, 64)
    world.cache.check_invariants()


# --------------------------------------------------------------------------------------------------------------- moving


def test_blocks_are_moved_down_and_up_again():
    names = names_of(range(20))
    world = World()
    world.write(names)
    world.events()
    assert sum(done.num_done for done in move(world, "host", "disk", names)) == 20
    assert (world.held(names), on_disk(world)) == ([], names)
    assert world.disk.num_syncs > 0, "what lies nowhere else is there for good"
    events = world.events()
    assert (split_names(events["disk"][0]), set(split_names(events["host"][1]))) == (names, set(names))
    assert sum(done.num_tokens for done in move(world, "disk", "host", names)) == 20 * BLOCK_SIZE
    assert (world.held(names), on_disk(world)) == (names, [])
    assert bytes(fetch(world, "host", names).data) == b"".join(map(content_of, names))
    assert world.pool.records(world.pool.find(b"".join(names)))["index"].tolist() == list(range(20))


def test_a_block_that_was_written_anew_before_it_was_read_is_not_carried_with_the_checksum_of_before():
    [name] = names_of([0])
    world = World(64, [name])
    do, versions = world.worker.do, itertools.count(1)

    def write_anew_first(work):
        other = memoryview(bytes([next(versions)]) * BLOCK_BYTES)
        world.disk.write([StoredBlock(name, BLOCK_SIZE, checksum(other))], [other], 1.0)
        return do(work)

    world.worker.do = write_anew_first
    assert fetch(world, "disk", [name]).names == b""
    [done] = move(world, "disk", "host", [name])
    assert (done.num_done, done.error, world.held([name]), on_disk(world)) == (0, None, [], [name])
    world.worker.do = do
    assert fetch(world, "disk", [name]).names == name


def test_what_is_above_a_quota_at_the_target_stays_and_is_told():
    names = names_of(range(5))
    world = World(quotas={7: 3})
    world.write(names, tenant=7)
    [done] = move(world, "host", "disk", names)
    assert (done.num_done, refused(done)) == (3, (0, 2, 0))
    assert (world.held(names), on_disk(world)) == (names[3:], names[:3])


def test_what_the_target_has_already_is_only_dropped_at_its_source():
    names = names_of(range(4))
    world = World(64, names[:2])
    world.write(names)
    num_writes = world.disk.num_writes
    [done] = move(world, "host", "disk", names)
    assert (done.num_done, world.held(names), on_disk(world)) == (4, [], names)
    assert world.disk.num_writes == num_writes + 1
    [again] = move(world, "host", "disk", names)
    assert again.num_done == 0


def test_to_warm_is_to_move_up_and_keep_what_lies_below():
    names = names_of(range(4))
    world = World(64, names)
    world.write(names[:1])
    [done] = move(world, "disk", "host", names, keeps_source=True)
    assert (done.num_done, done.num_tokens) == (3, 3 * BLOCK_SIZE)
    assert world.held(names) == on_disk(world) == names
    [again] = move(world, "disk", "host", names, keeps_source=True)
    assert again.num_done == 0


def test_what_somebody_uses_is_copied_and_stays():
    names = names_of(range(3))
    world = World()
    world.write(names[:1], is_pinned=True)
    world.write(names[1:])
    [done] = move(world, "host", "disk", names)
    assert (done.num_done, done.num_in_use) == (2, 1)
    assert (world.held(names), on_disk(world)) == (names[:1], names)


def test_what_does_not_come_whole_is_moved_nowhere():
    names = names_of(range(3))
    world = World(64, names)
    world.disk.damage(names[1])
    [done] = move(world, "disk", "host", names)
    assert (done.num_done, world.held(names), on_disk(world)) == (2, [names[0], names[2]], [])
    world.damage(names[0])
    [done] = move(world, "host", "disk", names)
    assert (done.num_done, world.held(names), on_disk(world)) == (1, names[:1], names[2:])


def test_a_store_that_cannot_be_written_leaves_all_where_it_was():
    names = names_of(range(2))
    world = World()
    world.write(names)
    world.disk.error = StoreError("the disk is full")
    [done] = move(world, "host", "disk", names)
    assert (done.error.message, done.num_done, world.held(names)) == ("the disk is full", 0, names)
    assert refused(done) == (0, 0, 2)


def test_without_room_above_it_stays_below():
    names = names_of(range(4))
    world = World(4, names)
    world.write(names_of(range(10, 13)), is_pinned=True)
    [done] = move(world, "disk", "host", names)
    assert (done.num_done, done.num_below, refused(done)) == (1, {}, (3, 0, 0))
    assert (world.held(names), on_disk(world)) == (names[:1], names[1:])


@pytest.mark.parametrize("keeps_source", [False, True])
def test_without_room_above_it_comes_up_as_far_as_there_is_room(keeps_source):
    names = names_of(range(4))
    world = World(4, quotas={7: 2}, has_remote=True)
    world.remote.write(
        [StoredBlock(name, BLOCK_SIZE, checksum_of(name), 7) for name in names],
        [memoryview(content_of(name)) for name in names],
        1.0,
    )
    world.write(names_of(range(10, 13)), is_pinned=True)
    [done] = move(world, "remote", "host", names, keeps_source=keeps_source)
    assert (done.num_done, done.num_tokens, done.num_below, refused(done)) == (3, 48, {"disk": 2}, (0, 1, 0))
    assert (world.held(names), on_disk(world)) == (names[:1], names[1:3])
    assert list(world.remote.names()) == (names if keeps_source else names[3:])
    assert (world.disk.num_syncs > 0) is not keeps_source


def test_a_tier_that_is_not_there_is_an_error_only_as_a_target():
    world = World()
    world.write(names_of(range(2)))
    [done] = move(world, "host", "remote", names_of(range(2)))
    assert done.error.message == "there is no remote tier here"
    [done] = move(world, "remote", "host", names_of(range(2)))
    assert (done.error, done.num_done) == (None, 0)
    [done] = move(world, "host", "host", names_of(range(2)))
    assert (done.error, done.num_done) == (None, 0)


# ----------------------------------------------------------------------------------------------------------- collecting


def test_garbage_is_collected_as_long_as_the_store_has_more(monkeypatch):
    world = World()
    answers = [(1, 100, True), (2, 200, False)]
    monkeypatch.setattr(world.disk, "collect", lambda deadline_s: Collected(*answers.pop(0)))
    done = world.all(CollectGarbage(query_id="q", tier="disk"))
    assert [(one.num_freed_files, one.num_freed_bytes) for one in done] == [(1, 100), (2, 200)]
    assert world.ask(CollectGarbage(query_id="q", tier="remote")).num_freed_files == 0


def test_a_store_that_cannot_be_collected_says_so():
    world = World()
    world.disk.error = StoreError("no answer")
    assert world.ask(CollectGarbage(query_id="q", tier="disk")).error.message == "no answer"
