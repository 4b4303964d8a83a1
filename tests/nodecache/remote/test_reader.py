from __future__ import annotations

from nodecache.remote.index import Place
from nodecache.remote.reader import parts_of
from tests.nodecache.remote.blocks import MODEL, block_of

A, B = b"a" * 16, b"b" * 16
LARGE = MODEL._replace(block_bytes=1 << 20)


def parts(places, model=LARGE):
    found = [place and Place(*place, block_of(index)) for index, place in enumerate(places)]
    return [
        (part.object, part.first_position, part.num_blocks, [index for index, _ in part.wanted])
        for part in parts_of(found, model)
    ]


def test_nothing_is_read_for_what_is_not_there():
    assert parts([None, None]) == []


def test_what_lies_together_is_read_at_once_whatever_the_order_asked():
    assert parts([(A, 2), (B, 0), (A, 1), None, (A, 3)]) == [(A, 1, 3, [2, 0, 4]), (B, 0, 1, [1])]


def test_a_block_asked_twice_is_read_once():
    assert parts([(A, 2), (A, 2)]) == [(A, 2, 1, [0, 1])]


def test_small_gaps_are_read_too_large_ones_are_not():
    assert parts([(A, 0), (A, 50)], MODEL) == [(A, 0, 51, [0, 1])]
    assert parts([(A, 0), (A, 2)]) == [(A, 0, 1, [0]), (A, 2, 1, [1])]


def test_a_part_says_where_it_lies_in_the_object():
    (part,) = parts_of([Place(A, 3, block_of(0)), Place(A, 4, block_of(1))], MODEL)
    assert (part.offset(MODEL), part.num_bytes(MODEL)) == (3 * MODEL.record_bytes, 2 * MODEL.record_bytes)
