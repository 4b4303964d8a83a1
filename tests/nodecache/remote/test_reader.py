from __future__ import annotations

from nodecache.codec import PLAIN
from nodecache.remote.index import Place
from nodecache.remote.layout import HEADER_BYTES, Record
from nodecache.remote.reader import parts_of
from tests.nodecache.remote.blocks import block_of

A, B = b"a" * 16, b"b" * 16
MIB = 1 << 20


def parts(places, stored_bytes=MIB):
    """What is read of objects with records of one length."""
    size = HEADER_BYTES + stored_bytes
    found = [
        place and Place(place[0], Record(block_of(index), place[1], place[1] * size, PLAIN, stored_bytes))
        for index, place in enumerate(places)
    ]
    return [
        (part.object, part.offset / size, part.num_bytes / size, [index for index, _ in part.wanted])
        for part in parts_of(found)
    ]


def test_nothing_is_read_for_what_is_not_there():
    assert parts([None, None]) == []


def test_what_lies_together_is_read_at_once_whatever_the_order_asked():
    assert parts([(A, 2), (B, 0), (A, 1), None, (A, 3)]) == [(A, 1, 3, [2, 0, 4]), (B, 0, 1, [1])]


def test_a_block_asked_twice_is_read_once():
    assert parts([(A, 2), (A, 2)]) == [(A, 2, 1, [0, 1])]


def test_small_gaps_are_read_too_large_ones_are_not():
    assert parts([(A, 0), (A, 50)], 5000) == [(A, 0, 51, [0, 1])]
    assert parts([(A, 0), (A, 2)]) == [(A, 0, 1, [0]), (A, 2, 1, [1])]


def test_records_of_any_length_are_read_from_the_first_to_the_last_byte_wanted():
    lengths = [500, 0, 300]
    offsets = [7000, 7628, 7756]
    places = [
        Place(A, Record(block_of(n), n, offset, PLAIN, length))
        for n, (offset, length) in enumerate(zip(offsets, lengths, strict=True))
    ]
    (part,) = parts_of([places[2], places[0]])
    assert (part.offset, part.num_bytes) == (7000, 7756 + HEADER_BYTES + 300 - 7000)
