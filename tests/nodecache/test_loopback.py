import pytest

from nodecache.loopback import LoopbackStore
from nodecache.quotas import Accounts
from nodecache.store import StoredBlock, StoreError
from tests.nodecache.blocks import BLOCK_BYTES, BLOCK_SIZE, checksum, checksum_of, content_of, names_of


@pytest.fixture
def store():
    return LoopbackStore(4, checksum)


def write(store, names) -> list[bytes]:
    blocks = [StoredBlock(name, BLOCK_SIZE, checksum_of(name)) for name in names]
    return store.write(blocks, [memoryview(content_of(name)) for name in names], 1.0)


def read(store, names) -> dict[bytes, bytes]:
    targets = [memoryview(bytearray(BLOCK_BYTES)) for _ in names]
    arrived = store.read(names, targets, 1.0)
    return {name: bytes(target) for name, target, is_there in zip(names, targets, arrived, strict=True) if is_there}


def test_what_was_written_is_found_and_read(store):
    names = names_of(range(3))
    assert write(store, names) == []
    assert [store.find(name) for name in names] == [StoredBlock(n, BLOCK_SIZE, checksum_of(n)) for n in names]
    assert set(store.names()) == set(names)
    assert read(store, [*names, *names_of([9])]) == {name: content_of(name) for name in names}
    store.remove([*names[:1], *names_of([9])])
    assert store.find(names[0]) is None
    assert store.stats() == {"kvray_store_blocks": 2.0}


def test_a_full_one_says_what_it_dropped(store):
    write(store, names_of(range(3)))
    assert write(store, names_of(range(3, 6))) == names_of(range(2))


def test_a_damaged_block_does_not_come_and_is_gone(store):
    names = names_of(range(2))
    write(store, names)
    store.damage(names[0])
    assert read(store, names) == {names[1]: content_of(names[1])}
    assert store.find(names[0]) is None


def test_one_that_fails_or_does_not_answer_raises(store):
    store.error = StoreError("gone")
    with pytest.raises(StoreError, match="gone"):
        write(store, names_of([0]))
    store.error = None
    store.answers.clear()
    with pytest.raises(StoreError, match=r"no answer within 0\.01 s"):
        store.read([], [], 0.01)
    assert list(store.names()) == []


def test_pages_show_what_is_there_in_the_order_in_which_it_came(store):
    names = names_of(range(4))
    write(store, names)
    first = store.page(0, 3)
    assert [block.name for block in first.blocks] == names[:3]
    assert first.num_held == 4
    store.remove(names[:3])
    last = store.page(first.next_cursor, 3)
    assert ([block.name for block in last.blocks], last.next_cursor) == (names[3:], None)


def test_a_tenant_at_its_quota_gives_up_its_own():
    store = LoopbackStore(100, checksum, Accounts({7: 2}))
    names = names_of(range(5))
    write(store, names[:1])
    blocks = [StoredBlock(name, BLOCK_SIZE, checksum_of(name), 7) for name in names[1:]]
    sources = [memoryview(content_of(name)) for name in names[1:]]
    assert store.write(blocks[:2], sources[:2], 1.0) == []
    assert store.write(blocks[2:3], sources[2:3], 1.0) == [names[1]]
    assert list(store.names()) == [names[0], *names[2:4]]
    store.remove(names[2:3])
    assert store.accounts[7] == 1
