"""Block locations as rows: packed and back, and which are those of a prefix."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvcache.locations import (
    LOCATION,
    BlockLocation,
    chosen,
    each_location,
    is_of_prefix,
    is_partial,
    num_locations,
    pack_locations,
    unpack_locations,
    with_checksums,
)
from messages.handoff import LOCATION_BYTES, BlocksWritten, KvHandoff, RoomGranted
from messages.wire import decode, encode

NAMES = [bytes([number]) * 16 for number in range(1, 5)]
WHOLE = BlockLocation(1, 2**32 - 1, 2**64 - 1, NAMES[0], 16, checksum=2**64 - 1, tenant=2**63)
PARTIAL = BlockLocation(2, 0, 0, b"", 5)


def rows_of(*blocks: BlockLocation):
    return unpack_locations(pack_locations(blocks))


def test_what_was_packed_comes_back_with_numbers_of_any_size_and_without_a_name_where_it_has_none():
    packed = pack_locations([WHOLE, PARTIAL])
    assert each_location(packed) == [WHOLE, PARTIAL]
    assert (len(packed), num_locations(packed)) == (2 * LOCATION_BYTES, 2)
    assert each_location(pack_locations([])) == []


def test_a_row_has_as_many_bytes_as_messages_say_and_the_fields_of_a_location():
    assert LOCATION.itemsize == LOCATION_BYTES
    assert LOCATION.names == BlockLocation.__struct_fields__


def test_a_number_that_no_row_has_room_for_is_refused():
    with pytest.raises(OverflowError):
        pack_locations([BlockLocation(2**32, 0, 0, b"", 5)])


def test_checksums_are_filled_in_by_block_id_and_nothing_else_is_changed():
    blocks = pack_locations([WHOLE, PARTIAL])
    summed = with_checksums(blocks, lambda ids: ids.astype(np.uint64) + np.uint64(7))
    assert [block.checksum for block in each_location(summed)] == [2**32 + 6, 7]
    assert with_checksums(summed, lambda ids: unpack_locations(blocks)["checksum"]) == blocks


@pytest.mark.parametrize(
    ("changes", "is_expected"),
    [
        ({}, True),
        ({"index": 4}, False),
        ({"index": 8}, False),
        ({"index": 2**32 - 1}, False),
        ({"index": 6}, False),
        ({"num_tokens": 15}, False),
        ({"name": NAMES[3]}, False),
        ({"name": b""}, False),
        ({"block_id": 9, "generation": 9, "checksum": 9, "tenant": 9}, True),
    ],
)
def test_a_row_is_of_a_prefix_where_its_place_has_that_name_and_it_is_whole(changes, is_expected):
    block = BlockLocation(**{"index": 5, "block_id": 1, "generation": 1, "name": NAMES[0], "num_tokens": 16} | changes)
    assert is_of_prefix(rows_of(block), 5, NAMES[:3], 16).tolist() == [is_expected]


def test_rows_are_told_apart_one_by_one_and_none_of_none():
    blocks = [BlockLocation(index, 0, 0, NAMES[index], 16) for index in (2, 0, 3, 1)]
    assert is_of_prefix(rows_of(*blocks), 0, [*NAMES[:2], NAMES[0], NAMES[3]], 16).tolist() == [False, True, True, True]
    assert is_of_prefix(rows_of(), 0, [], 16).tolist() == []


def test_a_partial_block_is_the_one_at_that_place_with_those_tokens_and_without_a_name():
    rows = rows_of(PARTIAL, *(BlockLocation(2, 0, 0, *rest) for rest in ((b"", 4), (NAMES[0], 5))), WHOLE)
    assert is_partial(rows, 2, 5).tolist() == [True, False, False, False]
    assert not is_partial(rows, 3, 5).any()


def test_rows_are_not_copied_where_all_are_chosen():
    rows = rows_of(WHOLE, PARTIAL)
    assert chosen(rows, lambda some: some["index"] > 0) is rows
    assert chosen(rows, lambda some: some["index"] > 1)["index"].tolist() == [2]


def test_a_message_carries_packed_locations_whole_or_is_none_of_ours():
    blocks = pack_locations([WHOLE, PARTIAL])
    for message in (
        KvHandoff(request_id="r", lease_s=1.0, blocks=blocks),
        RoomGranted(request_id="r", blocks=blocks),
        BlocksWritten(request_id="r", blocks=blocks),
    ):
        sent = encode(message)
        assert decode(sent) == message
        cut = msgspec.msgpack.encode(msgspec.msgpack.decode(sent) | {"blocks": blocks[:-1]})
        with pytest.raises(msgspec.ValidationError, match="103 bytes of packed locations, wanted a multiple of 52"):
            decode(cut)
