import os
import tracemalloc

import numpy as np
import pytest

from kvcache.pool import BlockState
from messages.errors import InvariantError
from nodecache.arena import Arena, as_ids
from nodecache.pool import HostPool, Written, as_names
from nodecache.quotas import Accounts
from nodecache.worth import Worth
from tests.nodecache.blocks import BLOCK_SIZE, QUARANTINE_S, checksum_of, layout_of, names_of, pool_of


def commit(pool, block_ids, names, *, indexes=None, sights=1, now_s=0.0):
    count = len(names)
    written = Written(
        as_ids(block_ids),
        as_names(b"".join(names)),
        np.array([checksum_of(name) for name in names], np.uint64),
        np.full(count, BLOCK_SIZE, np.uint32),
        np.array(range(count) if indexes is None else indexes, np.uint32),
    )
    return pool.commit(written, np.full(count, sights, np.uint32), now_s)


def hold(pool, names, **options):
    """Have the pool hold these names, evictable; their blocks."""
    worth, tenant = options.pop("worth", 3), options.pop("tenant", 0)
    block_ids = pool.take([worth] * len(names), options.get("now_s", 0.0), tenant)
    assert len(block_ids) == len(names)
    assert commit(pool, block_ids, names, **options).all()
    pool.unpin(block_ids)
    return block_ids


def held(pool, names):
    return [found >= 0 for found in pool.find(b"".join(names)).tolist()]


def test_a_blocks_life():
    pool = pool_of(4)
    [block_id] = pool.take([1], 0.0).tolist()
    states = [pool.state(block_id)]
    commit(pool, [block_id], names_of([0]))
    states.append(pool.state(block_id))
    pool.unpin(as_ids([block_id]))
    states.append(pool.state(block_id))
    taken = pool.take([3] * 4, 0.0)
    pool.quarantine(taken[:1], 5.0)
    states.append(pool.state(int(taken[0])))
    assert pool.release_quarantined(4.9) == 0
    assert pool.release_quarantined(5.0) == 1
    states.append(pool.state(int(taken[0])))
    assert states == [
        *(BlockState.WRITING, BlockState.PINNED, BlockState.EVICTABLE, BlockState.QUARANTINED, BlockState.FREE)
    ]
    pool.give_back(taken[1:])
    assert pool.num_empty == 4
    pool.check_invariants()


def test_names_are_found_among_many_that_share_buckets():
    pool, names = pool_of(512), names_of(range(512))
    block_ids = hold(pool, names)
    assert (pool.find(b"".join(names)) == block_ids).all()
    assert not any(held(pool, names_of(range(512, 1024))))
    assert pool.names(block_ids) == names
    newer = names_of(range(600, 856))
    hold(pool, newer)
    assert held(pool, newer) == [True] * 256
    assert sum(held(pool, names)) == 256
    pool.check_invariants()


def test_a_generation_changes_before_the_bytes_may_and_only_then():
    pool = pool_of(2)
    before = pool.arena.generations.copy()
    block_ids = hold(pool, names_of([0, 1]))
    committed = pool.arena.generations.copy()
    assert (committed == before + 1).all()
    pool.pin(block_ids)
    pool.unpin(block_ids)
    assert (pool.arena.generations == committed).all()
    pool.take([3], 0.0)
    assert (pool.arena.generations != committed).sum() == 1


def test_a_name_is_given_once():
    pool, names = pool_of(4), names_of([0, 1])
    hold(pool, names[:1])
    block_ids = pool.take([3] * 3, 0.0)
    assert commit(pool, block_ids, [names[0], names[1], names[1]]).tolist() == [False, True, False]
    pool.give_back(block_ids[[0, 2]])
    pool.unpin(block_ids[[1]])
    pool.check_invariants()


def test_a_newcomer_gets_no_room_of_what_is_worth_more():
    pool, names = pool_of(4), names_of(range(4))
    hold(pool, names, sights=3)
    assert len(pool.take([1, 1], 0.0)) == 0
    assert held(pool, names) == [True] * 4
    assert len(pool.take([60], 0.0)) == 1


def test_what_was_wanted_often_is_let_go_when_nobody_wants_it_for_long():
    pool, names = pool_of(16), names_of(range(16))
    hold(pool, names, sights=3)
    for _ in range(200):
        taken = pool.take([1], 0.0)
        pool.give_back(taken)
        if len(taken):
            break
    assert len(taken) == 1


def test_tails_go_before_heads_and_the_least_recently_used_chain_first():
    pool = pool_of(8)
    old, new = names_of(range(4), "old"), names_of(range(4), "new")
    hold(pool, old)
    hold(pool, new)
    pool.take([3] * 2, 0.0)
    assert held(pool, old) == [True, True, False, False]
    pool.take([3] * 3, 0.0)
    assert held(pool, old) == [False] * 4
    assert held(pool, new) == [True, True, True, False]


