from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from nodecache.remote.index import RemoteIndex
from nodecache.remote.manifests import REMEMBERED_US, kept_rows, removed_rows
from tests.nodecache.remote.blocks import block_of, name_of, records_of

A, B = b"a" * 16, b"b" * 16
NUMBERS = range(4)


@pytest.fixture
def index():
    index = RemoteIndex()
    yield index
    index.check_invariants()


def kept(digest, numbers, written_us):
    return kept_rows(digest, records_of(numbers), [written_us] * len(numbers))


def removed(numbers, written_us):
    return removed_rows([name_of(n) for n in numbers], [written_us] * len(numbers))


def places(index):
    return {n: (place.object[:1], place.record.position) for n in NUMBERS if (place := index.places([name_of(n)])[0])}


def test_blocks_are_found_where_rows_say(index):
    changes = index.apply(np.concatenate([kept(A, [0, 1], 10), kept(B, [3], 10)]))
    assert changes.stored == [name_of(n) for n in (0, 1, 3)]
    assert places(index) == {0: (b"a", 0), 1: (b"a", 1), 3: (b"b", 0)}
    assert index.find(name_of(3)) == block_of(3)
    assert index.find(name_of(2)) is None
    assert (len(index), index.num_objects) == (3, 2)


def test_the_latest_row_counts_whatever_the_order(index):
    parts = [kept(A, [0, 1], 10), removed([0], 11), kept(B, [0], 12), removed([1], 9)]
    rng = np.random.default_rng(2)
    for _ in range(20):
        other = RemoteIndex()
        for part in rng.permutation(len(parts)):
            other.apply(parts[part])
        assert places(other) == {0: (b"b", 0), 1: (b"a", 1)}
        other.check_invariants()


def test_rows_read_again_change_nothing(index):
    index.apply(kept(A, [0, 1], 10))
    assert index.apply(kept(A, [0, 1], 10)) == ([], [])
    assert index.apply(removed([0], 11)).removed == [name_of(0)]
    assert index.apply(removed([0], 11)) == ([], [])
    assert index.apply(kept(A, [0, 1], 10)) == ([], [])


def test_what_was_dropped_comes_back_only_when_it_was_written_later(index):
    index.apply(kept(A, [0, 1], 10))
    assert not index.drop(name_of(0), B)
    assert index.drop(name_of(0), A)
    assert not index.drop(name_of(0))
    index.apply(kept(A, [0, 1], 10))
    assert places(index) == {1: (b"a", 1)}
    index.apply(kept(A, [0, 1], 11))
    assert places(index) == {0: (b"a", 0), 1: (b"a", 1)}


def test_a_time_counts_after_what_is_known_though_clocks_differ(index):
    index.apply(np.concatenate([kept(A, [0], 100), removed([1], 200)]))
    assert index.times([name_of(0), name_of(1), name_of(2)], 50) == [101, 201, 50]


def test_an_object_without_blocks_is_empty(index):
    index.apply(kept(A, [0, 1], 10))
    index.drop(name_of(0))
    assert not index.is_empty(A)
    index.apply(removed([1], 11))
    assert index.is_empty(A)
    assert index.num_objects == 0


def test_removals_are_forgotten_in_time(index):
    index.apply(removed([0], 10))
    index.apply(removed([1], 11 + REMEMBERED_US))
    index.apply(kept(A, [0, 1], 5))
    assert places(index) == {0: (b"a", 0)}


@pytest.mark.slow
def test_bookkeeping_takes_at_most_220_bytes_a_block():
    num_blocks = 100_000
    names = np.random.default_rng(3).bytes(16 * num_blocks)
    rows = removed_rows([names[at : at + 16] for at in range(0, len(names), 16)], [10] * num_blocks)
    rows["is_removed"] = False
    rows["object"] = np.repeat(rows["name"][::10], 10)
    gc.collect()
    tracemalloc.start()
    try:
        index = RemoteIndex()
        index.apply(rows)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index) == num_blocks
    assert used / num_blocks <= 220
