"""What every store below host memory does: the contract of nodecache.store."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nodecache.disk.store import DiskStore
from nodecache.quotas import Accounts
from nodecache.remote.store import RemoteStore
from nodecache.store import BlockStore, StoreError
from tests.nodecache.disk.blocks import MODEL, capacity_of
from tests.nodecache.remote.blocks import BLOCK_BYTES, DEADLINE_S, block_of, content_of, name_of
from tests.nodecache.remote.blocks import MODEL as REMOTE_MODEL
from transport.checksum import checksum

OPENERS: dict[str, Callable[[Path, Accounts], BlockStore]] = {
    "disk": lambda root, accounts: DiskStore(root, MODEL, capacity_of(16), checksum, accounts=accounts),
    "remote": lambda root, accounts: RemoteStore(str(root), REMOTE_MODEL, accounts=accounts),
}
MINE, OTHERS = 7, 2**64 - 1


@pytest.fixture(params=OPENERS)
def store(request, tmp_path) -> Iterator[BlockStore]:
    store = OPENERS[request.param](tmp_path, Accounts())
    yield store
    store.close()


@pytest.fixture(params=OPENERS)
def reopen(request, tmp_path):
    """Opens one store after the other in one place; each with quotas in blocks, by tenant."""
    opened: list[BlockStore] = []

    def open_next(quotas: dict[int, int | None]) -> BlockStore:
        for store in opened:
            store.close()
        opened.append(OPENERS[request.param](tmp_path, Accounts(quotas)))
        return opened[-1]

    yield open_next
    for store in opened:
        store.check_invariants()
        store.close()


def write_of(store, tenant, *numbers):
    blocks = [block_of(n)._replace(tenant=tenant) for n in numbers]
    return store.write(blocks, [content_of(n) for n in numbers], DEADLINE_S)


def held(store, *numbers):
    return [n for n in numbers if store.find(name_of(n))]


def write(store, *numbers):
    return store.write([block_of(n) for n in numbers], [content_of(n) for n in numbers], DEADLINE_S)


def read(store, *numbers):
    targets = [bytearray(BLOCK_BYTES) for _ in numbers]
    came = store.read([name_of(n) for n in numbers], [memoryview(target) for target in targets], DEADLINE_S)
    return came, targets


def test_what_was_written_is_found_and_read(store):
    assert write(store, 1, 2, 3) == []
    assert [store.find(name_of(n)) for n in (1, 2, 3)] == [block_of(n) for n in (1, 2, 3)]
    assert set(store.names()) == {name_of(1), name_of(2), name_of(3)}
    came, targets = read(store, 3, 1)
    assert came == [True, True]
    assert targets == [content_of(3), content_of(1)]


def test_what_was_never_written_is_not_there(store):
    write(store, 1)
    assert store.find(name_of(2)) is None
    came, targets = read(store, 2, 1)
    assert came == [False, True]
    assert targets == [bytes(BLOCK_BYTES), content_of(1)]


def test_nothing_read_or_written_is_nothing(store):
    assert store.read([], [], DEADLINE_S) == []
    assert store.write([], [], DEADLINE_S) == []


def test_writing_twice_keeps_one(store):
    write(store, 1, 2)
    write(store, 2, 3, 3)
    assert sorted(store.names()) == sorted(name_of(n) for n in (1, 2, 3))
    assert read(store, 1, 2, 3)[0] == [True] * 3


def test_what_was_removed_is_gone_and_may_come_again(store):
    write(store, 1, 2)
    store.remove([name_of(1), name_of(7)])
    assert store.find(name_of(1)) is None
    assert read(store, 1, 2)[0] == [False, True]
    write(store, 1)
    assert read(store, 1, 2)[0] == [True, True]


def pages(store, size, between=lambda: None):
    found, cursor = [], 0
    while cursor is not None:
        page = store.page(cursor, size)
        assert len(page.blocks) == len(page.places) <= size
        assert page.num_held == len(list(store.names()))
        found += page.blocks
        cursor = page.next_cursor
        between()
    return found


def test_pages_show_every_block_once(store):
    assert pages(store, 10) == []
    write(store, *range(25))
    store.remove([name_of(3)])
    wanted = [block_of(n) for n in range(25) if n != 3]
    for size in (1, 7, 24, 1000):
        assert sorted(pages(store, size)) == sorted(wanted)
    places = store.page(0, 1000).places
    assert len(set(places)) == len(places)
    assert store.page(10**17, 10).blocks == []


def test_blocks_that_are_removed_between_pages_hide_no_others(store):
    write(store, *range(30))
    left = iter(range(30))
    found = pages(store, 5, lambda: store.remove([name_of(next(left, 0)), name_of(next(left, 0))]))
    assert {block.name for block in found} >= {block.name for block in pages(store, 100)}


def test_after_a_sync_all_is_as_before(store):
    write(store, 1, 2)
    store.remove([name_of(1)])
    store.sync(DEADLINE_S)
    assert list(store.names()) == [name_of(2)]


def test_what_is_collected_costs_no_block_and_ends(store):
    write(store, *range(30))
    store.remove([name_of(n) for n in range(30) if n % 7])
    num_rounds = 0
    while store.collect(DEADLINE_S).has_more:
        num_rounds += 1
        assert num_rounds < 100
    left = [n for n in range(30) if n % 7 == 0]
    assert sorted(store.names()) == sorted(name_of(n) for n in left)
    assert read(store, *left)[0] == [True] * len(left)


def test_many_blocks_in_any_order(store):
    numbers = list(range(40))
    write(store, *numbers)
    random.Random(1).shuffle(numbers)
    came, targets = read(store, *numbers)
    assert all(came)
    assert targets == [content_of(n) for n in numbers]


def test_blocks_of_another_size_are_refused(store):
    with pytest.raises(StoreError, match=rf"blocks of \[4\] bytes; {BLOCK_BYTES} are wanted"):
        store.write([block_of(1)], [memoryview(b"1234")], DEADLINE_S)
    assert store.find(name_of(1)) is None


def test_any_thread_may_call(store):
    errors = []

    def work(first):
        try:
            for number in range(first, first + 20):
                write(store, number)
                assert read(store, number)[1] == [content_of(number)]
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 10, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(store.names())) == 50


def test_after_close_nothing_is_read_or_written(store):
    write(store, 1)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        write(store, 2)
    with pytest.raises(StoreError, match="closed"):
        read(store, 1)
    store.close()


def test_its_counters_are_numbers_by_name(store):
    write(store, 1)
    read(store, 1)
    values = store.stats()
    assert all(isinstance(value, float) for value in values.values())
    assert all(name.startswith("kvray_") for name in values)


# -------------------------------------------------------------------------------------------------------------- tenants


def test_whose_blocks_they_are_is_known_after_a_restart(reopen):
    store = reopen({})
    write_of(store, MINE, 1, 2)
    write_of(store, OTHERS, 3)
    write(store, 4)
    store = reopen({MINE: None})
    assert [store.find(name_of(n)).tenant for n in (1, 2, 3, 4)] == [MINE, MINE, OTHERS, 0]
    assert {block.tenant for block in store.page(0, 10_000).blocks} == {MINE, OTHERS, 0}
    assert (store.accounts[MINE], store.accounts[OTHERS]) == (2, 0), "who has no account is not counted"
    assert read(store, 1, 3, 4)[1] == [content_of(1), content_of(3), content_of(4)]


def test_a_tenant_at_its_quota_gives_up_its_own_oldest_blocks(reopen):
    store = reopen({MINE: 4, OTHERS: None})
    assert write_of(store, OTHERS, *range(100, 120)) == []
    assert write_of(store, MINE, 1, 2, 3) == []
    assert store.accounts.room(MINE) == 1
    assert sorted(write_of(store, MINE, 4, 5, 6)) == sorted([name_of(2), name_of(3)]), "tails before heads"
    assert held(store, *range(1, 7)) == [1, 4, 5, 6]
    assert held(store, *range(100, 120)) == list(range(100, 120))
    assert (store.accounts[MINE], store.accounts[OTHERS], store.accounts.room(MINE)) == (4, 20, 0)
    assert write_of(store, MINE, 5, 6) == [], "what is held already pushes nothing out"
    assert read(store, 1, 4, 5, 6)[0] == [True] * 4


def test_of_a_chain_longer_than_the_quota_the_head_is_taken_in(reopen):
    store = reopen({MINE: 3})
    write_of(store, MINE, 1, 2)
    assert sorted(write_of(store, MINE, *range(10, 20))) == sorted([name_of(1), name_of(2)])
    assert held(store, *range(20)) == [10, 11, 12]
    assert store.accounts[MINE] == 3


def test_who_may_have_nothing_has_nothing(reopen):
    store = reopen({MINE: 0})
    assert write_of(store, MINE, 1, 2) == []
    assert held(store, 1, 2) == []
    assert write(store, 3) == []
    assert held(store, 3) == [3]


def test_what_is_removed_or_read_damaged_counts_no_more(reopen):
    store = reopen({MINE: 2})
    write_of(store, MINE, 1, 2)
    store.remove([name_of(1)])
    assert store.accounts[MINE] == 1
    assert write_of(store, MINE, 3) == []
    assert held(store, 1, 2, 3) == [2, 3]


def test_a_smaller_quota_after_a_restart_holds_with_the_next_write(reopen):
    store = reopen({MINE: 10})
    write_of(store, MINE, *range(10))
    store = reopen({MINE: 4})
    write_of(store, MINE, 20)
    assert store.accounts[MINE] == 4
    assert held(store, 20) == [20]