def test_what_a_hint_keeps_stays_until_its_time_is_over():
    pool, names = pool_of(4), names_of(range(4))
    block_ids = hold(pool, names)
    pool.hint(block_ids[:2], 0, 10.0)
    assert pool.num_hinted(0.0) == 2
    taken = pool.take([60] * 4, 9.0)
    assert len(taken) == 2
    assert held(pool, names[:2]) == [True, True]
    pool.give_back(taken)
    assert len(pool.take([60] * 4, 11.0)) == 4
    pool.check_invariants()


def test_a_demoted_block_goes_first_and_a_promoted_one_last():
    pool, names = pool_of(3), names_of(range(3))
    block_ids = hold(pool, names, indexes=[0, 0, 0])
    pool.hint(block_ids[2:], -2, 0.0)
    pool.hint(block_ids[:1], 2, 0.0)
    pool.take([60], 0.0)
    assert held(pool, names) == [True, True, False]
    pool.take([60], 0.0)
    assert held(pool, names) == [True, False, False]


def test_pins_count_and_forbid_eviction():
    pool = pool_of(2)
    block_ids = hold(pool, names_of([0, 1]))
    pool.pin(block_ids)
    pool.pin(block_ids)
    pool.unpin(block_ids)
    assert len(pool.take([60], 0.0)) == 0
    pool.unpin(block_ids)
    assert len(pool.take([60], 0.0)) == 1
    with pytest.raises(InvariantError, match="not pinned"):
        pool.unpin(block_ids)


def test_what_has_a_name_is_not_given_back():
    pool = pool_of(2)
    block_ids = pool.take([1], 0.0)
    commit(pool, block_ids, names_of([0]))
    with pytest.raises(InvariantError):
        pool.give_back(block_ids)
    with pytest.raises(InvariantError):
        pool.quarantine(block_ids, 1.0)


def test_events_are_the_difference_since_the_last_call():
    pool, names = pool_of(2), names_of(range(4))
    hold(pool, names[:2])
    stored, removed = pool.take_events()
    assert (stored, removed) == (b"".join(names[:2]), b"")
    hold(pool, names[2:3])
    hold(pool, names[3:4])
    stored, removed = pool.take_events()
    assert stored == b"".join(names[2:])
    assert sorted(as_names(removed).tolist()) == sorted(as_names(b"".join(names[:2])).tolist())
    assert sorted(as_names(pool.snapshot()).tolist()) == sorted(as_names(stored).tolist())
    assert pool.take_events() == (b"", b"")


def test_a_successor_has_all_that_was_committed_in_the_old_order_and_nothing_pinned():
    layout = layout_of(8)
    memory = layout.allocate()
    pool = HostPool(Arena(memory, layout), Worth(BLOCK_SIZE), 0.0, QUARANTINE_S)
    old, new = names_of(range(3), "old"), names_of(range(3), "new")
    pool.pin(hold(pool, new, now_s=2.0))
    hold(pool, old, now_s=1.0)
    writing = pool.take([3], 3.0)

    heir = HostPool(Arena(layout.adopt(os.dup(memory.fd)), layout), Worth(BLOCK_SIZE), 10.0, QUARANTINE_S)
    assert held(heir, old + new) == [True] * 6
    assert (heir.num_adopted, heir.num_used, heir.num_quarantined, heir.num_empty) == (6, 0, 1, 1)
    assert heir.arena.generations[writing[0]] == pool.arena.generations[writing[0]]
    assert [int(heir.records(as_ids([b]))["checksum"][0]) for b in heir.find(old[0])] == [checksum_of(old[0])]
    heir.check_invariants()
    assert heir.release_quarantined(9.9 + QUARANTINE_S) == 0
    assert heir.release_quarantined(10 + QUARANTINE_S) == 1
    assert len(heir.take([3] * 4, 20.0)) == 4
    assert held(heir, old) == [True, False, False]
    memory.close()


@pytest.mark.slow
def test_bookkeeping_takes_at_most_160_bytes_a_block_with_every_block_held():
    count = 1 << 15
    layout = layout_of(count, 64)
    memory = layout.allocate()
    arena = Arena(memory, layout)
    names = [os.urandom(16) for _ in range(count)]
    tracemalloc.start(8)
    try:
        pool = HostPool(arena, Worth(BLOCK_SIZE), 0.0, QUARANTINE_S)
        for begin in range(0, count, 1024):
            hold(pool, names[begin : begin + 1024])
            pool.take_events()
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    # The interpreter's own tables grow meanwhile, too.
    ours = snapshot.filter_traces([tracemalloc.Filter(True, "*/nodecache/pool.py", all_frames=True)])
    on_heap = sum(trace.size for trace in ours.traces)
    in_arena = arena.records.nbytes + arena.generations.nbytes
    assert on_heap + in_arena <= 160 * count
    assert on_heap + in_arena == pytest.approx(pool.num_bookkeeping_bytes, rel=0.05)
    memory.close()


