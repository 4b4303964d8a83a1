"""Blocks that will be asked for: told where they lie, read up in turn, never more than a share of the arena."""

from __future__ import annotations

import pytest

from kvcache.leases import AskerLost
from messages.handoff import BlocksFound, FoundRun, PrefetchBlocks, ReleaseLease
from tests.nodecache.blocks import names_of
from tests.nodecache.test_cache import World, offered, stored

DISK = names_of(range(8), "d")


def prefetch(world: World, names, request_id="p", asker=b"a", first_index=0) -> list[BlocksFound]:
    return world.say(PrefetchBlocks(request_id=request_id, first_index=first_index, names=b"".join(names)), asker)


def runs(told) -> list[tuple[FoundRun, ...]]:
    return [message.runs for message in told]


@pytest.fixture
def world() -> World:
    """32 blocks of memory, of which 8 may be read ahead; two blocks lie there, eight on disk, and one both."""
    world = World(32, {"disk": stored(DISK)})
    world.write(names_of(range(2), "h"))
    world.move()
    return world


def test_it_is_told_where_blocks_lie_and_again_when_they_were_read(world):
    names = [*names_of(range(2), "h"), *DISK[:3], *names_of(range(2), "x")]
    told = prefetch(world, names, first_index=5)
    assert runs(told) == [(FoundRun(5, 7, "host"), FoundRun(7, 10, "disk"))]
    assert runs(world.move()) == [(FoundRun(5, 10, "host"),)]
    assert world.pool.num_used == 0
    assert offered(world.ask(DISK[:3])) == DISK[:3]
    assert world.pending == []


def test_what_lies_in_memory_or_nowhere_is_told_once_and_forgotten(world):
    assert runs(prefetch(world, names_of(range(3), "h"))) == [(FoundRun(0, 2, "host"),)]
    assert runs(prefetch(world, names_of(range(3), "x"))) == [()]
    assert (world.move(), len(world.cache.prefetching)) == ([], 0)


def test_no_more_than_a_share_of_the_arena_is_read_ahead_the_next_one_when_the_first_is_released():
    more = names_of(range(8), "e")
    world = World(32, {"disk": stored([*DISK, *more])})
    prefetch(world, DISK[:5], "first")
    prefetch(world, DISK[5:] + names_of(range(1), "x"), "second", asker=b"b")
    world.move()
    assert world.held(DISK) == DISK
    assert runs(prefetch(world, more, "third")) == [(FoundRun(0, 8, "disk"),)]
    assert world.move() == []  # eight of eight are read for others
    world.say(ReleaseLease(request_id="first"), b"a")
    assert runs(world.move()) == [(FoundRun(0, 5, "host"), FoundRun(5, 8, "disk"))]
    world.post(AskerLost(b"b"))
    world.post(AskerLost(b"a"))
    assert len(world.cache.prefetching) == 0


def test_what_is_released_before_its_turn_is_not_read():
    world = World(32, {"disk": stored(DISK)}, max_reads=1, batch_bytes=1)
    prefetch(world, DISK)
    world.release("p")
    assert world.move() == []
    assert world.held(DISK) == DISK[:1]  # that was being read


def test_who_asks_goes_before_those_who_will_ask():
    world = World(32, {"disk": stored(DISK)}, max_reads=1, batch_bytes=1)
    prefetch(world, DISK[:4])
    world.ask(DISK[4:])
    world.do(world.pending.pop(0))
    for _ in range(4):
        world.do(world.pending.pop(0))
    assert world.held(DISK) == [DISK[0], *DISK[4:]]


def test_a_block_that_is_worth_more_stays():
    world = World(8, {"disk": stored(DISK)})
    hot = names_of(range(8), "h")
    world.write(hot[:4])
    world.write(hot[4:])
    for number in range(4):
        world.ask(hot, f"again {number}")
        world.release(f"again {number}")
    assert runs(prefetch(world, DISK[:2])) == 2 * [(FoundRun(0, 2, "disk"),)]  # there is no room: told at once
    assert world.held(hot) == hot
    assert offered(world.ask(DISK[:2])) == []


def test_a_store_that_fails_is_told_as_well(world):
    prefetch(world, DISK[:3])
    assert runs(world.move(failing=True)) == [()]  # it is left alone for a while
    assert world.pool.num_used == 0
