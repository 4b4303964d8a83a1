"""What the decider decides, one decision after the other."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvcache.leases import AskerLost, TimePassed
from kvcache.locations import BlockLocation, each_location, num_locations, pack_locations
from messages.handoff import (
    LOCATION_BYTES,
    BlockHint,
    BlocksRequest,
    BlocksWritten,
    KvHandoff,
    ReleaseLease,
    RenewLease,
    RoomGranted,
    RoomRequest,
)
from nodecache.cache import BlocksKept, BlocksRead, CacheLimits, Hinted, NodeCache, Said, Tell
from nodecache.loopback import LoopbackStore
from nodecache.pool import as_names
from nodecache.quotas import Accounts
from nodecache.reading import ReadBlocks
from nodecache.store import StoredBlock
from nodecache.writing_down import WriteBlocks
from tests.nodecache.blocks import BLOCK_BYTES, BLOCK_SIZE, checksum, checksum_of, content_of, names_of, pool_of

LEASE_S = 10.0


class World:
    """A node cache and one worker that does what it says it does; stores do what they are asked when told to."""

    def __init__(self, num_blocks: int, stores=None, quotas=None, **limits) -> None:
        self.pool = pool_of(num_blocks, accounts=Accounts(quotas))
        self.stores = stores or {}
        options = {"lease_s": LEASE_S, "batch_bytes": 4 * BLOCK_BYTES, "read_deadline_s": 3.0} | limits
        self.cache = NodeCache(self.pool, self.stores, CacheLimits(**options))
        self.now_s = 0.0
        self.pending: list[ReadBlocks | WriteBlocks] = []

    def post(self, event):
        """Messages told; reads and writes are kept in `pending`."""
        told = []
        for instruction in self.cache.on_event(event, self.now_s):
            if isinstance(instruction, Tell):
                told.append(instruction.message)
            else:
                self.pending.append(instruction)
        self.cache.check_invariants()
        return told

    def say(self, message, asker=b"w"):
        return self.post(Said(asker, message))

    def room(self, names, begin=0, request_id="r", asker=b"w", **options) -> RoomGranted:
        indexes = list(range(begin, begin + len(names)))
        message = RoomRequest(request_id=request_id, names=b"".join(names), indexes=indexes, **options)
        [granted] = self.say(message, asker)
        return granted

    def written(self, granted, asker=b"w", **changes):
        blocks = []
        for location in each_location(granted.blocks):
            self.pool.arena.block(location.block_id)[:] = content_of(location.name)
            fields = msgspec.structs.asdict(location)
            blocks.append(
                BlockLocation(**fields | {"num_tokens": BLOCK_SIZE, "checksum": checksum_of(location.name)} | changes)
            )
        self.say(BlocksWritten(request_id=granted.request_id, blocks=pack_locations(blocks)), asker)

    def write(self, names, begin=0, tenant=0) -> list[bytes]:
        granted = self.room(names, begin, tenant=tenant)
        self.written(granted)
        return [location.name for location in each_location(granted.blocks)]

    def ask(self, names, request_id="q", asker=b"a", **options) -> list[KvHandoff]:
        return self.say(
            BlocksRequest(request_id=request_id, names=b"".join(names), **{"first_index": 0} | options), asker
        )

    def release(self, request_id="q", asker=b"a"):
        self.say(ReleaseLease(request_id=request_id), asker)

    def held(self, names) -> list[bytes]:
        return [name for name in names if self.pool.find(name)[0] >= 0]

    def move(self, *, failing=False):
        """Let the stores do all that is pending."""
        told = []
        while self.pending:
            told += self.do(self.pending.pop(0), failing=failing)
        return told

    def do(self, instruction, *, failing=False):
        store = self.stores[instruction.tier]
        views = [self.pool.arena.block(block_id) for block_id in instruction.block_ids]
        match instruction:
            case ReadBlocks(read_id=read_id, names=names):
                return self.post(BlocksRead(read_id, None if failing else tuple(store.read(names, views, 1.0))))
            case WriteBlocks(write_id=write_id, blocks=blocks):
                return self.post(BlocksKept(write_id, None if failing else tuple(store.write(blocks, views, 1.0))))


def stored(names, tenant=0, quotas=None) -> LoopbackStore:
    store = LoopbackStore(1000, checksum, Accounts(quotas))
    blocks = [StoredBlock(name, BLOCK_SIZE, checksum_of(name), tenant) for name in names]
    store.write(blocks, [memoryview(content_of(name)) for name in names], 1.0)
    return store


def offered(handoffs) -> list[bytes]:
    return [location.name for handoff in handoffs for location in each_location(handoff.blocks)]


# ------------------------------------------------------------------------------------------------------------- writing


def test_room_is_granted_for_what_is_not_there_and_not_on_its_way():
    world = World(32)
    names = names_of(range(8))
    assert world.write(names[:2]) == names[:2]
    first = world.room(names[:4], request_id="first")
    assert [(b.name, b.index, b.num_tokens) for b in each_location(first.blocks)] == [
        (names[2], 2, 0),
        (names[3], 3, 0),
    ]
    second = world.room(names[:6], request_id="second", asker=b"x")
    assert [b.name for b in each_location(second.blocks)] == names[4:6]
    third = world.room(names[:6], request_id="third")
    assert (third.blocks, third.num_left) == (b"", 0)


def test_how_many_were_left_out_is_told():
    world = World(8)  # half of it is given out at a time
    granted = world.room(names_of(range(7)))
    assert (num_locations(granted.blocks), granted.num_left) == (4, 3)


def test_of_what_is_granted_what_was_not_written_is_free_at_once():
    world = World(32)
    granted = world.room(names_of(range(4)))
    part = RoomGranted(request_id=granted.request_id, blocks=granted.blocks[:LOCATION_BYTES])
    world.written(part)
    assert world.held(names_of(range(4))) == names_of([0])
    assert (world.pool.num_used, world.pool.num_quarantined) == (0, 0)


@pytest.mark.parametrize("changes", [{"generation": 5}, {"num_tokens": 0}, {"block_id": 31}, {"block_id": 2**32 - 1}])
def test_what_is_said_wrongly_is_not_taken_in(changes):
    world = World(32)
    granted = world.room(names_of([0]))
    world.written(granted, **changes)
    assert world.held(names_of([0])) == []
    assert world.pool.num_used == 0


def test_what_another_was_granted_is_nobody_elses_to_write():
    world = World(32)
    granted = world.room(names_of([0]))
    world.written(granted, asker=b"x")
    assert world.held(names_of([0])) == []
    assert world.pool.num_used == 1


@pytest.mark.parametrize("indexes", [[], [0], [0, 1, 2]])
def test_a_question_for_room_that_does_not_add_up_gets_none(indexes):
    world = World(32)
    names = b"".join(names_of(range(2)))
    [granted] = world.say(RoomRequest(request_id="r", names=names, indexes=indexes))
    assert granted.blocks == b""


def test_positions_out_of_range_do_no_harm():
    world = World(32)
    [granted] = world.say(
        RoomRequest(request_id="r", names=b"".join(names_of(range(2))), indexes=[-5, 2**60], tenant=-1)
    )
    world.written(granted)
    assert len(world.held(names_of(range(2)))) == 2


@pytest.mark.parametrize("first_index", [-(2**40), -1, 2**32 - 1, 2**60])
@pytest.mark.parametrize("rest", [b"", b"no name"])
def test_a_question_for_blocks_that_makes_no_sense_does_no_harm(first_index, rest):
    names = names_of(range(4))
    world = World(16, {"disk": stored(names[2:])})
    world.write(names[:2])
    handoffs = world.ask([*names, rest], first_index=first_index) + world.move()
    assert offered(handoffs) == names
    granted = world.room([*names_of(range(4, 6)), rest[:3]])
    assert num_locations(granted.blocks) in (0, 2)


def test_no_more_than_half_of_the_arena_is_being_written():
    world = World(32)
    assert num_locations(world.room(names_of(range(32))).blocks) == 16
    assert world.room(names_of(range(100, 132)), request_id="other").blocks == b""


def test_a_writer_that_is_lost_or_late_gives_its_room_back_through_quarantine():
    world = World(32, quarantine_s=15.0)
    world.room(names_of(range(2)), request_id="lost", asker=b"x")
    late = world.room(names_of(range(2, 4)), request_id="late")
    world.post(AskerLost(b"x"))
    assert world.pool.num_quarantined == 2
    world.now_s = LEASE_S + 1
    world.post(TimePassed())
    assert world.pool.num_quarantined == 4
    world.written(late)
    assert world.held(names_of(range(4))) == []
    world.now_s += 15
    world.post(TimePassed())
    assert world.pool.num_empty == 32


def test_a_writer_that_renews_keeps_its_room_and_one_that_releases_frees_it_at_once():
    world = World(32)
    granted = world.room(names_of(range(2)))
    for _ in range(3):
        world.now_s += LEASE_S * 0.9
        world.say(RenewLease(request_id="r"))
        world.post(TimePassed())
    world.written(granted)
    assert len(world.held(names_of(range(2)))) == 2
    world.room(names_of(range(10, 12)))
    world.say(ReleaseLease(request_id="r"))
    assert (world.pool.num_used, world.pool.num_quarantined) == (0, 0)


def test_the_tenant_of_a_block_is_kept_and_told_to_who_asks_for_the_block():
    world = World(32)
    world.written(world.room(names_of([0]), tenant=77))
    assert world.pool.records(world.pool.find(names_of([0])[0]))["tenant"].tolist() == [77]
    [handoff] = world.ask(names_of([0]))
    assert [block.tenant for block in each_location(handoff.blocks)] == [77]
    world.release()


# ---------------------------------------------------------------------------------------------------------- what stays


def test_a_second_sight_counts_and_outlives_newer_blocks_seen_once():
    world = World(16)
    twice = names_of(range(4), "twice")
    world.write(twice)
    for number in range(8):
        world.write(names_of(range(4), f"once {number}"))
    assert world.held(twice) == []
    remembered = [name for name in twice if world.pool.ghosts.seen(as_names(name))[0]]
    assert len(remembered) >= 2
    world.write(twice)
    assert world.cache.num_seen_again == len(remembered)
    for number in range(8, 11):
        world.write(names_of(range(4), f"once {number}"))
    assert set(world.held(twice)) >= set(remembered)


def seen(world, names) -> list[int]:
    """How often each was seen, as it counts in what it is worth."""
    return world.pool.records(world.pool.find(b"".join(names)))["num_sights"].tolist()


def test_who_asks_again_for_what_was_left_out_has_not_seen_it_twice():
    world = World(8)  # half of it is given out at a time
    names = names_of(range(7))
    world.written(world.room(names))
    world.written(world.room(names, is_again=True))
    assert (seen(world, names), world.cache.num_seen_again) == ([1] * 7, 0)


def test_what_was_left_out_is_seen_again_by_another_and_when_it_is_wanted_again():
    world = World(16)
    names = names_of(range(12))
    world.written(world.room(names))
    granted = world.room(names[8:10], begin=8, asker=b"x", is_again=True)  # which this one has not asked for before
    world.written(granted, asker=b"x")
    world.written(world.room(names[:11]))
    assert seen(world, names[:11]) == [1] * 8 + [2] * 3
    world.write(names)
    assert seen(world, names[11:]) == [2]


def test_of_what_was_left_out_by_a_lost_asker_nothing_is_known():
    world = World(8)
    names = names_of(range(7))
    world.written(world.room(names))
    world.post(AskerLost(b"w"))
    world.written(world.room(names, is_again=True))
    assert seen(world, names) == [1] * 4 + [2] * 3


def test_what_is_read_stays_and_what_is_only_written_goes():
    world = World(16)
    names = names_of(range(4), "read")
    world.write(names)
    for number in range(8):
        world.ask(names)
        world.release()
        world.write(names_of(range(4), f"once {number}"))
    assert world.held(names) == names


def test_naming_the_head_keeps_it_while_its_tail_is_written():
    world = World(16)
    names = names_of(range(12))
    for end in (4, 8, 12):
        world.write(names[:end])
    world.write(names_of(range(8), "other"))
    held = world.held(names)
    assert held == names[: len(held)]
    assert 4 <= len(held) < 12


def test_what_a_hint_keeps_stays_and_hints_keep_at_most_half():
    world = World(16)
    kept, names = names_of(range(4), "kept"), names_of(range(12), "many")
    world.write(kept)
    world.post(Hinted(b"".join(kept), 0, float("inf")))
    for begin in range(0, 12, 4):
        world.write(names[begin : begin + 4], begin)
    world.post(Hinted(b"".join(names), 0, float("inf")))
    assert world.pool.num_hinted(0.0) == 8
    for number in range(40):
        world.write(names_of(range(4), f"other {number}"))
    assert world.held(kept) == kept
    assert world.held(names) == names[:4]
    world.post(Hinted(b"".join(kept), 0, 0.0))
    for number in range(40, 80):
        world.write(names_of(range(4), f"other {number}"))
    assert world.held(kept) == []


def test_what_one_tenant_keeps_costs_others_no_room_but_its_own():
    world = World(400, quotas={7: 200})
    for chain in range(5):
        names = b"".join(names_of(range(40), f"kept {chain}"))
        hints = (BlockHint(0, None, -2, 0.0), BlockHint(0, None, None, 600.0))
        [granted] = world.say(RoomRequest(request_id="r", names=names, indexes=list(range(40)), tenant=7, hints=hints))
        world.written(granted)
    for chain in range(30):
        assert len(world.write(names_of(range(40), f"others {chain}"))) == 40
    assert world.pool.accounts[7] == 200


# ------------------------------------------------------------------------------------------------------------- reading


def test_an_offer_is_leased_to_its_asker_until_it_is_over():
    world = World(16)
    names = names_of(range(4))
    world.write(names)
    [handoff] = world.ask(names, first_index=0)
    assert (offered([handoff]), handoff.is_last, handoff.tier, handoff.lease_s) == (names, True, "host", LEASE_S)
    assert {b.checksum for b in each_location(handoff.blocks)} == {checksum_of(name) for name in names}
    world.release(asker=b"another")
    assert world.pool.num_used == 4
    world.now_s = LEASE_S * 0.9
    world.say(RenewLease(request_id="q"), b"a")
    world.now_s = LEASE_S * 1.8
    world.post(TimePassed())
    assert world.pool.num_used == 4
    world.now_s = LEASE_S * 2
    world.post(TimePassed())
    assert world.pool.num_used == 0
    assert world.cache.leases.num_expired == 1


def test_the_same_question_twice_is_answered_twice_and_held_once():
    world = World(16)
    names = names_of(range(4))
    world.write(names)
    assert offered(world.ask(names)) == offered(world.ask(names)) == names
    assert world.pool.num_used == 4
    world.release()
    assert world.pool.num_used == 0


def test_a_name_twice_in_one_question_is_offered_once():
    world = World(16, {"disk": stored(names_of(range(2, 4)))})
    world.write(names_of(range(2)))
    handoffs = world.ask(names_of([0, 1, 0, 2, 3, 2]))
    handoffs += world.move()
    assert sorted(offered(handoffs)) == sorted(names_of(range(4)))
    world.release()


def test_nothing_is_held_for_who_got_nothing():
    world = World(16)
    [handoff] = world.ask(names_of(range(4)))
    assert (handoff.blocks, handoff.is_last) == (b"", True)
    assert world.cache.leases.num_open == 0


def test_what_lies_in_the_arena_is_offered_before_a_store_has_read_a_byte():
    names = names_of(range(12))
    world = World(16, {"disk": stored(names[4:])})
    world.write(names[:4])
    world.pending.clear()
    [handoff] = world.ask(names)
    assert (offered([handoff]), handoff.is_last) == (names[:4], False)
    assert [read.names for read in world.pending] == [tuple(names[4:8]), tuple(names[8:12])]
    handoffs = world.move()
    assert [(offered([h]), h.is_last, h.tier) for h in handoffs] == [
        (names[4:8], False, "disk"),
        (names[8:], True, "disk"),
    ]


def test_reads_are_bounded_and_askers_take_turns():
    one, other = names_of(range(16), "one"), names_of(range(8), "other")
    world = World(64, {"disk": stored(one + other)}, max_reads=2)
    world.ask(one, "q1")
    world.ask(other, "q2")
    order = []
    while world.pending:
        assert len(world.pending) <= 2
        read = world.pending.pop(0)
        order.append(read.names[0])
        world.do(read)
    assert order == [one[0], one[4], one[8], other[0], one[12], other[4]]


def test_tails_are_read_first_where_they_are_wanted_first():
    names = names_of(range(8))
    world = World(64, {"disk": stored(names)})
    world.ask(names, is_tail_first=True)
    assert [read.names for read in world.pending] == [tuple(names[:3:-1]), tuple(names[3::-1])]


def test_two_who_want_the_same_have_it_read_once():
    names = names_of(range(4))
    world = World(16, {"disk": stored(names)})
    world.ask(names, "q1", b"a")
    world.ask(names, "q2", b"b")
    assert len(world.pending) == 1
    handoffs = world.move()
    assert [(h.request_id, offered([h])) for h in handoffs] == [("q1", names), ("q2", names)]
    world.release("q1", b"a")
    assert world.pool.num_used == 4
    world.release("q2", b"b")
    assert world.pool.num_used == 0


def test_what_is_read_for_who_left_is_kept_and_what_is_not_read_yet_is_forgotten():
    names = names_of(range(12))
    world = World(64, {"disk": stored(names)}, max_reads=1)
    world.ask(names)
    world.release()
    assert len(world.pending) == 1
    assert world.move() == []
    assert world.held(names) == names[:4]
    assert world.cache.reading.num_waiting == 0


def test_what_the_nearer_store_lost_comes_from_the_further_one():
    names = names_of(range(4))
    disk, remote = stored(names), stored(names)
    world = World(16, {"disk": disk, "remote": remote})
    disk.damage(names[1])
    world.ask(names)
    handoffs = world.move()
    assert [(offered([h]), h.is_last, h.tier) for h in handoffs] == [
        ([names[0], *names[2:]], False, "disk"),
        ([names[1]], True, "remote"),
    ]


def test_a_store_that_fails_is_left_alone_for_longer_each_time_and_comes_back():
    names = names_of(range(4))
    world = World(16, {"disk": stored(names)})
    for rest_s in (1.0, 2.0, 4.0):
        world.ask(names)
        [handoff] = world.move(failing=True)
        assert (handoff.blocks, handoff.is_last) == (b"", True)
        world.now_s += rest_s * 0.9
        assert offered(world.ask(names)) == []
        assert world.pending == []
        world.now_s += rest_s * 0.2
    world.ask(names)
    assert offered(world.move()) == names
    assert world.pool.num_used == 4


def test_whoever_waits_for_a_store_that_hangs_is_told_in_time_and_the_blocks_stay_bound_until_it_answers():
    names = names_of(range(4))
    world = World(16, {"disk": stored(names)})
    world.ask(names)
    world.now_s = 3.9
    assert world.post(TimePassed()) == []
    world.now_s = 4.1
    [handoff] = world.post(TimePassed())
    assert (handoff.blocks, handoff.is_last) == (b"", True)
    assert world.pool.num_used == 4
    assert world.move() == []
    assert world.pool.num_used == 0
    assert world.held(names) == names


def test_who_waits_behind_a_store_that_hangs_or_fails_gets_the_rest_elsewhere_or_is_told():
    names = names_of(range(16))
    world = World(32, {"disk": stored(names), "remote": stored(names[12:])}, max_reads=1)
    world.ask(names[:8], "q1")
    world.ask(names[8:], "q2")
    world.now_s = 4.1
    handoffs = world.post(TimePassed())  # the disk hangs
    assert [(h.request_id, h.is_last) for h in handoffs] == [("q1", True)]
    assert [(read.tier, read.names) for read in world.pending[1:]] == [("remote", tuple(names[12:]))]
    [handoff] = world.do(world.pending.pop())
    assert (offered([handoff]), handoff.is_last, handoff.tier) == (names[12:], True, "remote")
    world.move()
    world.now_s = 9.0
    world.ask(names, "q3")
    handoffs = world.move(failing=True)
    assert handoffs[-1].is_last
    assert world.cache.num_waiting == 0


def test_a_block_that_a_worker_wrote_while_it_was_read_is_offered_as_that_one():
    names = names_of(range(2))
    world = World(16, {"disk": stored(names)})
    world.ask(names)
    [read] = world.pending
    assert world.room(names).blocks == b""  # it is on its way
    world.now_s = 4.1
    world.post(TimePassed())  # and is given up
    world.write(names)
    world.pending[:] = [read]
    world.move()
    assert world.held(names) == names
    assert world.pool.num_used == 0


def test_a_block_that_was_written_anew_before_it_was_read_does_not_come_with_the_checksum_of_before():
    names = names_of(range(2))
    world = World(16, {"disk": stored(names)})
    world.ask(names)
    other = memoryview(bytes(BLOCK_BYTES))
    world.stores["disk"].write([StoredBlock(names[1], BLOCK_SIZE, checksum(other))], [other], 1.0)
    assert offered(world.move()) == world.held(names) == names[:1]
    world.release()
    assert offered(world.ask(names) + world.move()) == names
    [block_id] = world.pool.find(names[1]).tolist()
    assert world.pool.records(world.pool.find(names[1]))["checksum"].tolist() == [checksum(other)]
    assert world.pool.arena.block(block_id) == other


def test_without_room_what_would_be_read_is_not_waited_for():
    names = names_of(range(12))
    world = World(8, {"disk": stored(names)})
    world.write(names_of(range(4), "held"))
    world.ask(names_of(range(4), "held"), "holding")
    world.pending.clear()
    world.ask(names)
    handoffs = world.move()
    assert offered(handoffs) == names[:4]
    assert handoffs[-1].is_last
    assert world.cache.reading.num_without_room == 8


# --------------------------------------------------------------------------------------------------------- writing down


def test_what_was_wanted_once_goes_down_while_a_store_has_room_for_it():
    world = World(16, {"disk": LoopbackStore(1000, checksum)})
    names = names_of(range(8))
    world.write(names)
    assert [write.names if isinstance(write, ReadBlocks) else len(write.blocks) for write in world.pending] == [4]
    world.move()
    assert set(world.stores["disk"].names()) == set(names)
    assert world.pool.num_used == 0


def test_into_a_full_store_goes_only_what_was_wanted_again():
    store = LoopbackStore(4, checksum)
    world = World(32, {"disk": store})
    world.write(names_of(range(8), "first"))
    world.move()
    assert world.cache.tiers["disk"].is_full
    before = set(store.names())
    again = names_of(range(4), "again")
    world.write(again)
    world.move()
    assert set(store.names()) == before
    world.ask(again)
    world.release()
    world.move()
    assert set(store.names()) == set(again)


def test_writes_are_one_at_a_time_and_hold_their_blocks_until_they_are_over():
    world = World(16, {"disk": LoopbackStore(1000, checksum)})
    world.write(names_of(range(8)))
    assert len(world.pending) == 1
    assert world.pool.num_used == 4
    world.move(failing=True)
    assert world.pool.num_used == 0
    assert list(world.stores["disk"].names()) == []


def test_what_is_about_to_be_evicted_is_written_before_it_goes():
    store = LoopbackStore(1000, checksum)
    world = World(16, {"disk": store})
    failed = names_of(range(8), "failed")
    world.write(failed)
    world.move(failing=True)
    world.now_s = 5.0
    for number in range(2):
        world.write(names_of(range(4), f"other {number}"))
        world.move()
    assert len(world.held(failed)) == 8
    world.write(names_of(range(2), "more"))
    world.move()
    lost = [name for name in failed if name not in world.held(failed)]
    kept = [name for name in failed if store.find(name) is not None]
    assert len(lost) <= 2
    assert set(kept) == set(failed) - set(lost)
    assert world.held(failed)


def test_events_tell_of_every_tier_what_a_snapshot_would():
    store = LoopbackStore(6, checksum)
    world = World(8, {"disk": store})
    told = {"host": set(), "disk": set()}
    for number in range(12):
        names = names_of(range(3), str(number))
        world.write(names)
        world.move()
        world.ask(names)
        world.release()
        world.move()
        for tier, new, gone in world.cache.take_events():
            told[tier] |= {new[i : i + 16] for i in range(0, len(new), 16)}
            told[tier] -= {gone[i : i + 16] for i in range(0, len(gone), 16)}
        for tier, names in world.cache.snapshot():
            assert told[tier] == {names[i : i + 16] for i in range(0, len(names), 16)}


def test_every_counter_is_told():
    world = World(8, {"disk": stored(names_of(range(2)))})
    world.write(names_of(range(2, 4)))
    world.ask(names_of(range(5)))
    world.move()
    values = world.cache.stats()
    assert values["kvray_cache_granted_total"] == values["kvray_cache_written_total"] == 2
    assert values['kvray_cache_offered_total{tier="host"}'] == values['kvray_cache_offered_total{tier="disk"}'] == 2
    assert values['kvray_cache_written_down_total{tier="disk"}'] == values['kvray_cache_read_total{tier="disk"}'] == 2
    assert values["kvray_cache_missed_total"] == 1
    assert values["kvray_cache_blocks_held"] == 4
    assert np.isfinite(list(values.values())).all()


# -------------------------------------------------------------------------------------------------------------- tenants


def test_what_comes_up_from_a_store_is_its_tenants_and_within_the_quota():
    names, others = names_of(range(6)), names_of(range(4), "others")
    world = World(12, {"disk": stored(names, 7)}, quotas={7: 4})
    world.write(others, tenant=8)
    world.ask(names)
    handoffs = world.move()
    world.release()
    assert sum(num_locations(handoff.blocks) for handoff in handoffs) == 4
    assert handoffs[-1].is_last
    assert world.pool.accounts[7] == 4
    assert world.held(others) == others
    found = world.pool.find(b"".join(world.held(names)))
    assert set(world.pool.records(found)["tenant"].tolist()) == {7}
    assert {block.tenant for handoff in handoffs for block in each_location(handoff.blocks)} == {7}


def test_a_tenant_is_granted_no_more_than_its_quota():
    world = World(20, quotas={7: 3})
    assert len(world.write(names_of(range(8)), tenant=7)) == 3
    assert world.held(names_of(range(8))) == names_of(range(3)), "heads first"
    assert len(world.write(names_of(range(8), "other"), tenant=8)) == 8


def test_what_a_tenant_wanted_once_pushes_nothing_out_of_a_store_where_it_is_at_its_quota():
    disk = stored(names_of(range(2), "before"), 7, {7: 2})
    world = World(20, {"disk": disk})
    world.write(names_of(range(2)), tenant=7)
    world.move()
    assert list(disk.names()) == names_of(range(2), "before")
    world.ask(names_of(range(2)))
    world.release()
    world.move()
    assert list(disk.names()) == names_of(range(2))
    assert not world.cache.tiers["disk"].is_full
    world.write(names_of(range(3), "others"), tenant=8)
    world.move()
    assert all(disk.find(name) for name in names_of(range(3), "others")), "others' room is not taken for full"


# --------------------------------------------------------------------------------------------------- hints of requests


def test_a_requests_hints_reach_what_is_held_and_what_is_written_later():
    world = World(20)
    names = names_of(range(4))
    world.write(names[:2])
    message = RoomRequest(
        request_id="r",
        names=b"".join(names),
        indexes=list(range(4)),
        hints=(BlockHint(0, 3, None, 60.0), BlockHint(3, None, -1, 0.0)),
    )
    [granted] = world.say(message)
    held = world.pool.find(b"".join(names[:2]))
    assert world.pool.records(held)["pinned_until_s"].tolist() == [60.0, 60.0]
    world.now_s = 10.0
    world.written(granted)
    rows = world.pool.records(world.pool.find(b"".join(names)))
    assert rows["pinned_until_s"].tolist() == [60.0, 60.0, 70.0, 0.0]
    assert rows["priority"].tolist() == [0, 0, 0, -1]


def test_of_a_slow_store_a_little_is_read_at_a_time_in_the_order_wanted():
    names = names_of(range(40))
    world = World(64, {"disk": stored(names)}, batch_bytes=8 * BLOCK_BYTES)
    world.ask(names[:8], "first")
    world.now_s += 0.08  # ten milliseconds a block
    world.move()
    world.release("first")
    world.ask(names[8:], "second", is_tail_first=True, first_index=8)
    reads = [read for read in world.pending if isinstance(read, ReadBlocks)]
    assert [read.names for read in reads] == [tuple(names[39:36:-1]), tuple(names[36:33:-1])]
    world.now_s += 0.03
    world.do(world.pending.pop(world.pending.index(reads[0])))
    reads = [read for read in world.pending if isinstance(read, ReadBlocks)]
    assert [read.names for read in reads] == [tuple(names[36:33:-1]), tuple(names[33:30:-1])]
    world.move()
    assert world.held(names) == names