@pytest.mark.parametrize("num_blocks", [1, 100, 1000, 65_537])
def test_bookkeeping_takes_at_most_160_bytes_a_block_whatever_their_number(num_blocks):
    pool = pool_of(num_blocks)
    assert pool.num_bookkeeping_bytes <= 160 * num_blocks + 1024


# -------------------------------------------------------------------------------------------------------------- quotas

MINE, OTHERS = 7, 2**64 - 1


def pool_with(num_blocks, quotas, arena=None):
    layout = layout_of(num_blocks)
    arena = arena or Arena(layout.allocate(), layout)
    return HostPool(arena, Worth(BLOCK_SIZE), 0.0, QUARANTINE_S, Accounts(quotas))


def test_a_tenant_at_its_quota_takes_the_room_of_its_own_blocks_alone():
    pool = pool_with(10, {MINE: 3})
    others = hold(pool, names_of(range(4), "others"), worth=3)
    first = names_of(range(3), "first")
    hold(pool, first, tenant=MINE, worth=3)
    assert pool.num_empty == 3, "and there would be room"
    taken = pool.take([60] * 5, 0.0, MINE)
    assert len(taken) == 3
    assert held(pool, first) == [False] * 3
    assert held(pool, names_of(range(4), "others")) == [True] * 4
    assert not set(others.tolist()) & set(taken.tolist())
    assert pool.accounts[MINE] == 3
    assert (pool.num_evicted, pool.num_evicted_for_quota) == (3, 3)
    pool.check_invariants()


def test_at_its_quota_what_is_worth_less_than_all_it_has_is_not_taken_in():
    pool = pool_with(10, {MINE: 3})
    names = names_of(range(3))
    hold(pool, names, tenant=MINE, sights=3)
    assert len(pool.take([1], 0.0, MINE)) == 0
    assert held(pool, names) == [True] * 3


def test_within_its_quota_a_tenant_is_one_of_all():
    pool = pool_with(4, {MINE: 4})
    hold(pool, names_of(range(4), "others"))
    assert len(pool.take([60] * 4, 0.0, MINE)) == 4
    pool = pool_with(4, {MINE: 4})
    hold(pool, names_of(range(4), "mine"), tenant=MINE)
    assert len(pool.take([60] * 4, 0.0, 0)) == 4, "a quota keeps nothing for anybody"


def test_a_pin_does_not_let_a_tenant_go_beyond_its_quota():
    pool = pool_with(10, {MINE: 2})
    names = names_of(range(2))
    pool.hint(hold(pool, names, tenant=MINE), 0, 100.0)
    assert len(pool.take([60], 50.0, MINE)) == 0
    assert held(pool, names) == [True] * 2
    assert len(pool.take([60], 150.0, MINE)) == 1


def test_what_is_given_back_quarantined_or_dropped_counts_no_more():
    pool = pool_with(10, {MINE: 3})
    [given_back, quarantined, kept] = pool.take([1] * 3, 0.0, MINE).tolist()
    assert pool.accounts.room(MINE) == 0
    pool.give_back(as_ids([given_back]))
    pool.quarantine(as_ids([quarantined]), 10.0)
    assert pool.accounts.room(MINE) == 2
    commit(pool, [kept], names_of([0]))
    pool.unpin(as_ids([kept]))
    pool.drop(as_ids([kept]))
    assert pool.accounts.room(MINE) == 3
    pool.check_invariants()


@pytest.mark.slow
def test_a_successor_counts_what_it_finds_and_drops_what_is_above_a_smaller_quota():
    pool = pool_with(10, {MINE: 6})
    names, others = names_of(range(6), "mine"), names_of(range(3), "others")
    hold(pool, names, tenant=MINE)
    hold(pool, others, tenant=OTHERS)
    again = pool_with(10, {MINE: 4, OTHERS: None}, Arena(pool.arena.memory, pool.arena.layout))
    assert (again.accounts[MINE], again.accounts[OTHERS]) == (4, 3)
    assert held(again, names) == [True] * 4 + [False] * 2
    assert held(again, others) == [True] * 3
    assert again.take_events() == (b"", b"")
    again.check_invariants()


def test_quotas_keep_within_160_bytes_a_block():
    pool = pool_with(100_000, dict.fromkeys(range(1, 50), 1000))
    assert pool.num_bookkeeping_bytes / pool.num_blocks <= 160
